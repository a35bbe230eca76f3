"""Faults at chosen file operations of a process, and a wrong clock. Standard library only.

An audit hook (PEP 578) sees every open, rename, link, removal and listing before it happens, so a process can be
killed right before its n-th one, or the operation can fail or take long, and the code under test knows nothing of it.
Operations that are no file's (requests to an object store, calls to MLflow) are announced by `plumbline.operation`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR
_OPERATIONS = {  # audit event: (name, which of its arguments is the path)
    "open": ("open", 0),
    "os.rename": ("rename", 1),
    "os.link": ("link", 1),
    "os.remove": ("remove", 0),
    "os.mkdir": ("mkdir", 0),
    "os.rmdir": ("rmdir", 0),
    "os.listdir": ("list", 0),
    "os.scandir": ("list", 0),
    "shutil.rmtree": ("rmtree", 0),
}
CHANGES = r"^(write|rename|link|remove|rmtree|put|delete) (?!.*/_claims/launches/)"  # leases are renewed by the clock


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at operations whose text, `OPERATION PATH`, matches `on`.

    do: "kill" (SIGKILL, before the operation), "torn" (the file gets some bytes, then SIGKILL), "stop" (SIGSTOP),
    "error" (OSError with `errno`), "slow" (sleeps `seconds`), "note" (nothing, but counted).
    first: the first matching operation of a process that is hit. times: how many are hit, in all processes together;
    0: every one. role: "worker" (of Ray), "driver", or "" for both.
    """

    do: str
    on: str = CHANGES
    first: int = 1
    times: int = 1
    errno: int = 0
    seconds: float = 0.0
    role: str = ""


def save(file: Path, *, roots: Sequence[Path], faults: Sequence[Fault], clock: float = 0.0) -> None:
    """Write what `arm` reads. roots: folders whose files count. clock: seconds that `time.time` runs ahead."""
    log = file.with_suffix(".hits")
    log.mkdir(exist_ok=True)
    plan = {"roots": [str(r) for r in roots], "faults": [vars(f) for f in faults], "clock": clock, "log": str(log)}
    file.write_text(json.dumps(plan))


def hits(file: Path) -> list[str]:
    """The operations hit so far, in no particular order."""
    return [p.read_text() for p in sorted(file.with_suffix(".hits").iterdir())]


def arm(file: str) -> None:
    """Install the hook and the clock in this process; nothing happens where the file does not exist."""
    try:
        plan = json.loads(Path(file).read_text())
    except FileNotFoundError:
        return
    if plan["clock"]:
        true_time = time.time
        time.time = lambda: true_time() + plan["clock"]
    worker = any("default_worker.py" in a for a in sys.orig_argv)
    faults = [Fault(**f) for f in plan["faults"]]
    points = [_Point(i, f, Path(plan["log"])) for i, f in enumerate(faults) if f.role in ("", _role(worker))]
    if points:
        sys.addaudithook(_Hook(tuple(plan["roots"]), points))


def _role(worker: bool) -> str:
    return "worker" if worker else "driver"


class _Hook:
    def __init__(self, roots: tuple[str, ...], points: list[_Point]) -> None:
        self.roots, self.points = roots, points
        self.inside = threading.local()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self.inside, "now", False):
            return
        if event == "plumbline.operation":
            operation, path = arguments[0], ""
        elif event in _OPERATIONS:
            name, place = _OPERATIONS[event]
            path = arguments[place]
            if not isinstance(path, (str, os.PathLike)) or not (path := os.fspath(path)).startswith(self.roots):
                return
            if name == "open":
                name = "write" if arguments[2] & _WRITING else "read"
            operation = f"{name} {path}"
        else:
            return
        self.inside.now = True
        try:
            for point in self.points:
                point.meet(operation, path)
        finally:
            self.inside.now = False


class _Point:
    """One fault in one process."""

    def __init__(self, number: int, fault: Fault, log: Path) -> None:
        self.number, self.fault, self.log = number, fault, log
        self.on = re.compile(fault.on)
        self.seen = 0

    def meet(self, operation: str, path: str) -> None:
        if not self.on.search(operation):
            return
        self.seen += 1
        if self.seen < self.fault.first or not self._take(operation):
            return
        match self.fault.do:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "torn":
                with contextlib.suppress(OSError):
                    if operation.startswith("write "):
                        Path(path).write_bytes(b"\x93torn" * 100)
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.2)  # the process stops a moment later; this thread must not start the operation
            case "slow":
                time.sleep(self.fault.seconds)
            case "error":
                raise OSError(self.fault.errno, os.strerror(self.fault.errno), path)

    def _take(self, operation: str) -> bool:
        """Take one of the fault's `times`, noting the operation in the log."""
        for i in range(self.fault.times or 1):
            try:
                with open(self.log / f"{self.number}-{i}", "x") as f:
                    f.write(f"{self.fault.do} #{self.seen} {operation}")
                return True
            except FileExistsError:
                continue
        return not self.fault.times
