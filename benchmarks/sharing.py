"""Two launches on one ledger compared with one: how long a grid of equal cells takes. Results: docs/scale.md.

Real launches of the tests' toy sweep on Ray, each held to one processor core and one pack at a time, as two pods would
be. A cell sleeps, so that the launches share nothing but the storage. Needs two cores.

    python benchmarks/sharing.py [--quick] [--cells 40] [--seconds 5] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sweeps.ledger.ledger import Ledger

TOY = ROOT / "tests" / "sweeps" / "toy_sweep.py"
TARGET = 0.6  # of one launch's time


@dataclass(frozen=True)
class Timed:
    """wall_s: from the start of the commands to the end of the last. work_s: of that, from the first pack's start to
    the last publication. cells: published by each launch.
    """

    wall_s: float
    work_s: float
    cells: tuple[int, ...]


def launched(folder: Path, launches: int, arguments: list[str], env: Mapping[str, str]) -> Timed:
    """Start that many launches at once, each on its own core, on a new ledger in `folder`; wait for all."""
    folder.mkdir()
    command = [sys.executable, str(TOY), "--storage", str(folder / "ledger"), *arguments]
    began, running = time.perf_counter(), []
    for number, core in zip(range(launches), sorted(os.sched_getaffinity(0)), strict=False):
        with open(folder / f"out-{number}.txt", "w", encoding="utf-8") as out:
            process = subprocess.Popen(command, cwd=folder, env=dict(env), stdout=out, stderr=subprocess.STDOUT)
        psutil.Process(process.pid).cpu_affinity([core])  # long before it counts its cores and starts Ray
        running.append(process)
    codes = [process.wait() for process in running]
    wall_s = time.perf_counter() - began
    if any(codes):
        raise RuntimeError(
            f"exit codes {codes}:\n" + "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("out-*")))
        )
    ledger = Ledger(str(folder / "ledger"), "toy", "1")
    metas = [ledger.read(key).meta for key in ledger.done()]
    work_s = max(m["published_unix"] for m in metas) - min(m["pack_started_unix"] for m in metas)
    return Timed(wall_s, work_s, tuple(sorted(Counter(m["launch"] for m in metas).values())))


def main() -> None:
    """Print each repetition's times and ratio, and the largest ratio."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--quick", action="store_true", help="one repetition of a few short cells, which says little")
    p.add_argument("--cells", type=int, default=40)
    p.add_argument("--seconds", type=float, default=5.0, help="that a cell takes")
    p.add_argument("--repetitions", type=int, default=3)
    a = p.parse_args()
    if a.quick:
        a.cells, a.seconds, a.repetitions = 12, 1.0, 1
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("one core: two launches need two")
    grid = [f"n={','.join(map(str, range(a.cells)))}", "pack_size=1", f"seconds={a.seconds}"]
    ratios = []
    with tempfile.TemporaryDirectory(prefix="plumbline-sharing-") as made:
        tracking = f"sqlite:///{made}/mlflow.db"
        arguments = ["--tracking-uri", tracking]
        env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        launched(Path(made, "first"), 1, [*arguments, "--set", "n=0"], env)  # MLflow's tables, the page cache
        arguments += [text for setting in grid for text in ("--set", setting)]
        for repetition in range(a.repetitions):
            one, two = (launched(Path(made, f"{n}-{repetition}"), n, arguments, env) for n in (1, 2))
            ratios.append(two.wall_s / one.wall_s)
            print(
                f"one launch {one.wall_s:6.1f} s (work {one.work_s:6.1f} s)   two {two.wall_s:6.1f} s "
                f"(work {two.work_s:6.1f} s), {' + '.join(map(str, two.cells))} cells   ratio {ratios[-1]:.2f}, "
                f"of the work {two.work_s / one.work_s:.2f}",
                flush=True,
            )
    print(f"largest ratio {max(ratios):.2f}; target {TARGET} of one launch's time, for grids that outlast Ray's start")


if __name__ == "__main__":
    main()
