"""What the driver costs at 100,000 cells: plan, ledger scan, claims, MLflow, report reading. Results: docs/scale.md.

Each measurement is a process of its own; CPU seconds, wall seconds and peak memory are printed, and the slope of CPU
time over the number of cells in a log-log plot. Requests are counted on a model of an object store.

    python benchmarks/scale.py [--quick] [--sizes 1000,3000,10000,30000,100000] [--only plan,scan,...] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._object_store import ModelStore
from sweeps.core.cells import Cell, Row, digest
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger, rows_to_parquet
from sweeps.ledger.storage import MARKER, facts_of, marker_bytes

SIZES = (1000, 3000, 10_000, 30_000, 100_000)
NODES, GPUS_A_NODE = 1000, 8
MLFLOW_SIZES = (100, 400, 1600)


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    """A cell of the simulated ledger."""

    SWEEP: ClassVar[str] = "scale"
    VERSION: ClassVar[str] = "1"
    x: int
    model: str = "pythia-70m"
    depth: str = "mid"


def cells_of(n: int) -> list[Point]:
    """The simulated plan."""
    return [Point(x=x) for x in range(n)]


def fingerprints_of(cells: Sequence[Cell]) -> dict[str, str]:
    """The fingerprint of the simulated code and data."""
    return {cell.key: digest(["scale", cell.key]) for cell in cells}


def contents_of(cell: Point, fingerprint: str) -> dict[str, bytes]:
    """The files of a published cell: ten rows, the metadata of a real one."""
    rows = [Row(f"metric_{i}", cell.x + i / 7, "nats", {"layer": i % 3}) for i in range(10)]
    meta = {
        "key": cell.key,
        "identity": cell.identity(),
        "published_unix": 1.7e9 + cell.x,
        "fingerprint": fingerprint,
        "launch": "simulated",
        "pack": f"pack{cell.x // 12}",
        "pack_seconds": 60.0 * (1 + cell.x % 12),
        "pack_started_unix": 1.7e9 + cell.x // 12,
        "pack_share": 1.0,
        "packages": dict.fromkeys(("ray", "torch", "numpy", "mlflow", "transformers"), "1.2.3"),
        "hardware": "a processor, 64 cores, 512 GiB, 8 x an accelerator",
        "git_commit": "0" * 12,
        "files": {"rows.parquet": asdict(facts_of(table := rows_to_parquet(rows)))},
    }
    return {"cell.json": json.dumps(meta).encode(), "rows.parquet": table}


def fill(ledger: Ledger, cells: Sequence[Point]) -> None:
    """Publish the simulated cells without the ledger's own crash-safe writing, which takes minutes of fsync."""
    fingerprints = fingerprints_of(cells)
    template = contents_of(cells[0], "")
    attempt = "" if ledger.store.local else "0" * 32
    for cell in cells:
        files = template if cell.x % 100 else contents_of(cell, "")
        meta = json.loads(files["cell.json"]) | {"attempt": attempt}
        x = {"key": cell.key, "identity": cell.identity(), "fingerprint": fingerprints[cell.key]}
        pack = {"pack": f"pack{cell.x // 12}", "pack_started_unix": 1.7e9 + cell.x // 12}
        record = {"cell.json": json.dumps({**meta, **x, **pack}).encode()}
        home = f"{cell.key}/{attempt}" if attempt else cell.key
        data = {f"{home}/{name}": content for name, content in {**files, **record}.items()}
        data[f"{cell.key}/{MARKER}"] = marker_bytes(attempt, record)
        if ledger.store.local:
            Path(ledger.store.root, cell.key).mkdir(parents=True)
            for name, content in data.items():
                Path(ledger.store.root, name).write_bytes(content)
        else:
            for name, content in data.items():
                ledger.store.fs.pipe_file(ledger.store.path(name), content)


def plan(n: int, folder: Path) -> dict[str, Any]:
    """`--plan` of the proxy gap on a cluster of 1,000 nodes, screen output included."""
    from sweeps.core.machine import Machine
    from sweeps.launch import command as command_module
    from sweeps.sae.sweep import SWEEP

    cluster = Machine(
        nodes=NODES, cpus=NODES * 64, gpus=NODES * GPUS_A_NODE, memory_bytes=512 * 2**30, hardware="simulated"
    )
    seeds = ",".join(map(str, range(-(-n // 36))))
    settings = [f"seeds={seeds}", "probe=false", "gpu_memory_gb=80"]
    arguments = ["--plan", "--preset", "fast2", "--storage", str(folder / "empty")]
    arguments += [text for setting in settings for text in ("--set", setting)]
    with mock.patch.object(Machine, "here", return_value=cluster), contextlib.redirect_stdout(io.StringIO()) as out:
        code = command_module.main(SWEEP, arguments)
    assert code == 0
    lines = out.getvalue().splitlines()
    return {"cells": sum("  to do  " in line for line in lines)}


def scan(n: int, folder: Path) -> dict[str, Any]:
    """What a restart reads before it computes: which cells are done, and from which code and data."""
    cells = cells_of(n)
    fingerprints = fingerprints_of(cells)
    ledger = Ledger(str(folder / f"ledger{n}"), "scale", "1")
    done = ledger.done(fingerprints)
    ledger.compact(done)
    ledger.verify({key: fingerprints[key] for key in done})
    assert len(done) == n
    return {}


def read(n: int, folder: Path) -> dict[str, Any]:
    """Identity and rows of every cell, as the report takes them."""
    ledger = Ledger(str(folder / f"ledger{n}"), "scale", "1")
    cells = ledger.read_many([cell.key for cell in cells_of(n)])
    assert sum(len(cell.rows) for cell in cells) == 10 * n
    return {}


def claim(n: int, folder: Path) -> dict[str, Any]:
    """A launch claims all cells, a second one finds them taken, the first ends and the second takes over."""
    store = Ledger(str(folder / f"claims{n}"), "scale", "1").store
    keys = [cell.key for cell in cells_of(n)]
    first, second = Claims(store), Claims(store)
    assert len(first.claim(keys)[0]) == n
    assert len(second.claim(keys)[1]) == n
    first.release()
    assert len(second.claim(keys)[0]) == n
    second.release()
    return {}


def requests(n: int, folder: Path) -> dict[str, Any]:
    """Requests of each step on the object-store model."""
    ModelStore.clear()
    ledger = Ledger("model://bucket", "scale", "1")
    cells = cells_of(n)
    fill(ledger, cells)
    fingerprints = fingerprints_of(cells)
    out: dict[str, dict[str, int]] = {}

    def count(name: str, work: Callable[[], Any]) -> None:
        ModelStore.requests.clear()
        work()
        out[name] = dict(ModelStore.requests)

    def restart() -> None:
        fresh = Ledger("model://bucket", "scale", "1")
        done = fresh.done(fingerprints)
        fresh.compact(done)
        fresh.verify({key: fingerprints[key] for key in done})
        assert len(done) == n

    count("restart without index", restart)
    count("restart with index", restart)
    count("report reading", lambda: Ledger("model://bucket", "scale", "1").read_many(fingerprints))
    claims = Claims(ledger.store)
    count("claim", lambda: claims.claim(fingerprints))
    count("release", claims.release)
    return {"requests": out}


def mlflow_sqlite(n: int, folder: Path) -> dict[str, Any]:
    """Copy the cells of a ledger into an SQLite store."""
    return _track(n, folder, f"sqlite:///{folder}/mlflow{n}.db")


def mlflow_server(n: int, folder: Path) -> dict[str, Any]:
    """Copy the cells of a ledger to an MLflow server on this machine (on SQLite)."""
    with _server(folder / f"server{n}") as uri:
        return _track(n, folder, uri)


def _track(n: int, folder: Path, uri: str) -> dict[str, Any]:
    from sweeps.launch.tracking import Tracker

    ledger = Ledger(str(folder / f"track{n}"), "scale", "1")
    cells = cells_of(n)
    if not ledger.done():
        fill(ledger, cells)
    said: list[str] = []
    claims = Claims(ledger.store)
    tracker = Tracker(uri, ledger, claims, artifact_mb=64, say=said.append)
    tracker.start({"cells": n}, {})
    began = time.perf_counter()
    tracker.want([cell.key for cell in cells])
    assert tracker.finish("FINISHED", {}, []), said
    copied = time.perf_counter() - began
    claims.release()
    again = Claims(ledger.store)
    tracker = Tracker(uri, ledger, again, artifact_mb=64, say=said.append)
    tracker.start({"cells": n}, {})
    began = time.perf_counter()
    tracker.want([cell.key for cell in cells])
    assert tracker.finish("FINISHED", {}, []), said
    found = time.perf_counter() - began
    again.release()
    return {"cells_per_second": n / copied, "known_cells_per_second": n / found}


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    import socket
    import urllib.request

    folder.mkdir(parents=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


STEPS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    f.__name__: f for f in (plan, scan, read, claim, requests, mlflow_sqlite, mlflow_server)
}


def measure(step: str, n: int, folder: Path) -> dict[str, Any]:
    """One step in this process; times exclude the imports that every launch pays once."""
    if step == "plan":
        import sweeps.sae.sweep  # noqa: F401
    wall, cpu = time.perf_counter(), time.process_time()
    out = STEPS[step](n, folder)
    used = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return {**used, "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **out}


def child(step: str, n: int, folder: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", step, str(n)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env)
    if done.returncode:
        raise RuntimeError(f"{step} of {n} cells failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Least-squares slope of log seconds over log cells."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    """Print one table per step."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("--quick", action="store_true", help="small sizes")
    p.add_argument("--sizes", default=",".join(map(str, SIZES)))
    p.add_argument("--only", default="plan,claim,ledger,requests,mlflow")
    p.add_argument("--folder", default="")
    p.add_argument("--measure", nargs=2)
    a = p.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure[0], int(a.measure[1]), Path(a.folder))))
        return
    sizes = [300, 1000, 3000] if a.quick else [int(s) for s in a.sizes.split(",")]
    folder = Path(a.folder or tempfile.mkdtemp(prefix="plumbline-scale-"))
    chosen = a.only.split(",")
    try:
        for step in ("plan", "claim"):
            if step in chosen:
                table(step, sizes, [child(step, n, folder) for n in sizes])
        if "ledger" in chosen:
            ledgers(sizes, folder)
        if "requests" in chosen:
            for n in sizes:
                for name, counts in child("requests", n, folder)["requests"].items():
                    print(
                        f"requests  {n:7} cells  {name:22} " + " ".join(f"{k} {v}" for k, v in sorted(counts.items()))
                    )
        if "mlflow" in chosen:
            for step in ("mlflow_sqlite", "mlflow_server"):
                some = [100, 200] if a.quick else list(MLFLOW_SIZES)
                got = [child(step, n, folder) for n in some]
                table(step, some, got)
                further = np.polyfit(some, [g["cpu"] for g in got], 1)[0]
                print(f"  {1000 * further:.1f} ms of CPU a further cell, copied once and found again")
                for n, g in zip(some, got, strict=True):
                    print(
                        f"  {n} cells: {g['cells_per_second']:.1f} copied/s, {g['known_cells_per_second']:.0f} known/s"
                    )
    finally:
        if not a.folder:
            shutil.rmtree(folder, ignore_errors=True)


def ledgers(sizes: Sequence[int], folder: Path) -> None:
    """Scans and report reading on local folders, without the index and with it."""
    got: dict[str, list[dict[str, Any]]] = {"scan without index": [], "scan with index": [], "read": []}
    for n in sizes:
        ledger = Ledger(str(folder / f"ledger{n}"), "scale", "1")
        if not ledger.done():  # --folder keeps them, since writing 100,000 folders takes longer than all else
            fill(ledger, cells_of(n))
        shutil.rmtree(Path(ledger.store.root, "_index"), ignore_errors=True)
        got["scan without index"].append(child("scan", n, folder))
        got["scan with index"].append(child("scan", n, folder))
        got["read"].append(child("read", n, folder))
    for name, results in got.items():
        table(name, sizes, results)


def table(name: str, sizes: Sequence[int], results: Sequence[dict[str, Any]]) -> None:
    """One line per size, and the slope."""
    print(f"{name}: log-log slope of CPU time {slope(sizes, [r['cpu'] for r in results]):.2f}")
    for n, r in zip(sizes, results, strict=True):
        print(
            f"  {n:7} cells  CPU {r['cpu']:7.2f} s  wall {r['wall']:7.2f} s  peak {r['rss_mib']:6.0f} MiB", flush=True
        )


if __name__ == "__main__":
    main()
