"""An exit that is asked for where Python cannot leave: in a callback of the garbage collector."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import signal, sys, time, weakref
from sweeps._stop import listen

signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
listen()

class Thing: ...

def gone(_):
    {trouble}
    for _ in range(100):
        pass

thing = Thing()
reference = weakref.ref(thing, gone)
del thing
print("went on", flush=True)
time.sleep({seconds})
"""


def run(trouble: str, seconds: float) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(trouble=trouble, seconds=seconds)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("trouble", ["signal.raise_signal(signal.SIGTERM)", "sys.exit(7)"])
def test_a_lost_exit_is_asked_for_again(trouble: str) -> None:
    ended = run(trouble, 50.0)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "went on\n", "")


def test_other_errors_are_still_told() -> None:
    ended = run("raise ValueError('a bug')", 0.0)
    assert ended.returncode == 0
    assert "Exception ignored" in ended.stderr
    assert "ValueError: a bug" in ended.stderr
