"""One run a cell in MLflow, with its files, also where a copy takes longer than the end of the launch may wait."""

from __future__ import annotations

import importlib
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas as pd
import pytest

from benchmarks import scale
from sweeps.core.cells import PublishedCell, UserError
from sweeps.launch.cell_runs import Run, points, run_name
from sweeps.launch.mlflow_store import default_uri, normal_uri, quoted, sqlite_file
from sweeps.launch.tracking import Tracker
from sweeps.ledger.claims import Claims
from sweeps.ledger.ledger import Ledger
from tests.sweeps.mlflow_runs import runs_of_cells


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(str(tmp_path / "o'ledger"), "scale", "1")  # a quote that the searches must survive
    scale.fill(ledger, scale.cells_of(3))
    return ledger


def tracker(ledger: Ledger, said: list[str], kind: type[Tracker] = Tracker) -> Tracker:
    folder = Path(ledger.store.root).parents[2]
    return kind(f"sqlite:///{folder}/mlflow.db", ledger, Claims(ledger.store), artifact_mb=1.0, say=said.append)


def files_of(run: Any) -> dict[str, bytes]:
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_copied_once(ledger: Ledger, uri: str) -> None:
    runs = runs_of_cells(uri, "scale")
    cells = {cell.key: cell for cell in (ledger.read(key) for key in ledger.done())}
    assert Counter(run.data.tags["plumbline.cell_key"] for run in runs) == dict.fromkeys(cells, 1)
    for run in runs:
        assert run.info.status == "FINISHED"
        key = run.data.tags["plumbline.cell_key"]
        assert files_of(run) == {name: ledger.file(key, name) for name in cells[key].files}


def assert_the_next_launch_copies_all(ledger: Ledger) -> None:
    after = tracker(ledger, [])
    after.start({}, {})
    after.want(ledger.done())
    assert after.finish("FINISHED", {}, [])
    after.claims.release()
    assert_copied_once(ledger, after.uri)


