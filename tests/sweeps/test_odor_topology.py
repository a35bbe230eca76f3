"""The topology audit as a sweep: published protocol, seeds, known shapes, tables by content, bad input."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import molecules
from sweeps._context import PackContext
from sweeps._ledger import Ledger
from sweeps._sweep import UserError
from sweeps._topology_report import write
from sweeps._topology_run import landmark_seed, null_seed, run_pack, run_rows
from sweeps._topology_sources import table_name
from sweeps._where import Machine, RunSettings
from sweeps.odor_topology import PRESETS, SWEEP, Audit, DiagramCell, MemberCell

SHAPES = Audit(study="audit", table="cloud:circle", clouds=("gaussian_blob",), draws=39, null_runs=1, runs=3, rows=120)
MACHINE = Machine(nodes=1, cpus=2, gpus=0, memory_bytes=8 * 2**30, hardware="test")


def run(preset: Audit) -> Ledger:
    ledger = Ledger(f"memory://{uuid.uuid4().hex}", "odor_topology", "1")
    context = PackContext(ledger, RunSettings(), threads=1, device="cpu", fingerprint=lambda cell: "f")
    cells = SWEEP.plan(preset)
    while missing := [c for c in cells if c.key not in ledger.done()]:
        for pack in SWEEP.pack(missing, preset, MACHINE, RunSettings()):
            run_pack(list(pack.cells), preset, context)
    return ledger


def test_known_shapes_get_their_verdicts(tmp_path: Path) -> None:
    ledger = run(SHAPES)
    keys = [c.key for c in SWEEP.plan(SHAPES)]
    assert ledger.done() == set(keys)
    lines = write(ledger.read_many(keys), "audit", SHAPES, tmp_path)
    assert "verdict      cloud:circle points: real, uniqueness not tested" in lines
    assert "verdict      cloud:gaussian_blob points: not distinguishable" in lines
    import pandas as pd

    table = pd.read_parquet(tmp_path / "cells.parquet")
    assert {"table", "representation", "metric", "route", "statistic", "value", "lo", "hi", "p", "null"} <= set(table)
    ratio = table[(table["table"] == "cloud:circle") & (table["statistic"] == "top1_ratio")].iloc[0]
    assert ratio["lo"] > 1
    for name in ("report.md", "ratios.png", "nulls.png", "diagrams.png", "barcodes.png"):
        assert (tmp_path / name).stat().st_size > 500


def test_draws_do_not_depend_on_how_they_are_cut_into_cells() -> None:
    whole = replace(SHAPES, draws=4, runs=1, clouds=(), draws_per_cell=4)
    parts = replace(whole, draws_per_cell=1)
    values = []
    for preset in (whole, parts):
        ledger = run(preset)
        rows = [
            (c.identity["null"], draw, value)
            for c in ledger.read_many([c.key for c in SWEEP.plan(preset)])
            if c.identity["null"] != "observed"
            for draw, value in c.rows.loc[c.rows["metric"] == "h1_top1", ["draw", "value"]].to_numpy()
        ]
        values.append(sorted(rows))
    assert values[0] == values[1]


def test_runs_and_seeds_are_the_published_ones() -> None:
    rows = run_rows(4983, 3, 1000)
    assert (rows == np.sort(np.random.default_rng(3).choice(4983, 1000, replace=False))).all()
    assert (run_rows(900, 3, 1000) == np.arange(900)).all()
    cell = DiagramCell(
        table="curated",
        representation="bits_r4",
        metric="jaccard",
        route="landmark",
        run=3,
        rows=1000,
        landmarks=250,
        null="bernoulli",
    )
    assert null_seed(cell, 0) == 3 + 20_000
    assert landmark_seed(cell, 0) == 3 + 500_000 + 2_000
    assert landmark_seed(replace(cell, null="observed"), 0) == 500_003
    assert len({null_seed(cell, b) for b in range(1000)}) == 1000


def test_paper_preset_is_the_published_protocol() -> None:
    cells = SWEEP.plan(PRESETS["paper"])
    bits = [c for c in cells if isinstance(c, DiagramCell) and c.representation == "bits_r4" and c.route == "direct"]
    assert len(bits) == 8 * (1 + 3)
    assert {c.null_stream for c in bits} == {"fast", "published"}
    assert all(c.draws == 1 for c in bits)
    assert any(isinstance(c, MemberCell) for c in cells)


def test_member_is_trained_once_and_used(tmp_path: Path) -> None:
    preset = Audit(study="paper", representations=("pom_0",), metrics=("euclidean",), runs=1, pom_epochs=1)
    ledger = run(preset)
    members = [c for c in ledger.read_many(sorted(ledger.done())) if c.identity["kind"] == "member"]
    assert len(members) == 1
    assert "embedding.npy" in members[0].files


def test_embedding_of_ones_own_is_audited_and_must_fit(tmp_path: Path) -> None:
    ids = molecules.embedded().ids
    x = np.random.default_rng(0).normal(size=(len(ids), 4))
    good, bad = tmp_path / "mine.npz", tmp_path / "short.npz"
    np.savez(good, ids=np.array(ids), embedding=x)
    np.savez(bad, ids=np.array(ids[:-1]), embedding=x[:-1])
    preset = Audit(study="paper", representations=(), embedding=str(good), runs=1, rows=60, metrics=("cosine",))
    ledger = run(preset)
    assert {c.identity["representation"] for c in ledger.read_many(sorted(ledger.done()))} == {"file"}
    with pytest.raises(UserError, match="1 of"):
        run(replace(preset, embedding=str(bad)))


def test_table_is_named_by_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a.csv", tmp_path / "elsewhere" / "a.csv"
    b.parent.mkdir()
    for path in (a, b):
        path.write_text("smiles,sweet\nCCO,1\nCCCO,0\n")
    assert table_name(str(a)) == table_name(str(b))
    b.write_text("smiles,sweet\nCCO,1\nCCCCO,0\n")
    assert table_name(str(a)) != table_name(str(b))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for change, line in (
        ({"table": "curatd"}, "table 'curatd' is no file and no known table; did you mean curated?"),
        ({"representations": ("bits_r5",)}, "representation 'bits_r5' is not known; did you mean bits_r4?"),
        (
            {"study": "utility", "neighbours": 5000},
            "neighbours=5000 makes patches of 5001, more than a fifth of the table's 432 rows; choose neighbours <= 85",
        ),
        ({"null_stream": "slow"}, "null_stream='slow' is not known; choose fast or published"),
        ({"draws_per_cell": 0}, "draws_per_cell=0 cuts draws into nothing; choose 1 or more"),
    ):
        with pytest.raises(UserError) as caught:
            SWEEP.plan(replace(PRESETS["audit"], **change))
        assert line in str(caught.value)
    empty = tmp_path / "t.csv"
    empty.write_text("name\nx\n")
    with pytest.raises(UserError, match="smiles"):
        SWEEP.plan(replace(PRESETS["audit"], table=str(empty)))
