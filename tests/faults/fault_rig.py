"""Launches that a test may kill: their processes, the faults armed in them, and a record of what was survived."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

sys.path.insert(0, str(Path(__file__).with_name("site")))

import faultpoints
from faultpoints import Fault

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(__file__).with_name("site")
MARK = "PLUMBLINE_FAULT_MARK"
SEED = int(os.environ.get("PLUMBLINE_FAULT_SEED", "0"))
PATIENCE = 300.0  # seconds: machines that run tests are busy
_T = TypeVar("_T")


def schedule(case: str) -> random.Random:
    """The random generator of a case."""
    return random.Random(f"{SEED} {case}")


def wait_for(what: Callable[[], _T], seconds: float = PATIENCE, pause: float = 0.02) -> _T:
    """The first true value of `what()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(pause)
    raise AssertionError(f"waited {seconds:.0f} s in vain")


@dataclass(frozen=True)
class Injection:
    """One fault that was survived. seconds: until the work continued, NaN where that is not defined."""

    fault: str
    how: str
    sweep: str
    seconds: float = float("nan")


@dataclass
class Survived:
    """What a test injected and saw survived; each injection is also appended to the file $PLUMBLINE_FAULT_RECORD.

    note: takes each injection, as a dict; by it they reach the summary from whatever process ran the test.
    """

    note: Callable[[dict[str, object]], None]

    def add(self, fault: str, how: str, sweep: str, *, n: int = 1, seconds: float = float("nan")) -> None:
        """Record `n` injections of one kind, after checking all that must hold after them."""
        for _ in range(n):
            self.note(vars(Injection(fault, how, sweep, seconds)))
        if file := os.environ.get("PLUMBLINE_FAULT_RECORD"):
            with open(file, "a") as f:
                f.write((json.dumps(vars(Injection(fault, how, sweep, seconds)) | {"seed": SEED}) + "\n") * n)


def table(injections: Sequence[Injection]) -> list[str]:
    """Markdown: one line per (fault, how)."""
    groups: dict[tuple[str, str], list[Injection]] = {}
    for i in injections:
        groups.setdefault((i.fault, i.how), []).append(i)
    lines = [
        "| fault | how it is injected | sweeps | injections survived | work goes on after |",
        "|---|---|---|---|---|",
    ]
    for (fault, how), some in sorted(groups.items()):
        sweeps = ", ".join(sorted({i.sweep for i in some}))
        times = sorted({i.seconds for i in some if i.seconds == i.seconds})
        after = f"{times[0]:.0f} to {times[-1]:.0f} s" if len(times) > 1 else f"{times[0]:.0f} s" if times else ""
        lines.append(f"| {fault} | {how} | {sweeps} | {len(some)} | {after} |")
    return [*lines, f"| all | | | {len(injections)} | |"]


def main() -> None:
    """Print the table of a record: `python tests/faults/fault_rig.py RECORD`."""
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    for record in records:
        del record["seed"]
    print("\n".join(table([Injection(**record) for record in records])))


class Launches:
    """Command lines of one test in one folder; every process below them carries the test's mark."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.plan = folder / "faults-0.json"
        self._plans = 0
        kept = {k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "PYTHONPATH")}
        self.env = kept | {
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "disabled",  # a head that finds a token in the user's home would demand it
            "PYTHONPATH": str(SITE),
            MARK: self.mark,
            **env,
        }
        self.started: list[subprocess.Popen[str]] = []

    def arm(self, *faults: Fault, clock: float = 0.0, roots: Sequence[Path] = ()) -> None:
        """Faults of the processes started from now on; none: a healthy machine."""
        self._plans += 1
        self.plan = self.folder / f"faults-{self._plans}.json"
        faultpoints.save(self.plan, roots=roots or [self.folder / "runs" / "ledger"], faults=faults, clock=clock)

    def hits(self) -> list[str]:
        """Operations hit by the faults armed last."""
        return faultpoints.hits(self.plan)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start the command; its output goes to a file."""
        with open(self.folder / f"out-{len(self.started)}.txt", "w") as out:
            launch = subprocess.Popen(
                [sys.executable, str(ROOT / "sweeps" / script), *arguments],
                cwd=self.folder,
                env=self.env | {"PLUMBLINE_FAULTS": str(self.plan)} | env,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.started.append(launch)
        return launch

    def run(self, script: str, *arguments: str, code: int = 0) -> str:
        """Run the command to its end; returns its output."""
        launch = self.start(script, *arguments)
        got = launch.wait(2 * PATIENCE)
        assert got == code, f"exit code {got}, not {code}\n{self.output()}"
        return self.output()

    def output(self, number: int = -1) -> str:
        """The output of a command."""
        return (self.folder / f"out-{number % len(self.started)}.txt").read_text()

    def processes(self, name: str = "") -> list[psutil.Process]:
        """All living processes of this test, or those whose command line holds `name`."""
        return list(marked(self.mark, name))

    def worker(self) -> psutil.Process | None:
        """A process of Ray that does a pack's work."""
        found = self.processes("ray::RayTrainWorker") or self.processes("ray::ResourceTrainable.train")
        return found[0] if found else None

    def gone(self, seconds: float = PATIENCE) -> float:
        """Wait until no process of this test is left; returns how long that took."""
        began = time.monotonic()
        wait_for(lambda: not self.processes(), seconds, pause=0.25)
        return time.monotonic() - began

    def close(self) -> list[str]:
        """End every process of this test; returns what had to be ended."""
        left = self.processes()
        names = [command_of(p) for p in left]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for launch in self.started:
            launch.wait()
        return names


def marked(mark: str, name: str = "") -> Iterator[psutil.Process]:
    """Living processes that carry the mark in their environment."""
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(MARK) != mark:
                continue
            if name in command_of(process):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def command_of(process: psutil.Process) -> str:
    """Command line of a process, or an empty text."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    """kill -9."""
    os.kill(process.pid, signal.SIGKILL)


def said(seed_case: str, events: Sequence[object]) -> str:
    """The line for a case that fails: its seed and its schedule."""
    return f"seed {SEED}, case {seed_case}: {json.dumps([str(e) for e in events])}"


if __name__ == "__main__":
    main()
