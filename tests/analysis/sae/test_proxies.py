"""The leaderboard: scipy agreement, explicit resampling, planted rankings, pairing, missing proxies."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.sae import published
from analysis.sae.cells import SequenceTables, prepare_cells
from analysis.sae.leaderboard import PROXIES, available_proxies, demean_within, leaderboard, midranks, pearson

MODELS = ("pythia-70m", "pythia-160m", "pythia-410m")


def _board(grid, **kwargs):
    cells = prepare_cells(grid.cells)
    return cells, leaderboard(cells, SequenceTables(cells, grid.sequences), **kwargs)


def _value(board, proxy, relation="pooled", statistic="pearson", column="value", scope="all cells"):
    t = board.table
    row = t[(t.scope == scope) & (t.relation == relation) & (t.statistic == statistic) & (t.proxy == proxy)]
    return float(row[column].iloc[0])


def test_point_correlations_equal_scipy(make_grid):
    cells, board = _board(make_grid(n_sequences=12), n_resamples=20)
    series = {"r2": cells.r2, "inv_swd": 1 / cells.swd, "inv_nmse": 1 / cells.nmse, "cosine": cells.cosine}
    for name, x in series.items():
        assert _value(board, name) == pytest.approx(stats.pearsonr(x, cells.ce_rec).statistic, abs=1e-12)
        rho = stats.spearmanr(x, cells.ce_rec).statistic
        assert _value(board, name, statistic="spearman") == pytest.approx(rho, abs=1e-12)
        dx, dy = (v - v.groupby(cells.k).transform("mean") for v in (x, cells.ce_rec))
        assert _value(board, name, "within k") == pytest.approx(stats.pearsonr(dx, dy).statistic, abs=1e-9)
        assert _value(board, name, "within k", "spearman") == pytest.approx(stats.spearmanr(dx, dy).statistic, abs=1e-9)


def test_weighted_correlations_equal_scipy_on_repeated_cells():
    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=(40, 15)), 1)  # rounding makes ties
    y = np.round(x + rng.normal(size=(40, 15)), 1)
    weight = rng.multinomial(15, np.full(15, 1 / 15), size=40).astype(float)
    linear, rank = pearson(x, y, weight), pearson(midranks(x, weight), midranks(y, weight), weight)
    for r in range(40):
        repeat = np.repeat(np.arange(15), weight[r].astype(int))
        assert linear[r] == pytest.approx(stats.pearsonr(x[r, repeat], y[r, repeat]).statistic, abs=1e-12)
        assert rank[r] == pytest.approx(stats.spearmanr(x[r, repeat], y[r, repeat]).statistic, abs=1e-12)
        np.testing.assert_allclose(midranks(x, weight)[r, repeat], stats.rankdata(x[r, repeat]))


def test_demeaning_removes_group_effects_and_undefined_correlations_are_nan():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 12))
    group = np.repeat([8, 16, 32], 4)
    ones = np.ones_like(x)
    shifted = x + 1e3 * group
    np.testing.assert_allclose(demean_within(shifted, ones, group), demean_within(x, ones, group), atol=1e-9)
    one_each = demean_within(rng.normal(size=(1, 3)) + 0.1, np.ones((1, 3)), np.array([1, 2, 3]))
    assert (one_each == 0).all()
    assert np.isnan(pearson(one_each, np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3)))).all()


def test_planted_ranking_is_recovered(make_grid):
    """SWD is built from CE_rec and R² against it at fixed k, so 1/SWD leads within k and R² is negative."""
    _, board = _board(make_grid(models=MODELS, depths=("mid",), n_sequences=40), n_resamples=100)
    within = board.table[(board.table.relation == "within k") & (board.table.statistic == "spearman")]
    within = within[within["proxy"].isin(["r2", "inv_nmse", "cosine", "inv_swd", "inv_abs_gdelta"])]
    assert within.iloc[-1]["proxy"] in {"r2", "inv_nmse", "cosine"}
    assert within.iloc[0]["proxy"] in {"inv_swd", "inv_abs_gdelta"}
    assert _value(board, "r2", "within k", "spearman", column="hi") < 0
    assert _value(board, "inv_swd", "within k", "spearman", "minus_r2_lo") > 0
    pair = board.pairs[
        (board.pairs.relation == "within k")
        & (board.pairs.statistic == "spearman")
        & (board.pairs.proxy_a == "inv_swd")
    ].set_index("proxy_b")
    assert pair.loc["r2", "difference"] == pytest.approx(_value(board, "inv_swd", "within k", "spearman", "minus_r2"))
    assert pair.loc["r2", "lo"] == _value(board, "inv_swd", "within k", "spearman", "minus_r2_lo")


def _rank_limits(cells, proxy="r2"):
    board = leaderboard(cells, SequenceTables(cells, None))
    return [_value(board, proxy, statistic="spearman", column=c) for c in ("value", "lo", "hi")]


def _noisy(cells, seed=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=len(cells))
    return cells.assign(r2=x, ce_rec=0.7 * x + 0.7 * rng.normal(size=len(cells)))


def test_interval_is_near_the_classical_one_when_every_cell_is_a_trajectory(make_grid):
    """Fieller, Hartley & Pearson 1957: the variance of Spearman's z is 1.06 / (n − 3)."""
    cells = _noisy(prepare_cells(make_grid(models=MODELS, n_sequences=2).cells))
    value, lo, hi = _rank_limits(cells)
    half = 1.96 * np.sqrt(1.06 / (len(cells) - 3))
    assert lo == pytest.approx(np.tanh(np.arctanh(value) - half), abs=0.12)
    assert hi == pytest.approx(np.tanh(np.arctanh(value) + half), abs=0.12)


