"""Runs of cells that are being computed: followed from their start, one per cell after any end, never in the way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import scale
from sweeps.core.cells import Row
from sweeps.launch.context import PackContext
from sweeps.launch.live import CURVE_SECONDS, Curves, Live, Load, Point
from sweeps.launch.tracking import Plan, Tracker
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from tests.sweeps.mlflow_runs import runs_of_cells

Make = Callable[..., Tracker]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with empty tables, which takes seconds to make."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(str(tmp_path / "ledger"), "scale", "1")


@pytest.fixture
def make(ledger: Ledger, tmp_path: Path, database: Path) -> Make:
    """A tracker of another launch each time; its thread is not started, so that a test says what happens when."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(database, tmp_path / "mlflow.db")

    def tracker(said: list[str] | None = None, n: int = 3, kind: type[Tracker] = Tracker) -> Tracker:
        lines = [] if said is None else said
        made = kind(uri, ledger, Claims(ledger.store), artifact_mb=1.0, say=lines.append)
        made._cells = {cell.key: cell for cell in scale.cells_of(n)}
        made.live.plan(made._cells)
        made._plan = Plan(made._cells, list(made._cells))
        made._grid = made._plan.grid_name
        return made

    return tracker


def keys_of(n: int = 3) -> list[str]:
    return [cell.key for cell in scale.cells_of(n)]


def follow(tracker: Tracker, **news: Any) -> None:
    """What the thread does once it has heard this."""
    tracker.live.hear(news)
    tracker._open()
    tracker._follow_at = 0.0
    tracker._follow()


def statuses(tracker: Tracker) -> dict[str, str]:
    """{key: status}, after checking that no cell has two runs."""
    runs = runs_of_cells(tracker.uri, "scale")
    keys = [run.data.tags["plumbline.cell_key"] for run in runs]
    assert len(set(keys)) == len(keys)
    return {run.data.tags["plumbline.cell_key"]: run.info.status for run in runs}


def run_of(tracker: Tracker, key: str) -> Any:
    (run,) = [r for r in runs_of_cells(tracker.uri, "scale") if r.data.tags["plumbline.cell_key"] == key]
    return run


def test_a_run_exists_from_the_cells_start_and_becomes_final(make: Make, ledger: Ledger) -> None:
    key, other, _ = keys_of()
    tracker = make()
    follow(tracker, begun=[key, "not planned"], points=[[key, "live/loss", 2.5, 4, 1_700_000_000_000]])
    tracker.live.hear({"points": [["not planned", "live/loss", 1.0, 1, 1]], "failures": [["not planned", "no"]]})
    assert tracker.live.points_of(["not planned"]) == {}
    run = run_of(tracker, key)
    assert run.info.status == "RUNNING"
    assert run.data.params == {name: str(v) for name, v in tracker._cells[key].identity().items()}
    assert run.data.metrics == {"live/loss": 2.5}
    follow(tracker, points=[[key, "live/loss", 2.0, 8, 1_700_000_010_000], [other, "live/loss", 9.0, 1, 1]])
    (first, second) = tracker._client.get_metric_history(run.info.run_id, "live/loss")
    assert [(p.value, p.step, p.timestamp) for p in (first, second)][1] == (2.0, 8, 1_700_000_010_000)
    scale.fill(ledger, scale.cells_of(1))
    tracker.want([key])
    tracker.live.hear({"points": [[key, "live/loss", 1.5, 12, 1_700_000_020_000]]})
    assert tracker.finish("FINISHED", {}, [])
    final = run_of(tracker, key)
    assert (final.info.run_id, final.info.status) == (run.info.run_id, "FINISHED")
    assert final.data.metrics["live/loss"] == 1.5  # what was on its way when the cell was published
    plain = {name: value for name, value in final.data.metrics.items() if "/" not in name}
    assert plain == ledger.read(key).numbers()
    assert tracker.run_ids == {key: run.info.run_id}
    assert statuses(tracker) == {key: "FINISHED"}  # `other` was never begun
    tracker.claims.release()


