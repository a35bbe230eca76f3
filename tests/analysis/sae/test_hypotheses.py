"""The verdicts: rules on planted data, what blocks what, Fieller's set, the fit over budgets, the thresholds' hash."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.sae.asymptote import asymptote, equal_alive
from analysis.sae.cells import family_of
from analysis.sae.contrasts import Measured
from analysis.sae.hypotheses import (
    REJECTED,
    SUPPORTED,
    Reference,
    Thresholds,
    Verdict,
    judge_h0,
    judge_h1,
    judge_h2,
    judge_h3,
    magnitude_ratio,
    mismatch_rate,
    permutation_rank_test,
)
from analysis.sae.leaderboard import Leaderboard
from analysis.sae.report import compose, measure

BUDGETS = (1_000_000, 4_000_000, 16_000_000, 64_000_000)
H0 = Verdict("H0", "", "", "", SUPPORTED)
NO_H0 = Verdict("H0", "", "", "", "undetermined", "seeds")


def _measured(value: float, rng: np.random.Generator, seeds: int, seed_sd: float, unit_U: np.ndarray) -> Measured:
    own = rng.normal(0, 0.3 * unit_U.std(), (seeds, len(unit_U)))
    return Measured(value + unit_U - unit_U.mean() + rng.normal(0, seed_sd, (seeds, 1)) + own, 0)


def _reference(limit: float, c: float = -0.1, alpha: float = 0.5, *, seeds: int = 3, sd: float = 5e-4) -> Reference:
    rng = np.random.default_rng(1)
    unit_U = rng.normal(0, 0.01, 60)
    gap = limit + c * (np.array(BUDGETS) / BUDGETS[0]) ** -alpha
    ce = [tuple(_measured(0.5 + m * g, rng, seeds, sd, unit_U) for g in gap) for m in (0, 1)]
    r2 = [tuple(_measured(0.8 + 0.1 * m, rng, seeds, sd, unit_U) for _ in gap) for m in (0, 1)]
    alive = ((0.2, 0.4, 0.6, 0.8), (0.1, 0.3, 0.5, 0.7))
    return Reference("m-1b", "m-2b", "mid", 8, BUDGETS, seeds, True, tuple(ce), tuple(r2), alive)  # type: ignore[arg-type]


def test_the_fit_over_budgets_finds_the_limit():
    reference = _reference(0.05)
    found = asymptote(BUDGETS, reference.ce_rec[1], reference.ce_rec[0])
    assert found.lo <= 0.05 <= found.hi
    assert found.value == pytest.approx(0.05, abs=0.02)
    assert found.alphas[0] <= 0.5 <= found.alphas[1]
    assert asymptote(BUDGETS[:3], *(m[:3] for m in reference.ce_rec)).needs == "≥ 4 budgets of both models"


def test_h0_is_decided_by_its_interval_alone():
    assert judge_h0(_reference(0.1), Thresholds()).word == REJECTED
    assert judge_h0(_reference(0.0), Thresholds(h0_margin=0.2)).word == SUPPORTED
    narrow = judge_h0(_reference(0.0), Thresholds(h0_margin=1e-4))
    assert str(narrow).startswith("undetermined (needs: an interval of Δ∞ within ±0.0001")
    few = judge_h0(_reference(0.1, seeds=2), Thresholds())
    assert str(few) == "undetermined (needs: ≥ 3 seeds of both models, of 2)"
    three = _reference(0.1)
    part = {name: tuple(m[:3] for m in getattr(three, name)) for name in ("ce_rec", "alive")}
    three = replace(three, budgets=BUDGETS[:3], **part)  # type: ignore[arg-type]
    assert str(judge_h0(three, Thresholds())) == "undetermined (needs: ≥ 4 budgets of both models, of 3)"
    assert judge_h0(None, Thresholds()).word == "undetermined"


def test_equal_alive_share_interpolates_between_budgets():
    reference = _reference(0.0)
    share, (small, large) = equal_alive(BUDGETS, reference.alive, reference.ce_rec)  # type: ignore[misc]
    assert share == 0.7
    expected = (reference.ce_rec[0][2].table_SU + reference.ce_rec[0][3].table_SU) / 2
    np.testing.assert_allclose(small.table_SU, expected)
    np.testing.assert_allclose(large.table_SU, reference.ce_rec[1][3].table_SU)
    assert equal_alive(BUDGETS, ((0.5, 0.6, 0.7, 0.8), (0.1, 0.2, 0.3, 0.4)), reference.ce_rec) is None


def test_fiellers_set_is_the_quadratics_and_unbounded_where_the_denominator_may_be_zero():
    rng = np.random.default_rng(3)
    top, bottom = rng.normal(3, 0.5, 40), rng.normal(1, 0.5, 40)
    zero = Measured(np.zeros((1, 40)), 0)
    some = [Measured(np.stack([x, x]), 0) for x in (top, bottom)]  # two equal seeds: sequences alone vary
    base = Measured(np.zeros((2, 40)), 0)
    found = magnitude_ratio((some[0], base), (some[1], base))
    assert found.value == pytest.approx(top.mean() / bottom.mean())
    t = stats.t.ppf(0.975, 39)
    cov = np.cov(top, bottom) / 40
    a = bottom.mean() ** 2 - t**2 * cov[1, 1]
    b = -2 * (top.mean() * bottom.mean() - t**2 * cov[0, 1])
    roots = np.sort(np.roots([a, b, top.mean() ** 2 - t**2 * cov[0, 0]]))
    np.testing.assert_allclose([found.lo, found.hi], roots, rtol=0.12)  # a grid, and widened for skewness
    around = Measured(np.stack([bottom - bottom.mean()] * 2), 0)
    loose = magnitude_ratio((some[0], base), (around, base))
    assert loose.hi == np.inf
    assert str(loose).endswith("unbounded]")
    assert np.isnan(magnitude_ratio((some[0], zero), (some[1], zero)).lo)


def test_h1_needs_a_rejected_h0_or_a_ratio_above_its_threshold():
    reference = _reference(0.02, c=-0.001)
    assert judge_h1(reference, NO_H0, Thresholds(h1_ratio=2.0)).word == SUPPORTED
    assert judge_h1(reference, replace(H0, word=REJECTED), Thresholds(h1_ratio=50.0)).word == SUPPORTED
    assert judge_h1(reference, H0, Thresholds(h1_ratio=50.0)).word == REJECTED
    assert judge_h1(reference, NO_H0, Thresholds(h1_ratio=50.0)).word == "undetermined"
    assert mismatch_rate(_reference(-0.2), 3) == 1.0
    assert mismatch_rate(_reference(0.2, c=0.0), 3) == 0.0


def _board(differences: dict[str, float], p: float) -> Leaderboard:
    rows = [
        {"scope": "all cells", "statistic": "spearman", "relation": relation, "proxy": name, "label": name}
        | {"minus_r2": d, "minus_r2_p": p, "needs": ""}
        for name, d in differences.items()
        for relation in ("pooled", "within k")
    ]
    return Leaderboard(pd.DataFrame(rows), pd.DataFrame(), ())


def test_h2_is_not_read_before_h0_and_corrects_for_all_its_proxies():
    better = _board({"kl": 0.2, "fisher": 0.1}, p=0.002)
    assert str(judge_h2(better, NO_H0, Thresholds())) == "blocked (by: H0 undetermined)"
    assert judge_h2(better, NO_H0, Thresholds()).inputs == "not read"
    assert judge_h2(better, H0, Thresholds()).word == SUPPORTED
    assert judge_h2(_board({"kl": 0.2, "fisher": 0.1}, p=0.02), H0, Thresholds()).word == "undetermined"
    assert judge_h2(_board({"kl": -0.2}, p=0.002), H0, Thresholds()).word == REJECTED
    assert judge_h2(_board({"r2_whitened": 0.4}, p=0.001), H0, Thresholds()).word == "undetermined"


def test_h3_is_blocked_without_k_mi_and_reads_ranks():
    models, layers = np.repeat(["m", "n"], 8), np.tile(np.arange(8), 2)
    cells = pd.DataFrame({"model": models, "layer": layers, "ce_rec": np.arange(16.0)})
    cells["r2"] = [0.0, 1.0, 2.0, 3.0, 7.0, 6.0, 5.0, 4.0, 8.0, 12.0, 10.0, 14.0, 9.0, 13.0, 11.0, 15.0]
    geometry = pd.DataFrame({"model": models, "layer": layers, "pr": 10.0})
    assert (
        str(judge_h3(geometry, cells, H0, Thresholds()))
        == "blocked (by: k_MI* not measured; --set information=on measures it)"
    )
    failure = (cells["r2"].rank() - cells["ce_rec"].rank()).abs().to_numpy()
    known = geometry.assign(k_mi=10.0 + failure + 0.01 * layers)
    assert judge_h3(known, cells, H0, Thresholds()).word == SUPPORTED
    assert judge_h3(known, cells, NO_H0, Thresholds()).word == "blocked"
    capped = known.assign(mi_nats=[4.8] * 3 + [2.0] * 13, mi_ceiling=np.log(128))
    assert "16 places (k_MI* a lower bound in 3: the ceiling of InfoNCE), Spearman" in (
        judge_h3(capped, cells, H0, Thresholds()).inputs
    )
    assert judge_h3(known[:4], cells, H0, Thresholds()).word == "undetermined"
    r, p = permutation_rank_test(np.arange(6.0), np.array([0, 2, 1, 3, 5, 4.0]))
    assert r == pytest.approx(stats.spearmanr(np.arange(6), [0, 2, 1, 3, 5, 4]).statistic)
    assert 0.005 < p < 0.06


def test_layers_of_a_model_are_turned_as_a_ring_and_never_shuffled():
    x, y = np.array([0, 1, 2, 3, 9, 8, 7, 6.0]), np.array([0, 2, 1, 3, 8, 9, 7, 6.0])
    models = ["a"] * 4 + ["b"] * 4
    r, p = permutation_rank_test(x, y, models)
    ranks = [stats.rankdata(v).reshape(2, 4) for v in (x, y)]
    a, b = (v - v.mean(axis=1, keepdims=True) for v in ranks)
    assert r == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    ways = [[np.roll(way, i) for way in (row, row[::-1]) for i in range(4)] for row in b]
    sums = [float(first @ a[0] + second @ a[1]) for first in ways[0] for second in ways[1]]
    assert p == pytest.approx(np.mean(np.abs(sums) >= (a * b).sum() - 1e-9), abs=0.01)
    assert permutation_rank_test(x, y, list(range(8))) == permutation_rank_test(x, y)  # one place per model
    assert permutation_rank_test(np.arange(8), np.arange(8), ["a"] * 8)[1] > 0.05  # 16 ways at most


def test_the_report_ends_with_the_adjudication_and_tells_of_changed_thresholds(make_grid):
    grid = make_grid(ks=(8, 16), depths=("mid",), tokens=BUDGETS, seeds=3, n_sequences=40)
    how = {"n_resamples": 20, "thresholds": Thresholds(), "recorded": ["0" * 12, "", Thresholds().digest]}
    text = compose(measure(grid.cells, grid.sequences, grid.geometry, **how), {}, preset="x", facts={})
    last = text.split("\n## ")[-1]
    assert last.startswith("Adjudication")
    assert f"Thresholds {Thresholds().digest}: h0_margin 0.05, h1_ratio 3" in last
    assert "The thresholds were changed after the run: the cells record 000000000000" in last
    assert "1 cells were published without a record of the thresholds." in last
    assert "pythia-410m minus pythia-70m, mid, k = 8; ΔCE_rec by budget: 1M" in last
    assert "blocked (by: k_MI* not measured; --set information=on measures it)" in last
    assert Thresholds(h0_margin=0.01).digest != Thresholds().digest
    one = make_grid(models=("pythia-70m",), ks=(8, 16), depths=("mid",), n_sequences=9)
    alone = compose(measure(one.cells, one.sequences, None, n_resamples=5), {}, preset="x", facts={})
    assert "undetermined (needs: two models at one depth, k and budget)" in alone
    assert "blocked (by: H0 undetermined)" in alone


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("pythia-410m", "pythia"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5"),
        ("qwen2.5-coder-1.5b", "qwen2.5-coder"),
        ("standin-small", "standin"),
        ("gpt2", "gpt2"),
        ("gemma-3-270m", "gemma-3"),
    ],
)
def test_families_are_names_without_sizes(model, family):
    assert family_of(model) == family
