"""A ledger that was published before the code moved into rooms is read, continued and reported.

ledger_before.zip holds three of the four cells planned here, with their index.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sweeps.core.cells import Cell, Pack
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.ledger.ledger import Ledger
from sweeps.topology.presets import PRESETS
from sweeps.topology.sweep import SWEEP

RUN = RunSettings()
PRESET = replace(
    PRESETS["audit"],
    clouds=(),
    representations=("bits_r4",),
    rows=60,
    runs=1,
    draws=2,
    draws_per_cell=2,
    null_stream="joint",
    full_table=False,
    full_draws=0,
)
TOP = {"observed": 0.0877431035, "fixed_margin": 0.0403745174, "bernoulli": 0.0468222499}  # mean top H1, as published


@pytest.fixture
def before(tmp_path: Path) -> Ledger:
    shutil.unpack_archive(Path(__file__).with_name("ledger_before.zip"), tmp_path)
    return Ledger(str(tmp_path), SWEEP.name, SWEEP.version)


def compute(ledger: Ledger, cells: Iterable[Cell]) -> None:
    context = PackContext(
        ledger, RUN, threads=1, device="cpu", fingerprint=lambda cell: SWEEP.fingerprint(cell, PRESET, RUN)
    )
    SWEEP.run(Pack(name="pack1", cells=tuple(cells)), PRESET, context)


def diagrams(ledger: Ledger, key: str) -> np.ndarray:
    return np.load(io.BytesIO(ledger.file(key, "diagrams.npz")))["pairs"]


def test_cells_of_before_are_known_and_of_the_same_code_and_data(before: Ledger) -> None:
    cells = {cell.key: cell for cell in SWEEP.plan(PRESET)}
    done = before.done(cells)
    assert len(cells) == 4
    assert len(done) == 3
    before.verify({key: SWEEP.fingerprint(cells[key], PRESET, RUN) for key in done})
    top = {
        cell.identity["null"]: float(cell.rows.set_index("metric")["value"]["h1_top1_mean"])
        for cell in before.read_many(sorted(done))
    }
    assert top == pytest.approx(TOP, rel=1e-8)


def test_the_same_cell_has_the_same_bits_now(before: Ledger, tmp_path: Path) -> None:
    again = Ledger(str(tmp_path / "again"), SWEEP.name, SWEEP.version)
    cells = SWEEP.plan(PRESET)[:2]
    compute(again, cells)
    for cell in cells:
        np.testing.assert_array_equal(diagrams(again, cell.key), diagrams(before, cell.key))


def test_a_ledger_of_before_is_continued_and_reported(before: Ledger, tmp_path: Path) -> None:
    cells = {cell.key: cell for cell in SWEEP.plan(PRESET)}
    compute(before, [cell for key, cell in cells.items() if key not in before.done(cells)])
    assert before.done(cells) == set(cells)
    (out := tmp_path / "report").mkdir()
    SWEEP.report(before.read_many(list(cells)), "audit", PRESET, out)
    assert "bits_r4" in (out / "report.md").read_text(encoding="utf-8")
