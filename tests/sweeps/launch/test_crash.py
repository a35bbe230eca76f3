"""A worker that Ray kills for its memory, or that dies, is one line with a remedy, and costs nothing finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sweeps.core.cells import Cell, Pack, Row, UserError, digest
from sweeps.core.settings import RunSettings
from sweeps.core.world import World
from sweeps.launch import tune
from sweeps.launch.context import PackContext, Place
from sweeps.launch.failure import death, last_failure
from sweeps.launch.same_code import OTHER_CODE
from sweeps.ledger.ledger import Ledger

TOY = Path(__file__).parents[1] / "toy_sweep.py"
MEMORY = """ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. \
Memory on the node (IP: 10.0.0.2, ID: 0fb4dc8e) was 22.90GB used / 23.54GB limit (0.972812)
OOM kill reason: Memory usage 24588734336B exceeded threshold of 24012676915B (95.0% of 25276502016B limit)
Object store memory usage: [- objects spillable: 3
]
Top 10 memory users: PID	MEM(GB)	COMMAND
14686	0.90	ray::RayTrainWorker
Refer to the documentation on how to address the out of memory issue."""
DEAD = """The actor died unexpectedly before finishing this task.
	class_name: ResourceTrainable
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) kill"""


def pack(cells: int = 1, workers: int = 0, cpus: float = 1.0) -> Pack:
    return Pack(name="p", cells=tuple(Cell() for _ in range(cells)), workers=workers, cpus=cpus)


@pytest.mark.parametrize(
    ("which", "remedy"),
    [
        (pack(cells=7), "--set cells_per_pack=3,"),
        (pack(cells=2, workers=4), "--set workers=2,"),
        (pack(cpus=4), "--set threads=8 "),
    ],
)
def test_memory_line_has_value_rule_and_remedy(which: Pack, remedy: str) -> None:
    line = death(f"Traceback (most recent call last):\n  File x\n{MEMORY}", which)
    assert line is not None
    assert "\n" not in line
    assert "node 10.0.0.2 used 22.90GB of 23.54GB memory (97%) and Ray kills above 95%" in line
    assert remedy in line


def test_other_words_of_ray_for_memory_still_give_the_remedy() -> None:
    line = death("Task was killed due to the node running low on memory.", pack(cells=4))
    assert line is not None
    assert "memory ran out" in line
    assert "cells_per_pack=2" in line


def test_a_death_is_told_from_an_error() -> None:
    assert death(DEAD, pack()) == ("its worker died (Worker unexpectedly exits with a connection error code 2)")
    assert death("ray.exceptions.RayTaskError(RuntimeError): ray::Listening.train()\nRuntimeError: x", pack()) is None
    assert death(f"Traceback (most recent call last):\n{DEAD}\nRuntimeError: a data task's", pack()) is None


def test_the_death_of_one_of_several_workers_is_the_reason() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    from ray.train.v2.api.exceptions import WorkerGroupError

    from sweeps.launch.workers import _reason

    killed = WorkerHealthCheckFailedError("A worker health check failed.", failure=OutOfMemoryError(MEMORY))
    failures = {0: RuntimeError("gloo: connection closed by peer"), 1: killed}
    assert _reason(WorkerGroupError("two workers failed", failures), pack(workers=2)).startswith(
        "Ray killed its worker, since node 10.0.0.2 used 22.90GB"
    )
    del failures[1]
    assert _reason(WorkerGroupError("one failed", failures), pack(workers=2)) == (
        "RuntimeError: gloo: connection closed by peer"
    )


def test_the_newest_failure_of_a_file() -> None:
    old, new = "RuntimeError: first", f"OutOfMemoryError: {MEMORY}"
    text = (
        f"Failure # 1 (occurred at 2026-01-01_10-00-00)\n{old}\nFailure # 2 (occurred at 2026-01-01_10-01-00)\n{new}\n"
    )
    assert last_failure(text) == new
    assert last_failure(text.split("Failure # 2")[0]) == old
    assert last_failure("") == ""


def test_losses_of_a_worker_count_since_the_last_progress() -> None:
    from ray.tune.experiment import Trial

    board = SimpleNamespace(say=lambda line: None, update=lambda name, state, cells: None)
    packs = {"p": Pack(name="p", cells=())}
    callback = tune._board_callback(tune._Attempts(cast("Any", board), packs, lambda news: None, {}, max_retries=2))
    life = SimpleNamespace(num_failures=0)
    trial = cast("Any", SimpleNamespace(config={"pack": "p"}, max_failures=2, num_failures=0, run_metadata=life))

    def lost(place: str) -> bool:
        callback.on_trial_result(1, [], trial, {"progress": {"published": 0, **({"reached": place} if place else {})}})
        life.num_failures = trial.num_failures = trial.num_failures + 1
        return Trial.should_recover(trial)

    assert [lost(f"cell {step}") for step in (10, 20, 30, 40)] == [True] * 4
    assert [lost(place) for place in ("cell 40", "", "")] == [True, False, False]  # with that at 40, three without


def test_ends_of_workers_count_since_the_last_progress() -> None:
    from ray.train.v2.api.config import FailureConfig
    from ray.train.v2.api.exceptions import WorkerGroupError

    from sweeps.launch.workers import _SinceProgress

    places = iter(["", "a 10", "a 20", "a 30", "a 40", "", "a 40"])
    policy = _SinceProgress(FailureConfig(max_failures=2), lambda: next(places))
    decisions = [policy.make_decision(WorkerGroupError("died", {0: RuntimeError()})).name for _ in range(7)]
    assert decisions == ["RETRY"] * 6 + ["RAISE"]


def test_a_checkpoint_that_is_further_is_progress(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    ledger = Ledger(str(tmp_path), "toy", "1")

    def attempt() -> PackContext:
        return PackContext(
            ledger,
            RunSettings(),
            threads=1,
            device="cpu",
            fingerprint=lambda _: "f",
            report=told.append,
            place=Place(pack="p"),
        )

    for step in (10, 10, 5, 20):
        context = attempt()
        context.work.save("cell", step, {"step": step})
        context.work.save("cell", step, {"step": step}, "best")
        context.progress(force=True)
    reached = [state["reached"] for state in told if "reached" in state]
    assert list(dict.fromkeys(reached)) == ["cell 10", "cell 20"]
    context = attempt()
    context.publish(Cell(), [Row("x", 1.0)])
    assert told[-1]["reached"] == Cell().key


@pytest.mark.parametrize(
    ("error", "line", "refused"),
    [
        (UserError("k=9 exceeds 8; choose k <= 8"), "k=9 exceeds 8; choose k <= 8", False),
        (KeyError("lr"), "KeyError: 'lr'", False),
        (
            RuntimeError(f"ray::x()\na worker on node7 {OTHER_CODE}: a, b"),
            f"a worker on node7 {OTHER_CODE}: a, b",
            True,
        ),
        (ValueError(f"a worker on node7 {OTHER_CODE}: a, b"), f"a worker on node7 {OTHER_CODE}: a, b", True),
        (RuntimeError("CUDA error"), None, False),
        (OSError(28, "No space left on device"), None, False),
    ],
)
def test_a_trial_and_a_worker_settle_errors_alike(
    tmp_path: Path, error: Exception, line: str | None, refused: bool
) -> None:
    from sweeps.launch.workers import _outcome

    def work() -> None:
        raise error

    said: list[str] = []
    board = cast("Any", SimpleNamespace(fail=said.append))
    ledger, cell = Ledger(str(tmp_path), "toy", "1"), Cell()
    context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda _: "f")
    if line is None:
        for attempt in (lambda: tune._run_cells(work, [cell], context), lambda: _outcome(work, World(), board)):
            with pytest.raises(type(error)) as raised:
                attempt()
            assert raised.value is error
        assert (said, ledger.failures([cell.key])) == ([], {})
        return
    assert tune._run_cells(work, [cell], context) == (line if refused else "")
    assert [str(f["error"]) for f in ledger.failures([cell.key]).values()] == ([] if refused else [line])
    assert _outcome(work, World(), board) == "failed"
    assert said == [line]


@pytest.mark.slow
def test_ray_kills_a_trial_for_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own monitor kills, since any machine uses more than a thousandth of its memory."""
    monkeypatch.syspath_prepend(str(TOY.parent))
    from toy_sweep import Square

    ledger = Ledger(str(tmp_path / "runs/ledger"), "toy", "1")
    for n in (1, 2):
        cell = Square(n=n)
        meta = {"fingerprint": digest([cell.key, ""]), "published_unix": 1.7e9}
        ledger.publish(cell, [Row("square", n**2)], {}, meta)
    env = os.environ | {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    asked = ["--set", "n=1,2,3", "--set", "max_retries=1", "--set", f"scratch={tmp_path}"]
    run = subprocess.run(
        [sys.executable, str(TOY), *asked], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stdout + run.stderr
    assert run.stdout.count("pack0: Ray killed its worker, since node ") == 2
    assert "and Ray kills above 0.1%; run fewer packs at once with --set threads=2" in run.stdout
    assert "crashed (attempt 1); a retry" in run.stdout
    assert "crashed 2 times and is given up" in run.stdout
    assert "2/3 published" in run.stdout
    assert ledger.done() == {Square(n=1).key, Square(n=2).key}
    (record,) = ledger.failures([Square(n=3).key]).values()
    assert record["error"].startswith("Ray killed its worker")