class Slow(Tracker):
    """Its first copy waits until it is told to go on."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.copying, self.go_on = threading.Event(), threading.Event()

    def _copy(self, key: str, known: Run | None, lapses: int) -> Run:
        self.copying.set()
        assert self.go_on.wait(60)
        return super()._copy(key, known, lapses)


def held_in_a_copy(ledger: Ledger, said: list[str] | None = None) -> Slow:
    """A tracker that was asked for all cells and whose thread is in its first copy."""
    slow = tracker(ledger, [] if said is None else said, Slow)
    assert isinstance(slow, Slow)
    slow.start({}, {})
    slow.want(ledger.done())
    assert slow.copying.wait(60)
    return slow


def test_texts_with_quotes_are_found_as_they_are(ledger: Ledger) -> None:
    from mlflow.utils.search_utils import SearchUtils

    for text in ("/a b/c_%d", "/o'b", "/o'b/d'e", '/x"y'):
        assert [f["value"] for f in SearchUtils.parse_search_filter(f"tags.x = {quoted(text)}")] == [text]
    both = Ledger(f"{ledger.store.root}/'\"", "scale", "1")
    with pytest.raises(UserError, match="has both ' and \" in its path"):
        Tracker("sqlite:///x.db", both, Claims(ledger.store), artifact_mb=1.0, say=print)


def test_rows_with_tracked_parameters_are_metrics_and_others_stay_in_the_ledger() -> None:
    none = float("nan")
    rows = pd.DataFrame(
        [
            ("loss", 3.0, 5.0, None, none, none),
            ("loss", 2.0, 10.0, None, none, none),
            ("nll", 1.5, none, "ema", none, none),
            ("nll", 1.25, none, "ema", 2.0, none),
            ("nll", none, none, "raw", none, none),
            ("top1", 0.5, none, None, none, 3.0),
        ],
        columns=["metric", "value", "step", "weights", "codebook", "draw"],
    )
    cell = PublishedCell("key", {}, rows, (), "uri", {})
    loss = [("loss", 3.0, 1500, 5), ("loss", 2.0, 2000, 10)]
    assert list(points(cell, 1000, 2000, ())) == loss
    with_parameters = [("nll/ema", 1.5, 2000, 0), ("nll/ema/codebook 2", 1.25, 2000, 0)]
    assert list(points(cell, 1000, 2000, ("weights", "codebook"))) == loss + with_parameters


def test_the_end_does_not_copy_what_the_thread_is_copying(ledger: Ledger) -> None:
    said: list[str] = []
    slow = held_in_a_copy(ledger, said)
    threading.Timer(1.0, slow.go_on.set).start()
    assert not slow.finish("FINISHED", {}, [], timeout=0.1)
    assert any("a copy did not end within" in line for line in said)
    assert slow._thread is not None
    slow._thread.join()
    slow.claims.release()
    after = tracker(ledger, said)
    after.start({}, {})
    after.want(ledger.done())
    assert after.finish("FINISHED", {}, [])
    after.claims.release()
    assert_copied_once(ledger, slow.uri)


def test_the_store_of_an_odd_folder_lies_in_it(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "a%20b ?x#ü %3F"
    (tmp_path / where).mkdir()
    monkeypatch.chdir(tmp_path / where)
    said: list[str] = []
    tracking = Tracker(default_uri(), ledger, Claims(ledger.store), artifact_mb=1.0, say=said.append)
    tracking.start({}, {})
    tracking.want(ledger.done())
    assert tracking.finish("FINISHED", {}, [])
    tracking.claims.release()
    assert said == []
    assert {p.name for p in (tmp_path / where / "runs").iterdir()} >= {"mlflow.db", "mlartifacts"}
    assert [p.name for p in tmp_path.iterdir() if p.name != where and "ledger" not in p.name] == []
    key = next(iter(ledger.done()))
    copied = [p.read_bytes() for p in (tmp_path / where / "runs/mlartifacts").rglob(ledger.read(key).files[0])]
    assert ledger.file(key, ledger.read(key).files[0]) in copied
    assert len(runs_of_cells(default_uri(), "scale")) == 3
    assert_an_error_closes_the_run(ledger, default_uri())
    assert_trash_is_told_once_and_asked_no_more(ledger, default_uri(), monkeypatch)


def assert_an_error_closes_the_run(ledger: Ledger, uri: str) -> None:
    """Here, and in the next, to make one database the fewer: it takes many seconds."""
    tracking = Tracker(uri, ledger, Claims(ledger.store), artifact_mb=1.0, say=print)
    tracking.start({}, {})
    tracking.leave("FAILED", {"cells_done": 0}, 60)
    tracking.leave("KILLED", {}, 60)  # nothing: it has ended
    tracking.claims.release()
    assert launches(uri)[tracking.claims.launch_id] == "FAILED"


def assert_trash_is_told_once_and_asked_no_more(ledger: Ledger, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("plumbline/scale")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    said: list[str] = []
    tracking = Tracker(uri, ledger, Claims(ledger.store), artifact_mb=1.0, say=said.append)
    tracking.start({}, {})
    tracking.want(ledger.done())
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: pytest.fail("asked again"))
    assert not tracking.finish("FINISHED", {}, [])
    tracking.claims.release()
    (line,) = said
    assert f"mlflow experiments restore --experiment-id {experiment.experiment_id}`" in line
    assert uri in line
    assert "the next launch copies" not in line
    client.restore_experiment(experiment.experiment_id)


def launches(uri: str) -> dict[str, str]:
    """{launch: status of its run}."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("plumbline/scale")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.`plumbline.kind` = 'launch'")
    return {run.data.tags["plumbline.launch"]: run.info.status for run in found}


