"""MLflow that is down for a whole launch and back for the next, or dies in between."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_rig import PATIENCE, Survived, wait_for
from fault_sweeps import assert_tracked, results
from fault_warm import Bench, MakeBench, References
from faultpoints import Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(folder: Path, database: Path, port: int) -> Iterator[None]:
    """An MLflow server on the loopback interface."""
    (folder / "server").mkdir(exist_ok=True)
    store = folder / "server" / "mlflow.db"
    if not store.exists():
        store.write_bytes(database.read_bytes())
    with open(folder / "server.txt", "a") as out:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}"),
                *("--artifacts-destination", str(folder / "server" / "artifacts")),
                *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            ],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait_for(lambda: process.poll() is None and answers(port), pause=0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("sweep", ["odor_topology", "codec_lm"])
def test_down_for_a_whole_launch(bench: MakeBench, reference: References, survived: Survived, sweep: str) -> None:
    here = bench(sweep)
    assert here.launch(uri=f"http://127.0.0.1:{free_port()}") == 0, here.output()
    assert "does not answer" in here.output()
    assert here.launch() == 0, here.output()
    here.check(reference(sweep))
    survived.add("MLflow down", "nothing listens for a whole launch", sweep)


def test_server_comes_back_and_dies_again(
    bench: MakeBench, reference: References, survived: Survived, database: Path
) -> None:
    """Killed while one launch copies cells that another server missed, and one follows a cell that it computes."""
    here, slow = bench("odor_topology"), bench("toy", place="slow", seconds=1.0, n="0,1,2")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    assert here.launch(uri=uri) == 0, here.output()
    expected = reference("odor_topology")
    with server(here.folder, database, port):
        running, following = here.start(uri=uri), slow.start(uri=uri)
        wait_for(lambda: (here.folder / "server" / "artifacts").is_dir(), PATIENCE)  # the first cell is being copied
        wait_for(lambda: statuses(slow, uri), PATIENCE)
    assert here.wait(running, 2 * PATIENCE) == 0, here.output()
    assert slow.wait(following, 2 * PATIENCE) == 0, slow.output()
    assert "does not answer" in slow.output()
    with server(here.folder, database, port):
        for launch in (here, slow):
            assert launch.launch(uri=uri) == 0, launch.output()
        assert_tracked(here.tiny, uri, here.ledger.store.uri, expected, here.count)
        assert_tracked(slow.tiny, uri, slow.ledger.store.uri, results(slow.ledger), slow.count)
    survived.add("MLflow down", "server away, back, killed while cells are copied, back", "odor_topology", n=2)
    survived.add("MLflow down", "server killed while a cell is followed, back", "toy")


def statuses(here: Bench, uri: str = "") -> set[str]:
    """Of the cells' runs, after checking that no cell has two; nothing before the first launch has made its own."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri or here.uri)
    experiment = client.get_experiment_by_name(f"plumbline/{here.tiny.name}")
    if experiment is None:
        return set()
    runs = client.search_runs([experiment.experiment_id], "tags.`plumbline.kind` = 'cell'")
    keys = [run.data.tags["plumbline.cell_key"] for run in runs]
    assert len(set(keys)) == len(keys)
    return {run.info.status for run in runs}


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_driver_killed_while_its_cells_are_followed(bench: MakeBench, survived: Survived, at_once: int) -> None:
    """kill -9 leaves their runs open; the same command again continues them and makes no other."""
    here = bench("toy", seconds=2.0, n="0,1,2,3")
    running = [here.start() for _ in range(at_once)]
    wait_for(lambda: "RUNNING" in statuses(here), PATIENCE, pause=0.1)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        here.wait(pid)
    assert "RUNNING" in statuses(here)
    assert here.launch() == 0, here.output()
    assert statuses(here) == {"FINISHED"}
    here.check(results(here.ledger))
    survived.add("driver killed", f"kill -9 while {at_once} at once follow their cells in MLflow", "toy", n=at_once)


def test_killed_between_two_calls_about_cells_that_are_computed(bench: MakeBench, survived: Survived) -> None:
    """Each launch gets one call further than the one before it: a run without fields, open, filled but not ended, …"""
    here = bench("toy", seconds=0.7, n="0,1")
    events: list[str] = []
    for first in (3, 4, 5, 6, 7, 8, 10, 12):
        code = here.launch(Fault(do="kill", on=r"^(call|return) ", first=first))
        hit = here.launches.hits()
        assert code == (-9 if hit else 0), f"{events + hit}\n{here.output()}"
        events += hit
        statuses(here)
    assert here.launch() == 0, here.output()
    assert statuses(here) == {"FINISHED"}
    here.check(results(here.ledger))
    how = "kill -9 before the n-th call about cells that are computed"
    survived.add("process killed: following cells in MLflow", how, "toy", n=len(events))
