"""Peak memory of a piece of work: what it adds to a process that did it once before (Linux only)."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM (the peak since the last reset) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def added_peak_mib(warm_up: Callable[[], object], work: Callable[[], object]) -> float:
    """MiB by which `work` raises this process's memory at its peak, after `warm_up` and with freed memory returned."""
    warm_up()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    work()
    return resident_mib("VmHWM") - before


def in_fresh_process(argv: Sequence[str]) -> float:
    """The number on the last line that `python argv` prints: so that no allocator keeps what another arm freed."""
    answer = subprocess.run([sys.executable, *argv], capture_output=True, encoding="utf-8", check=True)
    return float(answer.stdout.split()[-1])
