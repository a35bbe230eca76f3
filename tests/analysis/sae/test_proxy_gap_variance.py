"""The report on what owns the variance: words by rule, blanks with their reason, closed forms of the parts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from analysis.sae.columns import AUDIT_COLUMNS, LAYER_COLUMNS
from analysis.sae.report import compose, glance, measure
from analysis.sae.variance_tables import answer, controls, definition_check, flags, layers, scale_parts

SMALL = {"n_resamples": 50}


def study_of(grid, geometry=None, **changes):
    cells = grid.cells.assign(**changes)
    return measure(cells, grid.sequences, grid.geometry if geometry is None else geometry, published=True, **SMALL)


def test_half_of_the_variance_in_one_percent_of_the_tokens_is_said_in_words(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 16), n_sequences=8)
    study = study_of(grid, r2=[0.2, 0.3, 0.2, 0.3])
    (line,) = flags(study)  # the 410m's layer 12 alone is hooked
    assert line.startswith("pythia-410m, mid (layer 12): 1% of the tokens hold 90.0% of Σ‖a − ā‖²")
    assert "ONE constant for all others give R² 0.2500; 1 of 2 trained SAEs have less" in line
    assert line in glance(study)
    below = grid.geometry.assign(sst_share_top1pct=0.499)
    assert flags(study_of(grid, below)) == []
    section = layers(study)
    assert section.lines[-1] == "In pythia-410m 1% of the tokens hold half of Σ‖a − ā‖² or more at layers 12 to 13, 15."
    assert len(section.rows) == 30
    assert section.rows[-1]["first token %"] == "25.0"


def test_a_ledger_without_the_audit_is_read_and_said(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 16), n_sequences=8)
    old = type(grid)(grid.cells.drop(columns=list(AUDIT_COLUMNS)), grid.sequences, grid.geometry)
    study = study_of(old, grid.geometry.drop(columns=list(LAYER_COLUMNS)))
    assert study.cells[list(AUDIT_COLUMNS)].isna().all(axis=None)
    text = compose(study, {}, preset="fast2", facts={})
    assert "4 of 4 cells were published before what owns the variance was measured" in text
    assert "It needs more than the cells of a ledger that is older than this audit" in layers_and_controls(study)
    mixed = pd.concat([grid.cells.iloc[:2], old.cells.iloc[2:]])
    part = measure(mixed, grid.sequences, grid.geometry, **SMALL)
    assert [row["without sinks"] for row in controls(part).rows].count("–") == 2
    assert not [line for line in controls(part).lines if "Spearman" in line]  # two configurations have them
    (line,) = [line for line in controls(study_of(grid)).lines if "Spearman" in line]
    plain = study_of(grid).means[["r2", "ce_rec"]].corr(method="spearman").iloc[0, 1]
    assert (
        f"over the 4 configurations of 10M tokens, point estimates: R² {plain:+.2f}, without first token {plain:+.2f}"
        in line
    )
    assert "published before" not in compose(study_of(grid), {}, preset="fast2", facts={})


def test_a_launch_ends_in_an_answer_for_the_largest_budget(make_grid):
    grid = make_grid(depths=("mid",), ks=(8, 16), tokens=(10_000_000, 20_000_000), n_sequences=8)
    largest = grid.cells["tokens"] == 20_000_000
    ranks = grid.cells.groupby("tokens")["ce_rec"].rank()  # 1 to 4 in each budget
    study = study_of(grid, r2=ranks.where(largest, -ranks) / 10, r2_no_sinks=-ranks.where(largest, -ranks) / 10)
    assert answer(study).startswith("Spearman correlation with CE_rec over the 4 configurations of 20M tokens")
    assert answer(study).endswith("point estimates: R² +1.00, R² without attention sinks -1.00.")
    old = type(grid)(grid.cells.drop(columns=list(AUDIT_COLUMNS)), grid.sequences, grid.geometry)
    assert "R² without" not in answer(study_of(old))
    few = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8, 16), n_sequences=8)
    assert answer(study_of(few)) == "– (a rank correlation needs ≥ 3 configurations of one budget)"


def layers_and_controls(study) -> str:
    found = {f"It needs {section.needs}" for section in (layers(study), controls(study))}
    assert len(found) == 1
    return found.pop()


def test_a_difference_of_r2_is_the_parts_from_error_and_variance(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=8)
    small, large = ((43.7, 226.7, 512), (161.3, 4131.1, 1024))  # the study's own numbers
    cells = {name: [x[i] for x in (small, large)] for i, name in enumerate(("sse", "sst", "d"))}
    mse = np.array(cells["sse"]) / np.array(cells["d"])
    study = study_of(grid, mse=mse, r2=1 - np.array(cells["sse"]) / np.array(cells["sst"]))
    (row,) = scale_parts(study).rows
    assert float(row["from SSE"]) == pytest.approx(math.log(161.3 / 43.7), abs=6e-4)
    assert float(row["from SST"]) == pytest.approx(-math.log(4131.1 / 226.7), abs=6e-4)
    assert float(row["Δ log(1 − R²)"]) == pytest.approx(float(row["from SSE"]) + float(row["from SST"]), abs=2e-3)
    assert row["read"] == "R² higher, error larger"
    alone = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,), n_sequences=8)
    assert "two or more models" in scale_parts(study_of(alone)).needs


def test_both_candidates_for_the_published_variance_stand_side_by_side(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,), n_sequences=8)
    section = definition_check(study_of(grid, mse=0.25, r2=0.75, nmse=0.125))
    row = section.rows[-1]
    assert (row["SST/token"], row["E‖a‖²/token"], row["SST/token published"]) == ("1024.0", "2048.0", "4131.1")
    assert row["1 − NMSE"] == "0.875"
    assert "226.7 and 4131.1" in section.lines[-1]
