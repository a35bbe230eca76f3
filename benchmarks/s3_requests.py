"""Requests to S3 per cell, and per second while nothing happens. Results: docs/scale.md.

S3 is moto's server in this process, which s3fs talks to over HTTP; every request is counted there. The toy sweep of
the tests runs by its real command line, but its packs in this process instead of on Ray. Numbers per cell are
differences between two sizes of grid, so that they leave out what a launch costs once.

    python benchmarks/s3_requests.py [--quick]
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "sweeps")]

BUCKET = "plumbline"
SIZES = 8, 24  # cells; few enough that a launch looks at each marker instead of listing
WAITING = 32  # cells that another launch holds


class Counting:
    """A WSGI application before another one: counts its requests by what S3 charges for."""

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        lists = method == "GET" and "list-type" in query
        self.counts["LIST" if lists else "DELETE" if method == "POST" else method] += 1
        return self._app(environ, start_response)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The S3 server; yields the URI of a bucket."""
    from moto.moto_server import threaded_moto_server as moto

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints a line per request
    plain = moto.DomainDispatcherApplication
    with mock.patch.object(moto, "DomainDispatcherApplication", lambda *a: Counting(plain(*a))):
        running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
    host, port = running.get_host_and_port()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    import fsspec

    fsspec.filesystem("s3").mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    running.stop()


def in_process(job: Any, queue: Any, board: Any, heard: Callable[[dict[str, Any]], None]) -> dict[str, str]:
    """Stands in for `run_packs`: the packs one by one, in this process."""
    from sweeps.launch.tune import run_one

    def report(result: dict[str, Any]) -> None:
        heard(result["progress"])

    while (pack := queue.next()) is not None:
        run_one(job, pack, report)
    return {}


def launch(
    storage: str, folder: Path, cells: int, packs: Callable[..., dict[str, str]] = in_process, code: int = 0
) -> Counter[str]:
    """One launch of the toy sweep, which ends with exit code `code`; returns its requests."""
    from sweeps.core.machine import Machine
    from sweeps.launch import command as command_module

    machine = Machine(nodes=1, cpus=1, gpus=0, memory_bytes=2**33, hardware="a simulated machine")
    grid = [f"n={','.join(map(str, range(cells)))}", "pack_size=1"]
    arguments = ["--storage", storage, "--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--report-dir", str(folder)]
    before = Counting.counts.copy()
    with (
        mock.patch.object(command_module, "connect", return_value=machine),
        mock.patch.object(command_module, "run_packs", packs),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        ended = command_module.main(
            importlib.import_module("toy_sweep").SWEEP, [*arguments, *(text for s in grid for text in ("--set", s))]
        )
    assert ended == code, f"exit code {ended}"
    return Counting.counts - before


def per_cell(storage: str, folder: Path) -> dict[str, dict[str, float]]:
    """{what a launch did: {request: number per cell}}; each pack checks once whether it should stop."""
    out: dict[str, dict[str, float]] = {}
    first, again = dict[int, Counter[str]](), dict[int, Counter[str]]()
    with mock.patch("sweeps.launch.stop.POLL_SECONDS", 3600.0):
        for cells in SIZES:
            place = f"{storage}/{cells}"
            first[cells] = launch(place, folder, cells)
            again[cells] = launch(place, folder, cells)
    small, large = SIZES
    for name, counts in (("computed, published, copied to MLflow", first), ("the same command again", again)):
        kinds = sorted(counts[small] | counts[large])
        out[name] = {kind: (counts[large][kind] - counts[small][kind]) / (large - small) for kind in kinds}
    out["a checkpoint is saved anew"] = checkpoint(f"{storage}/work")
    return out


def checkpoint(storage: str) -> dict[str, float]:
    """Requests of one save that replaces an older one."""
    import torch

    from sweeps.ledger.checkpoints import WorkStore
    from sweeps.ledger.storage import Store

    work = WorkStore(Store(storage))
    work.save("cell", 1, {"w": torch.zeros(8)})
    before = Counting.counts.copy()
    for step in (2, 3, 4, 5):
        work.save("cell", step, {"w": torch.zeros(8)})
    return {kind: n / 4 for kind, n in sorted((Counting.counts - before).items())}


def rate(seconds: float) -> dict[str, float]:
    """Requests per second of the background threads of this process, while this one sleeps."""
    time.sleep(1.0)
    before = Counting.counts.copy()
    time.sleep(seconds)
    return {kind: n / seconds for kind, n in sorted((Counting.counts - before).items())}


def watchers(storage: str, seconds: float, flags: Sequence[str]) -> dict[str, float]:
    """Requests per second of a worker whose pack computes and checks for these flags."""
    from sweeps.launch.stop import StopFlag
    from sweeps.ledger.storage import Store

    flag = StopFlag(Store(storage), flags)
    flag.raised()
    try:
        return rate(seconds)
    finally:
        flag.close()
        time.sleep(1.5)


def driver(storage: str, folder: Path, seconds: float, *, others: bool) -> dict[str, float]:
    """Requests per second of a launch whose packs compute, or which waits for the cells of another launch."""
    from sweeps.core.cells import Cell
    from sweeps.ledger.claims import Claims
    from sweeps.ledger.ledger import Ledger

    found: dict[str, float] = {}

    def watched(*arguments: Any) -> dict[str, str]:
        found.update(rate(seconds))
        raise KeyboardInterrupt

    def interrupting() -> None:
        time.sleep(4.0)
        found.update(rate(seconds))
        _thread.interrupt_main()

    cells: Sequence[Cell] = importlib.import_module("toy_sweep").SWEEP.plan(SimpleNamespace(n=range(WAITING)))
    holder = Claims(Ledger(storage, "toy", "1").store, lease_seconds=1e6)
    try:
        if others:
            holder.claim([cell.key for cell in cells])
            threading.Thread(target=interrupting, daemon=True).start()
        launch(storage, folder, WAITING, packs=watched, code=1)
    finally:
        holder.release()
    return found


def idle(storage: str, folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """{process: {request: number per second}}; packs are run last: threads left by them would be counted."""
    out = {
        "worker whose pack computes": watchers(f"{storage}/a", seconds, ["launch"]),
        "worker of Ray Train that computes": watchers(f"{storage}/b", seconds, ["launch", "launch-pack"]),
        "driver whose packs compute": driver(f"{storage}/c", folder, seconds, others=False),
        f"driver that waits for {WAITING} cells of another": driver(f"{storage}/d", folder, seconds, others=True),
    }
    launch(f"{storage}/e", folder, 20)
    return {"worker after 20 packs": rate(seconds), **out}


def measure(seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """All numbers, in this process."""
    with tempfile.TemporaryDirectory(prefix="plumbline-s3-") as made, server() as bucket:
        os.chdir(made)
        return {"cell": per_cell(bucket, Path(made)), "second": idle(bucket, Path(made), seconds)}


def main() -> None:
    """Print one line for each thing measured."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--quick", action="store_true", help="watch for a few seconds only")
    a = p.parse_args()
    for per, found in measure(5.0 if a.quick else 20.0).items():
        for name, counts in found.items():
            kinds = "  ".join(f"{kind} {n:.2f}" for kind, n in counts.items())
            print(f"{name:46} {sum(counts.values()):6.2f} per {per}:  {kinds}")


if __name__ == "__main__":
    main()
