"""New SQLite stores get a copy of the tables that MLflow made before on this machine, and none of its runs."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow.store.db.utils
import pytest
from mlflow.tracking import MlflowClient

from sweeps.launch.mlflow_store import alone


def opened(file: Path) -> MlflowClient:
    """A client of the store, as a launch makes it."""
    with alone(file):
        client = MlflowClient(f"sqlite:///{file}")
        client.get_experiment_by_name("plumbline/toy")
    return client


def schema(file: Path) -> set[str]:
    with closing(sqlite3.connect(file)) as database:
        return {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master")}


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The databases in which MLflow makes its tables."""
    made: list[str] = []
    make: Callable[..., None] = mlflow.store.db.utils._initialize_tables

    def counted(engine) -> None:
        made.append(Path(engine.url.database).name)
        make(engine)

    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mlflow.store.db.utils, "_initialize_tables", counted)
    return made


def test_tables_are_made_once_per_machine_and_hold_no_runs(tmp_path: Path, migrations: list[str]) -> None:
    first = opened(tmp_path / "first.db")
    first.create_run(first.create_experiment("plumbline/toy"))
    (tmp_path / "elsewhere").mkdir()
    second = opened(tmp_path / "elsewhere/second.db")
    assert migrations == ["first.db"]
    assert schema(tmp_path / "first.db") == schema(tmp_path / "elsewhere/second.db")
    assert [e.name for e in second.search_experiments()] == ["Default"]
    assert second.create_experiment("plumbline/toy") == "1"
    assert second.search_runs(["0", "1"]) == []
    assert len(opened(tmp_path / "first.db").search_runs(["1"])) == 1  # a store that is there is left as it is


def test_tables_that_cannot_be_read_are_made_again(tmp_path: Path, migrations: list[str]) -> None:
    opened(tmp_path / "first.db")
    (kept,) = (tmp_path / "cache/mlflow").iterdir()
    kept.write_bytes(b"\x93torn" * 1000)
    opened(tmp_path / "second.db")
    opened(tmp_path / "third.db")
    assert migrations == ["first.db", "second.db"]


def test_a_store_with_runs_is_not_kept(tmp_path: Path, migrations: list[str]) -> None:
    file = tmp_path / "first.db"
    with alone(file):
        MlflowClient(f"sqlite:///{file}").create_experiment("somebody's own")
    assert not list((tmp_path / "cache/mlflow").iterdir())