@pytest.mark.parametrize(
    ("uri", "normal", "file"),
    [
        ("sqlite:///runs/mlflow.db", "sqlite:///{cwd}/runs/mlflow.db", "{cwd}/runs/mlflow.db"),
        ("sqlite+pysqlite:///a.db?timeout=9", "sqlite:///{cwd}/a.db?timeout=9", "{cwd}/a.db"),
        ("sqlite:////x/a%20b/m.db?timeout=9", "sqlite+pysqlite:////x/a%20b/m.db?timeout=9", "/x/a b/m.db"),
        ("http://host:5000", "http://host:5000", None),
        ("mlruns", "mlruns", None),
    ],
)
def test_addresses_of_sqlite_files(
    uri: str, normal: str, file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = normal_uri(uri)
    assert there == normal.format(cwd=tmp_path)
    assert sqlite_file(there) == (file and Path(file.format(cwd=tmp_path)))


@pytest.mark.parametrize("kind", ["no database", "a folder"])
def test_a_file_that_is_no_database_is_told_at_once(
    kind: str, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "a folder":
        (tmp_path / "mlflow.db").mkdir()
    else:
        (tmp_path / "mlflow.db").write_text("not a database, whatever its name says; long enough to be read as one" * 9)
    monkeypatch.setattr("mlflow.store.db.utils.create_sqlalchemy_engine_with_retry", lambda *a: pytest.fail("minutes"))
    said: list[str] = []
    tracking = tracker(ledger, said)
    assert not tracking.finish("FINISHED", {}, [])
    tracking.claims.release()
    (line,) = said
    assert "database" in line


def test_what_a_server_refuses_is_not_called_away(ledger: Ledger) -> None:
    said: list[str] = []
    tracking = tracker(ledger, said)
    tracking._unreachable(Exception("API request failed with error code 401 != 200. Response body: 'who are you?'"))
    assert tracking._refused
    assert "refuses (API request failed with error code 401" in said[0]
    assert "does not answer" not in said[0]
    tracking.leave("FAILED", {}, 60)


def test_a_launch_that_leaves_copies_nothing_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a database, which takes many seconds to make: the client notes what it is asked."""
    client = MagicMock()
    monkeypatch.setattr(Slow, "_open", lambda self: vars(self).update(_parent="launch", _client=client))
    monkeypatch.setattr(Slow, "_look_up", lambda self, keys: None)
    slow = held_in_a_copy(ledger)
    slow.claims.release()
    threading.Timer(0.2, slow.go_on.set).start()
    slow.leave("KILLED", {}, 60)
    client.create_run.assert_not_called()
    client.set_terminated.assert_called_once_with("launch", "KILLED")
    assert ledger.store.names("_claims/launches") == []


def test_leaving_does_not_wait_for_a_copy(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "_open", lambda self: None)
    monkeypatch.setattr(Slow, "_look_up", lambda self, keys: None)
    slow = held_in_a_copy(ledger)
    slow.leave("KILLED", {}, 0.1)
    assert slow._thread is not None
    assert slow._thread.is_alive()
    slow.go_on.set()
    slow._thread.join()
    slow.claims.release()


def test_a_run_left_without_its_files_gets_them(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tracker(ledger, [])
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_log_files", lambda *a: (_ for _ in ()).throw(OSError("the network went away")))
        patch.setattr("sweeps.launch.tracking._FINISH_TRIES", 1)
        broken.start({}, {})
        broken.want(ledger.done())
        assert not broken.finish("FINISHED", {}, [])
        broken.claims.release()
    assert {run.info.status for run in runs_of_cells(broken.uri, "scale")} == {"RUNNING"}
    assert_the_next_launch_copies_all(ledger)


def test_a_file_that_stays_locked_is_waited_for_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that was paused while it wrote holds SQLite's lock: others wait once for it, and not at each try."""
    said: list[str] = []
    tracking = tracker(ledger, said)
    waits: list[float] = []

    def locked(file: Path, patience: float) -> None:
        waits.append(patience)
        with closing(sqlite3.connect(file, timeout=min(patience, 60) / 1000, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")

    file = sqlite_file(tracking.uri)
    assert file is not None
    with closing(sqlite3.connect(file, isolation_level=None)) as paused:
        paused.execute("BEGIN IMMEDIATE")
        with monkeypatch.context() as patch:
            patch.setattr("sweeps.launch.mlflow_store._open_once", locked)
            tracking.start({}, {})
            tracking.want(ledger.done())
            assert not tracking.finish("FINISHED", {}, [])
    tracking.claims.release()
    assert waits[0] == 60
    assert len(waits) <= 3
    assert set(waits[1:]) == {5}
    assert len(said) == 1
    assert "does not answer (database is locked)" in said[0]
    assert_the_next_launch_copies_all(ledger)


@pytest.mark.parametrize(
    ("sweep", "preset"),
    [
        *[("sae.sweep", "local"), ("codec.sweep", "local"), ("codec.sweep", "text_local"), ("caching.sweep", "local")],
        *[("topology.sweep", "audit"), ("topology.sweep", "ensemble"), ("topology.sweep", "utility")],
    ],
)
def test_names_tell_the_runs_of_a_preset_apart(sweep: str, preset: str) -> None:
    study: Any = importlib.import_module(f"sweeps.{sweep}").SWEEP
    cells = study.plan(study.presets[preset])
    published = [PublishedCell(c.key, c.identity(), pd.DataFrame(), (), "", {}) for c in cells]
    names = Counter(run_name(cell.key, cell.identity, study.named) for cell in published)
    assert max(names.values()) == 1, names.most_common(3)
    assert not names.keys() & {c.key for c in cells}
