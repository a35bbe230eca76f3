"""Launches without the start of Python, Ray and torch: the process of `warm_server`, and a folder to launch in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fault_rig import PATIENCE, Launches
from fault_sweeps import SWEEPS, Results, Tiny, assert_same, assert_tidy, assert_tracked, results
from faultpoints import Fault

from sweeps.ledger.ledger import Ledger

MakeBench = Callable[..., "Bench"]


class Warm:
    """The process that launches are forked from: `start` one, then `wait` for it."""

    def __init__(self, root: Path, cache: Path) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(root), str(here), str(here / "site"), str(root / "tests" / "sweeps")])
        env = os.environ | {"PYTHONPATH": path, "PLUMBLINE_CACHE": str(cache)}
        env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        for name in ("PLUMBLINE_FAULTS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
            env.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, str(here / "warm_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=root,
        )

    def _ask(self, **order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        module: str,
        arguments: Sequence[str],
        plan: Path,
        out: Path,
        lease: float = 0.0,
        cpus: int = 1,
    ) -> int:
        """Fork a launch that runs in `folder` with the faults of `plan`; returns its process id.

        lease: seconds that a lease lasts; 0: as long as ever. cpus: of the machine that it takes itself to be on.
        """
        order = {"folder": str(folder), "module": module, "arguments": list(arguments), "plan": str(plan)}
        return self._ask(do="start", out=str(out), lease=lease, cpus=cpus, **order)

    def wait(self, pid: int, seconds: float) -> int:
        """Exit code, or minus the signal that ended it; a launch that takes longer is killed and gives -1000."""
        return self._ask(do="wait", pid=pid, seconds=seconds)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class Bench:
    """A folder in which one sweep is launched again and again, by a warm process."""

    def __init__(
        self, warm: Warm, launches: Launches, tiny: Tiny, *, sources: Path, database: Path, objects: bool = False
    ) -> None:
        self.warm, self.launches, self.tiny, self.folder = warm, launches, tiny, launches.folder
        self.sources = sources
        self.storage = f"objects://{self.folder}/bucket" if objects else str(self.folder / "runs" / "ledger")
        self.count = 0
        self.uri = f"sqlite:///{self.folder}/runs/mlflow.db"
        (self.folder / "runs").mkdir(exist_ok=True)
        (self.folder / "runs" / "mlflow.db").write_bytes(database.read_bytes())

    @property
    def ledger(self) -> Ledger:
        """The ledger of the launches."""
        return self.tiny.ledger(self.storage)

    def start(
        self,
        *faults: Fault,
        clock: float = 0.0,
        uri: str = "",
        lease: float = 0.0,
        cpus: int = 1,
        more: Sequence[str] = (),
    ) -> int:
        """Start a launch with these faults armed and `more` arguments; returns its process id."""
        self.launches.arm(*faults, clock=clock, roots=[Path(self.storage.removeprefix("objects://"))])
        self.count += 1
        arguments = [*self.tiny.arguments, "--storage", self.storage, "--tracking-uri", uri or self.uri, *more]
        return self.warm.start(
            self.folder,
            self.tiny.home.removeprefix("tests.sweeps."),
            arguments,
            self.launches.plan,
            self._out(self.count),
            lease,
            cpus,
        )

    def launch(
        self, *faults: Fault, uri: str = "", seconds: float = PATIENCE, cpus: int = 1, more: Sequence[str] = ()
    ) -> int:
        """Launch with these faults armed; returns the exit code, or minus the signal that ended it."""
        return self.wait(self.start(*faults, uri=uri, cpus=cpus, more=more), seconds)

    def wait(self, pid: int, seconds: float = PATIENCE) -> int:
        return self.warm.wait(pid, seconds)

    def _out(self, number: int) -> Path:
        return self.folder / f"warm-{number}.txt"

    def output(self, back: int = 0) -> str:
        """What the last launch printed, or the launch `back` places before it."""
        return self._out(self.count - back).read_text()

    def check(self, expected: Results) -> None:
        """All that must hold once the command has ended well."""
        assert_same(results(self.ledger), expected)
        assert_tidy(self.ledger)
        assert_tracked(self.tiny, self.uri, self.ledger.store.uri, expected, self.count)


class References:
    """Results of undisturbed launches, each made once per session."""

    def __init__(self, warm: Warm, folder: Path, sources: Path, database: Path) -> None:
        self.warm, self.folder, self.sources, self.database = warm, folder, sources, database
        self._made: dict[str, Results] = {}

    def __call__(self, sweep: str) -> Results:
        if sweep not in self._made:
            folder = self.folder / sweep
            folder.mkdir()
            tiny = SWEEPS[sweep](self.sources)
            here = Bench(self.warm, Launches(folder), tiny, sources=self.sources, database=self.database)
            assert here.launch() == 0, here.output()
            found = results(here.ledger)
            here.check(found)
            self._made[sweep] = found
        return self._made[sweep]