def test_budgets_and_seeds_of_a_trajectory_add_nothing_to_the_evidence(make_grid):
    """Each cell four times (two budgets, two seeds) is the same evidence; the old intervals were half as wide."""
    one = _noisy(prepare_cells(make_grid(n_sequences=2).cells))
    copies = [
        one.assign(seed=s, tokens=t, cell_key=one["cell_key"] + f"-{s}-{t}") for s in (0, 1) for t in (1000, 2000)
    ]
    four = prepare_cells(pd.concat(copies))
    assert _rank_limits(four) == pytest.approx(_rank_limits(one), abs=1e-3)


def test_few_clusters_and_pearson_have_no_interval_and_say_what_they_need(make_grid):
    cells = _noisy(prepare_cells(make_grid(ks=(8, 16, 32), depths=("mid",), n_sequences=2).cells)[:5])
    table = leaderboard(cells, SequenceTables(cells, None)).table
    assert table[["lo", "hi"]].isna().all(axis=None)
    needs = table.groupby(["relation", "statistic"])["needs"].first()
    assert needs["pooled", "spearman"] == "needs ≥ 6 trajectories (model, layer and k)"
    assert needs["within k", "spearman"] == "needs ≥ 6 values of k"
    assert needs["pooled", "pearson"] == "Pearson's has no interval; see Spearman"


def test_sequences_widen_intervals_and_samples_that_rank_alike_have_none(make_grid):
    grid = make_grid(n_sequences=12)
    cells = prepare_cells(grid.cells)
    widths = []
    for tables in (None, grid.sequences):
        board = leaderboard(cells, SequenceTables(cells, tables), n_resamples=50)
        limits = (_value(board, "r2", "within k", "spearman", c) for c in ("lo", "hi"))
        widths.append(abs(np.subtract(*limits)))
    assert widths[1] > widths[0]
    alike = cells.assign(ce_rec=cells["r2"])
    assert np.isnan(_rank_limits(alike)[1])


def test_scopes_missing_proxies_and_tiny_grids(make_grid):
    grid = make_grid(ks=(8, 16), n_sequences=9)
    cells = prepare_cells(grid.cells)
    cells["swd"] = np.nan
    cells.loc[0, "abs_gdelta"] = 0.0
    kept, dropped = available_proxies(cells)
    assert [p.name for p in kept] == [p.name for p in PROXIES if p.name not in ("inv_swd", "inv_abs_gdelta")]
    assert dropped == ["1/SWD: no cell measured `swd`", "1/E|gᵀδ|: `abs_gdelta` is missing or zero in 1 of 12 cells"]
    scopes = {"early": (cells.depth == "early").to_numpy(), "two": np.arange(12) < 2}
    board = leaderboard(cells, SequenceTables(cells, grid.sequences), scopes=scopes, n_resamples=20)
    assert set(board.table["scope"]) == {"early"}
    alone = leaderboard(cells[:2], SequenceTables(cells[:2], grid.sequences), n_resamples=50)
    assert alone.table.empty
    assert alone.pairs.empty


def test_a_proxy_that_is_ce_itself_ranks_first_and_sums_by_sequence_give_intervals(make_grid):
    grid = make_grid(models=MODELS, depths=("mid",), n_sequences=40)
    tables = {key: t.assign(kl=t["loss_recon"] / t["loss_orig"].mean()) for key, t in grid.sequences.items()}
    cells = prepare_cells(grid.cells)
    cells["kl"] = 1 - cells["ce_rec"]
    board = leaderboard(cells, SequenceTables(cells, tables), n_resamples=50).table
    for _, part in board[board.statistic == "spearman"].groupby("relation"):
        best = part.iloc[0]
        assert best["proxy"] == "kl"
        assert best["value"] == pytest.approx(1.0)
        needs = part.set_index("proxy")["needs"]
        if not needs["kl"].startswith("needs ≥"):
            assert needs["r2_whitened"] == "R² whitened keeps no sums by sequence"
            assert np.isfinite(part.set_index("proxy").loc["fisher", ["lo", "hi"]].to_numpy(float)).all()


def test_board_is_deterministic(make_grid):
    grid = make_grid(ks=(8, 16), n_sequences=20)
    first, second = (_board(grid, n_resamples=30)[1] for _ in range(2))
    assert first.table.equals(second.table)
    assert first.pairs.equals(second.pairs)


@pytest.mark.slow
def test_large_grid_is_fast(make_grid):
    """486 cells, 200 sequences."""
    grid = make_grid(MODELS, tokens=(published.TEN, published.FIFTY, published.HUNDRED), seeds=3, n_sequences=200)
    start = time.process_time()
    _, board = _board(grid)
    assert len(grid.cells) == 486
    assert time.process_time() - start < 20
    assert len(board.table) == 4 * len(PROXIES)