def test_what_ends_unfinished_is_killed_and_taken_up_by_the_next_launch(make: Make, ledger: Ledger) -> None:
    key, _, _ = keys_of()
    first = make()
    follow(first, begun=[key])
    run_id = run_of(first, key).info.run_id
    assert first.finish("KILLED", {}, [])  # Ctrl-C
    assert statuses(first) == {key: "KILLED"}
    first.claims.release()
    second = make()
    follow(second, begun=[key])
    assert statuses(second) == {key: "RUNNING"}
    assert run_of(second, key).data.tags["plumbline.launch"] == second.claims.launch_id
    second.claims._stop.set()  # kill -9: nothing is ended, and its lease is gone
    second.ledger.store.remove_file(f"_claims/launches/{second.claims.launch_id}.json")
    third = make()
    third._open()
    assert statuses(third) == {key: "KILLED"}
    scale.fill(ledger, scale.cells_of(1))  # published by the one that was killed, or since
    third.want([key])
    assert third.finish("FINISHED", {}, [])
    assert run_of(third, key).info.run_id == run_id
    assert statuses(third) == {key: "FINISHED"}
    third.claims.release()


def test_a_failed_cell_has_a_failed_run_until_it_is_computed(make: Make, ledger: Ledger) -> None:
    key, silent, _ = keys_of()
    tracker = make()
    follow(tracker, begun=[key])
    follow(tracker, failures=[[key, "loss inf at step 3 of s3://me:secret@host/x"]])
    run = run_of(tracker, key)
    assert run.info.status == "FAILED"
    assert run.data.tags["plumbline.error"] == "loss inf at step 3 of s3://host/x"
    tracker.live.hear({"failures": [[key, "again"], [silent, "never heard of while MLflow was down"]]})
    assert tracker.finish("FAILED", {}, [])
    assert statuses(tracker) == {key: "FAILED", silent: "FAILED"}
    assert run_of(tracker, key).data.tags["plumbline.error"].startswith("loss inf")
    tracker.claims.release()
    after = make()
    follow(after, begun=[key])
    scale.fill(ledger, scale.cells_of(2))
    after.want([key, silent])
    assert after.finish("FINISHED", {}, [])
    assert statuses(after) == {key: "FINISHED", silent: "FINISHED"}
    for each in (key, silent):
        assert "plumbline.error" not in run_of(after, each).data.tags
    after.claims.release()


def test_the_launchs_run_tells_the_answer(make: Make, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"ratio/a,b direct": 1.5, "verdict/a,b": "a loop"}))
    tracker = make()
    tracker.describe(["verdict      a,b: a loop", "report       s3://me:secret@host/report.md"])
    assert tracker.finish("FINISHED", {"cells_done": 3}, [summary])
    run = tracker._client.get_run(tracker._parent)
    assert run.data.metrics == {"cells_done": 3, "ratio/a_b direct": 1.5}
    assert run.data.tags["verdict/a_b"] == "a loop"
    told = "```\nverdict      a,b: a loop\nreport       s3://host/report.md\n```"
    assert run.data.tags["mlflow.note.content"] == told
    tracker.claims.release()


def test_two_launches_at_once_make_one_run_per_cell(make: Make, ledger: Ledger) -> None:
    a, b, c = keys_of()
    one, two = make(), make()
    follow(one, begun=[a, b])
    follow(two, begun=[b, c])  # b is one's
    assert statuses(one) == {a: "RUNNING", b: "RUNNING", c: "RUNNING"}
    owners = {key: run_of(one, key).data.tags["plumbline.launch"] for key in (a, b, c)}
    assert owners == {a: one.claims.launch_id, b: one.claims.launch_id, c: two.claims.launch_id}
    scale.fill(ledger, scale.cells_of(3))
    for tracker in (one, two):
        tracker.want([a, b, c])
    assert two._drain()  # c; a and b are one's
    assert statuses(two)[c] == "FINISHED"
    assert statuses(two)[b] == "RUNNING"
    assert one.finish("FINISHED", {}, [])
    assert two.finish("FINISHED", {}, [])
    assert statuses(one) == dict.fromkeys((a, b, c), "FINISHED")
    for tracker in (one, two):
        tracker.claims.release()


