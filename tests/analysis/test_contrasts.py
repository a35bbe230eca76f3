"""Means over seeds and model differences: point values, pairing, seed variation."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.cells import SequenceTables, prepare_cells
from analysis.contrasts import configuration_means, model_deltas


def _means(grid, n_resamples=600):
    cells = prepare_cells(grid.cells)
    return cells, configuration_means(cells, SequenceTables(cells, grid.sequences), n_resamples=n_resamples)


def test_means_average_seeds_and_intervals_bracket_them(make_grid):
    cells, means = _means(make_grid(depths=("mid",), ks=(8, 16), seeds=3))
    assert len(means.table) == 4
    first = means.table.iloc[0]
    chosen = cells[(cells["model"] == first["model"]) & (cells["k"] == first["k"])]
    assert first["n_seeds"] == 3
    for column in ("ce_rec", "r2", "alive", "cosine"):
        assert first[column] == pytest.approx(chosen[column].mean())
    assert (means.table["ce_rec_lo"] < means.table["ce_rec"]).all()
    assert (means.table["ce_rec"] < means.table["ce_rec_hi"]).all()


def test_single_seed_interval_is_the_sequence_bootstrap(make_grid):
    _, means = _means(make_grid(depths=("mid",), ks=(8,)), n_resamples=4_000)
    row = means.table.iloc[0]
    assert row["ce_rec_hi"] - row["ce_rec_lo"] == pytest.approx(0.034, abs=0.012)


def test_seed_level_widens_intervals_when_seeds_differ(make_grid):
    grid = make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,), seeds=4)
    spread = dict(grid.sequences)
    for i, key in enumerate(spread):
        spread[key] = spread[key].assign(loss_recon=spread[key]["loss_recon"] * (1 + 0.1 * i))
    cells = prepare_cells(grid.cells)
    tight = configuration_means(cells, SequenceTables(cells, grid.sequences), n_resamples=800).table.iloc[0]
    wide = configuration_means(cells, SequenceTables(cells, spread), n_resamples=800).table.iloc[0]
    assert wide["ce_rec_hi"] - wide["ce_rec_lo"] > 3 * (tight["ce_rec_hi"] - tight["ce_rec_lo"])


def test_deltas_are_widest_minus_narrowest_and_paired(make_grid):
    grid = make_grid(models=("pythia-410m", "pythia-160m", "pythia-70m"), depths=("mid",), ks=(8, 32))
    _, means = _means(grid)
    deltas = model_deltas(means)
    assert list(deltas["k"]) == [8, 32]
    assert set(deltas["small"]) == {"pythia-70m"}
    assert set(deltas["large"]) == {"pythia-410m"}
    by = grid.cells.set_index(["model", "k"])["ce_rec"]
    assert deltas["delta_ce_rec"][0] == pytest.approx(by["pythia-410m", 8] - by["pythia-70m", 8])
    assert (deltas["delta_r2_lo"] > 0).all()


def test_identical_losses_give_a_zero_delta_interval_through_pairing(make_grid):
    grid = make_grid(depths=("mid",), ks=(8,))
    keys = list(grid.sequences)
    shared = dict.fromkeys(keys, grid.sequences[keys[0]])
    cells = prepare_cells(grid.cells)
    deltas = model_deltas(configuration_means(cells, SequenceTables(cells, shared), n_resamples=200))
    np.testing.assert_allclose(deltas[["delta_ce_rec_lo", "delta_ce_rec_hi"]], 0.0, atol=1e-15)


def test_one_model_gives_an_empty_table(make_grid):
    _, means = _means(make_grid(models=("pythia-70m",), depths=("mid",), ks=(8,)))
    assert model_deltas(means).empty


def test_only_configurations_with_both_extreme_models_are_compared(make_grid):
    grid = make_grid(models=("pythia-70m", "pythia-160m", "pythia-410m"), depths=("mid",), ks=(8, 32), n_sequences=9)
    partial = type(grid)(grid.cells[~((grid.cells.model == "pythia-410m") & (grid.cells.k == 8))], grid.sequences, None)
    deltas = model_deltas(_means(partial, n_resamples=50)[1])
    assert list(deltas["k"]) == [32]
    assert list(deltas["large"]) == ["pythia-410m"]
