"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

FAULTS = """
import ctypes, resource, sys
from models.cpu.allocator import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(size=2**23, count=8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [c.malloc(size) for _ in range(count)]
    for block in blocks:
        c.memset(block, 1, size)
    for block in reversed(blocks):
        c.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = [faults() for _ in range(3)][-1]
kept = keep_freed_memory()
print(kept, default, [faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_blocks_used_again_cost_no_page_faults():
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, default, after = run.stdout.split()
    if kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(default) > 1000
    assert int(after) < 50