def test_a_launch_that_slept_leaves_the_runs_that_another_took(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _, _ = keys_of()
    asleep, awake = make(), make()
    follow(asleep, begun=[key])
    monkeypatch.setattr(awake.claims, "alive", lambda launch: False)
    follow(awake, begun=[key])
    monkeypatch.setattr(asleep.claims, "lapses", lambda: 1)
    follow(asleep, points=[[key, "live/loss", 9.0, 1, 1]])
    asleep._end_followed()
    run = run_of(awake, key)
    assert run.data.metrics == {}
    assert (run.info.status, run.data.tags["plumbline.launch"]) == ("RUNNING", awake.claims.launch_id)
    for tracker in (asleep, awake):
        tracker.claims.release()


def test_a_grid_finds_the_cells_that_another_grid_computed(make: Make, ledger: Ledger) -> None:
    scale.fill(ledger, scale.cells_of(2))
    first, second = make(n=2), make(n=3)
    for tracker in (first, second):
        tracker.want(keys_of(2))
        assert tracker.finish("FINISHED", {}, [])
        tracker.claims.release()
    both = f"{first._grid} {second._grid}"
    assert {run_of(first, key).data.tags["plumbline.grid"] for key in keys_of(2)} == {both}
    again = make(n=3)
    again._open()
    again._client.set_tag = lambda *a: pytest.fail("written again")
    again.want(keys_of(2))
    assert again._drain()
    again.claims.release()


def test_a_store_that_does_not_answer_is_waited_for_by_nobody(make: Make) -> None:
    said: list[str] = []
    key, _, _ = keys_of()
    tracker = make(said)
    tracker.uri = "http://127.0.0.1:9"
    tracker.live = Live(room=5)
    tracker.live.plan([key])
    began = time.monotonic()
    for step in range(1000):
        tracker.live.hear({"begun": [key], "points": [[key, "live/loss", 1.0, step, step]]})
    assert time.monotonic() - began < 1.0
    assert tracker.live.dropped == 995
    assert not tracker.finish("FINISHED", {}, [])
    assert [line for line in said if "dropped" in line] == [
        "MLflow at http://127.0.0.1:9 was too slow or down: 995 points of curves (live/…) were dropped; "
        "the cells' own numbers are complete"
    ]
    tracker.claims.release()


def test_points_that_the_store_refuses_are_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _, _ = keys_of()
    tracker = make()
    follow(tracker, begun=[key])
    with monkeypatch.context() as patch:
        patch.setattr(tracker._client, "log_batch", lambda *a, **k: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            follow(tracker, points=[[key, "live/loss", 1.0, 1, 1]])
    assert tracker.live.dropped == 1
    follow(tracker, points=[[key, "live/loss", 1.0, 2, 2]])
    assert run_of(tracker, key).data.metrics == {"live/loss": 1.0}
    tracker.claims.release()


def test_following_takes_a_hundredth_of_a_core(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make()
    clock = [1000.0]
    monkeypatch.setattr("sweeps.launch.tracking.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("sweeps.launch.tracking.time.thread_time", lambda: clock[0])
    calls: list[float] = []

    def slow(self: Tracker) -> None:
        calls.append(clock[0])
        clock[0] += 0.5

    monkeypatch.setattr(Tracker, "_still_followed", slow)
    for name in ("_log_live", "_log_load"):
        monkeypatch.setattr(Tracker, name, lambda self: None)
    while clock[0] < 1100:
        tracker._follow()
        clock[0] += 0.25
    assert [round(at) for at in calls] == [1000, 1050]  # 0.5 s of each 50 s
    tracker.claims.release()


def test_a_cell_is_told_of_at_most_every_ten_seconds() -> None:
    clock = [0.0]
    curves = Curves(lambda: {"cpu": 50.0}, lambda: clock[0])
    told: list[tuple[float, list[Point]]] = []
    for step in range(300):
        clock[0] = step / 10
        values = {"loss": 1.0 - step, "val": float(step)} if step % 50 == 0 else {"loss": 1.0 - step}
        for key in ("a", "b"):
            if points := curves.add(key, step, values | {"norm": float("nan")}):
                told.append((clock[0], points))
    assert [at for at, points in told if points[0].key == "a"] == [2.0, 2.0 + CURVE_SECONDS, 2.0 + 2 * CURVE_SECONDS]
    assert len(told) == 6
    _, last = told[-1]
    assert [p[:4] for p in last] == [
        ("b", "live/loss", 1.0 - 220, 220),
        ("b", "live/val", 200.0, 200),
        ("b", "system/cpu", 50.0, 220),
    ]
    curves.drop("a")
    assert curves.add("a", 300, {"loss": 0.0}) == []  # begins anew


def test_a_step_costs_microseconds() -> None:
    """Of training steps of a millisecond, the reports of five values take less than a hundredth."""
    curves = Curves(Load("cpu"))
    values = dict.fromkeys(("loss", "norm", "rate", "lr", "dead"), 1.0)
    began = time.process_time()
    for step in range(20_000):
        curves.add("cell", step, values)
    assert (time.process_time() - began) / 20_000 < 10e-6


def test_news_reach_the_report_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.launch.live._FIRST_SECONDS", 0.0)
    from sweeps.core.settings import RunSettings

    heard: list[dict[str, Any]] = []
    context = PackContext(
        ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f", report=heard.append
    )
    first, second, _ = scale.cells_of(3)
    context.begin(first, second, phase="training")
    context.curve(first, 1, {"loss": 1.0})  # at once, but reports are a second apart
    context.fail(second, "loss inf")
    context.publish(first, [Row("x", 1.0)])
    context.progress(force=True)
    context.close()
    assert [state.get("begun") for state in heard] == [[first.key, second.key], None, None, None]
    assert [state.get("failures") for state in heard] == [None, [[second.key, "loss inf"]], None, None]
    assert [state.get("keys") for state in heard] == [None, None, [first.key], None]
    points = [point for state in heard for point in state.get("points", [])]
    assert points[0][:4] == [first.key, "live/loss", 1.0, 1]
    assert {name for _, name, *_ in points} >= {"live/loss", "system/cpu_utilization_percentage"}


def test_points_of_ray_trains_workers_reach_the_trial_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that they pass through keeps the last few hundred; what was read is not read again."""
    from sweeps.launch import workers

    kept: dict[str, bytes] = {}
    store = SimpleNamespace(
        _internal_kv_put=kept.__setitem__, _internal_kv_get=kept.get, _internal_kv_del=lambda key: kept.pop(key, None)
    )
    monkeypatch.setattr(workers, "internal_kv", store)
    monkeypatch.setattr(workers, "_POINTS", 3)
    monkeypatch.setattr(workers, "_RELAY_SECONDS", 0.01)
    heard: list[dict[str, Any]] = []
    context: Any = SimpleNamespace(progress=lambda force, **state: heard.append(state))
    board = workers._Board("board")
    with workers._relay(board, context):
        for number in range(4):
            board.put(
                {"points": [["key", "live/loss", 1.0, 2 * number + i, 0] for i in (0, 1)], "begun": [str(number)]}
            )
            while len(heard) <= number:
                time.sleep(0.005)
        board.put({"phase": "over"})
    assert [point[3] for state in heard for point in state["points"]] == list(range(8))
    assert [key for state in heard for key in state["begun"]] == ["0", "1", "2", "3"]
    assert "points_told" not in heard[-1]
    board.put({"points": [["key", "live/loss", 1.0, step, 0] for step in range(9)]})
    assert [point[3] for point in board.state()["points"]] == [6, 7, 8]
