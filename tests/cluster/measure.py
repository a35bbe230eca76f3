"""Weak scaling of the machinery on the rig: cells that sleep, on 1, 2 and 3 nodes.

    sudo .venv/bin/python tests/cluster/measure.py [--cells 6] [--seconds 5]

Each node gets the same number of cells, so the time should not grow. The cells sleep: nodes of the rig share one
machine's cores, and cells that compute could not show more than that machine has. What is left is what the machinery
costs: Ray Tune, ledger, MLflow.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from rig import ROOT, SHARED, Rig, missing_for_rig

from sweeps.ledger.ledger import Ledger


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cells", type=int, default=6, help="cells a node")
    p.add_argument("--seconds", type=float, default=5.0, help="what a cell sleeps")
    a = p.parse_args()
    if reason := missing_for_rig():
        print(reason, file=sys.stderr)
        return 1
    print(f"{a.cells} cells a node, each sleeping {a.seconds:g} s: ideally {a.cells * a.seconds:g} s")
    print("nodes  first to last cell  extra s a cell  of a 1-minute cell")
    with tempfile.TemporaryDirectory(prefix="plumbline-rig-") as folder:
        for nodes in (1, 2, 3):
            with Rig(Path(folder, str(nodes)), workers=nodes - 1) as rig:
                span, extra = run(rig, nodes, a.cells, a.seconds)
            print(f"{nodes:5}  {span:16.1f} s  {extra:14.2f}  {extra / 60:18.1%}", flush=True)
    return 0


def run(rig: Rig, nodes: int, cells: int, seconds: float) -> tuple[float, float]:
    """(seconds from the start of the first cell to the publication of the last, median extra seconds between cells)."""
    for name in rig.names:
        shutil.copytree(ROOT / "sweeps", rig.folder / name / "home" / "plumbline" / "sweeps")
        shutil.copy(ROOT / "tests" / "sweeps" / "toy_sweep.py", rig.folder / name / "home" / "plumbline")
    grid = ",".join(str(n) for n in range(cells * nodes))
    command = (
        f"cd ~/plumbline && RAY_worker_niceness=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 ray symmetric-run "
        f"--address {rig.address['head']}:6379 --min-nodes {nodes} --num-cpus=1 --object-store-memory=100000000 -- "
        f"python toy_sweep.py --address auto --storage file+shared://{SHARED}/ledger "
        f"--set n={grid} --set pack_size=1 --set seconds={seconds}"
    )
    with open(rig.folder / "run.log", "wb") as log:
        popens = [rig.start(command, on=name, stdout=log, stderr=log) for name in rig.names]
        popens[0].wait()  # the workers end without help a minute after the head
    ledger = Ledger(str(rig.shared / "ledger"), "toy", "1")
    done = ledger.done()
    assert len(done) == cells * nodes, (rig.folder / "run.log").read_text()[-4000:]
    ends = defaultdict(list)
    begins = []
    for cell in ledger.read_many(sorted(done)):
        ends[cell.meta["node"]].append(cell.meta["published_unix"])
        begins.append(cell.meta["published_unix"] - cell.meta["pack_seconds"])
    gaps = [b - a - seconds for times in ends.values() for a, b in zip(sorted(times), sorted(times)[1:], strict=False)]
    return max(max(t) for t in ends.values()) - min(begins), statistics.median(gaps)


if __name__ == "__main__":
    sys.exit(main())
