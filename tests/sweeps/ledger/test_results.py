"""Results as data: the same numbers as the report, on any storage, from ledgers that are empty, damaged or in use."""

from __future__ import annotations

import uuid
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from analysis.sae.columns import IDENTITY, NUMBERS
from sweeps.core.cells import Cell, Row, UserError
from sweeps.ledger import index
from sweeps.ledger.ledger import Ledger
from sweeps.ledger.published import parquet_bytes
from sweeps.ledger.results import KEY, open_results, results
from sweeps.ledger.storage import MARKER
from sweeps.sae.sweep import SWEEP
from tests.analysis.conftest import build_grid


@dataclass(frozen=True, kw_only=True)
class Point(Cell):
    SWEEP: ClassVar[str] = "points"
    VERSION: ClassVar[str] = "1"
    x: int
    shape: str = "round"


def ledger_of(storage: str, *values: int, version: str = "1") -> Ledger:
    ledger = Ledger(storage, "points", version)
    for x in values:
        rows = [
            Row("area", x**2, "m²"),
            Row("loss", 0.5, "nats", {"step": 1, "x": 7}),
            Row("loss", 0.25, "nats", {"step": 2}),
        ]
        ledger.publish(Point(x=x), rows, {"t.parquet": parquet_bytes(pd.DataFrame({"y": [x, x + 1]}))}, {})
    return ledger


@pytest.mark.parametrize("indexed", [True, False])
def test_rows_cells_and_files_with_the_fields_of_their_cells(storage: str, indexed: bool) -> None:
    ledger = ledger_of(storage, 3, 1, 2)
    if indexed:
        ledger.compact(ledger.done())
    table = results(storage, sweep="points")
    assert list(table.columns) == [KEY, "x", "shape", "metric", "value", "unit", "step", "row_x"]
    assert table[KEY].tolist() == [key for key in sorted(Point(x=x).key for x in (1, 2, 3)) for _ in range(3)]
    mine = table[table["x"] == 3]
    assert mine["value"].tolist() == [9.0, 0.5, 0.25]
    assert mine["step"].tolist()[1:] == [1, 2]
    assert mine["row_x"].tolist()[1] == 7  # a parameter that has the name of a field

    found = open_results(storage, "points")
    assert len(found) == 3
    wide = found.cells().set_index("x")
    assert wide["area"].to_dict() == {1: 1.0, 2: 4.0, 3: 9.0}
    assert "loss" not in wide  # not a number of the cell as a whole
    assert found.rows(metrics=["area"], where={"x": [1, 2]})["value"].sum() == 5.0
    files = pd.concat(found.tables("t.parquet", where={"x": 2}))
    assert files["y"].tolist() == [2, 3]
    assert set(files[KEY]) == {Point(x=2).key}
    with pytest.raises(UserError, match=r"no cell has a file 't.parqet'; did you mean t.parquet"):
        list(found.tables("t.parqet"))
    with pytest.raises(UserError, match="where='shap' is not a field of points; did you mean shape"):
        found.cells(where={"shap": "round"})


def test_opening_reads_no_table_and_parts_hold_few_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = ledger_of(str(tmp_path), *range(100))
    ledger.compact(ledger.done())
    read: list[str] = []
    get = type(ledger.store).read
    monkeypatch.setattr(type(ledger.store), "read", lambda store, name: read.append(name) or get(store, name))
    found = open_results(str(tmp_path), "points")
    assert len(found) == 100
    assert read == []
    monkeypatch.setattr(index, "_BATCH", 10)
    sizes = [part[KEY].nunique() for part in found.parts(size=30)]
    assert sizes == [30, 30, 30, 10]
    assert len(read) <= 3  # the index's one file, for its entries and for its rows; no file per cell


def test_equal_to_the_reports_tables(tmp_path: Path) -> None:
    """cells() is the report's cells.parquet, number for number."""
    grid = build_grid(ks=(8, 32), n_sequences=12)
    ledger = Ledger(str(tmp_path / "ledger"), SWEEP.name, SWEEP.version)
    preset = replace(SWEEP.presets["fast2"], k=(8, 32))
    frame = grid.cells.set_index(["model", "depth", "k"])
    published = []
    for cell in SWEEP.plan(preset):
        record = frame.loc[(cell.model, cell.depth, cell.k)]
        rows = [Row(name, float(record[name])) for name in NUMBERS]
        sequences = parquet_bytes(grid.sequences[record["cell_key"]])
        ledger.publish(cell, rows, {"sequences.parquet": sequences}, {"hardware": "none", "git_commit": "none"})
        published.append(ledger.read(cell.key))
    SWEEP.report(published, "fast2", preset, tmp_path)
    report = pd.read_parquet(tmp_path / "cells.parquet").set_index("cell_key").sort_index()
    ours = open_results(str(tmp_path / "ledger"), "proxy_gap").cells().set_index(KEY)
    columns = [name for name in (*IDENTITY, *NUMBERS) if name not in ("ce_rec_lo", "ce_rec_hi")]
    pd.testing.assert_frame_equal(ours[columns], report[columns], check_names=False, check_exact=True)


def test_empty_ledgers_and_other_versions_end_in_one_line(storage: str) -> None:
    with pytest.raises(UserError, match="holds no cell of points; it is empty or not there"):
        results(storage, "points")
    ledger_of(storage, 1)
    with pytest.raises(UserError, match=r"holds no cell of pointz; did you mean points\?; it holds points"):
        results(storage, "pointz")
    with pytest.raises(UserError, match=r"no cell of points version 9 is published in .*; it holds versions 1; run"):
        results(storage, "points", version="9")
    ledger_of(storage, 2, version="2")
    with pytest.raises(UserError, match=r'holds versions 1, 2 of points, .*choose one with version="2"'):
        results(storage, "points")
    assert results(storage, "points", version="2")["x"].unique().tolist() == [2]


def test_a_ledger_that_is_being_written_gives_what_was_published(storage: str) -> None:
    ledger = ledger_of(storage, 1)
    folder = Point(x=5).key  # a cell whose marker is not written yet
    ledger.store.replace(f"{folder}/{uuid.uuid4().hex}/rows.parquet", b"half")
    found = open_results(storage, "points")
    ledger_of(storage, 2)
    assert found.cells()["x"].tolist() == [1]
    ledger.store.remove(Point(x=1).key)  # taken away after the list was read
    assert len(found.rows()) == 0


def test_damaged_cells_are_named_and_left_out(storage: str) -> None:
    ledger = ledger_of(storage, 1, 2)
    bad = Point(x=1).key
    marker = ledger.store.marker(bad)["attempt"]
    ledger.store.replace(f"{bad}/{marker}/rows.parquet" if marker else f"{bad}/rows.parquet", b"PAR1")
    found = open_results(storage, "points")
    with pytest.warns(UserWarning, match=f"left out: cell {bad} .*rows.parquet"):
        assert found.cells()["x"].tolist() == [2]
    assert list(found.damaged) == [bad]
    ledger.store.replace(f"{Point(x=2).key}/{MARKER}", b"{")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(open_results(storage, "points").cells()) == 0
