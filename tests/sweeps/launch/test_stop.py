"""What asks work to stop: signals, flags in the store, and exits in a callback of the garbage collector."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sweeps.launch.stop import StopFlag, Stopper
from sweeps.ledger.storage import Store

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import signal, sys, time, weakref
from sweeps.launch.stop import listen

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


def test_no_watcher_outlives_its_pack(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    asked = 0
    exists = store.exists

    def counted(name: str) -> bool:
        nonlocal asked
        asked += 1
        return exists(name)

    store.exists = counted  # type: ignore[method-assign]
    for pack in range(20):
        flag = StopFlag(store, [f"pack{pack}"])
        assert not flag.raised()
        flag.close()
    end = time.monotonic() + 5
    while any(t.name == "stop-flag" for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not [t for t in threading.enumerate() if t.name == "stop-flag"]
    assert asked == 20


def _hang_up(store: Store) -> None:
    """Close the terminal, and work on until the launch's flag is up."""
    signal.raise_signal(signal.SIGHUP)
    end = time.monotonic() + 5
    while not StopFlag(store, ["launch"]).raised() and time.monotonic() < end:
        time.sleep(0.02)
    assert StopFlag(store, ["launch"]).raised()


def test_a_closed_terminal_asks_for_the_same_as_sigterm(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    said: list[str] = []
    store, stopper = Store(str(tmp_path)), Stopper()
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        stopper.install()
        with pytest.raises(KeyboardInterrupt), stopper.asking(store, "launch", 5.0, said.append):
            _hang_up(store)
        assert stopper.terminated
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        Stopper().install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
