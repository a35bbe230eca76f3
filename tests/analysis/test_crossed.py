"""Crossed seeds × units: closed forms, what one seed can say, and the interval's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis import crossed
from analysis.crossed import Component, CrossedArms


def test_one_component_is_the_ordinary_t_test() -> None:
    d = np.random.default_rng(0).normal(0.4, 1.0, 12)
    found, t = crossed.units_mean(d), stats.ttest_1samp(d, 0.0)
    assert (found.lo, found.hi) == pytest.approx(tuple(t.confidence_interval(0.95)), rel=1e-9)
    assert found.p == pytest.approx(t.pvalue, rel=1e-6)


def test_two_components_by_hand() -> None:
    found = crossed.effect(1.0, [Component(0.04, 1), Component(0.01, 30)])
    half = math.sqrt(stats.t.ppf(0.975, 1) ** 2 * 0.04 + stats.t.ppf(0.975, 30) ** 2 * 0.01)
    assert (found.lo, found.hi) == pytest.approx((1 - half, 1 + half))
    alpha = found.p  # the interval at level 1 - p ends at 0
    ends = math.sqrt(stats.t.isf(alpha / 2, 1) ** 2 * 0.04 + stats.t.isf(alpha / 2, 30) ** 2 * 0.01)
    assert ends == pytest.approx(1.0, rel=1e-6)


def test_many_values_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(1)
    value, variance = rng.normal(size=5), rng.uniform(0.01, 1, (5, 2))
    half, p = crossed.banerjee(value, variance, [3.0, 17.0])
    for v, some, h, q in zip(value, variance, half, p, strict=True):
        one = crossed.effect(float(v), [Component(some[0], 3), Component(some[1], 17)])
        assert (one.hi - v, one.p) == pytest.approx((h, q))


@pytest.mark.parametrize("units", [1, 30])
def test_one_seed_says_nothing_about_other_trainings(units: int) -> None:
    d = np.random.default_rng(2).normal(1.0, 0.1, (1, units))
    assert crossed.crossed_mean(d).needs == crossed.NEEDS_SEEDS
    arms = CrossedArms((d, d + 1))
    apart = arms.difference(1, 0)
    assert (apart.value, apart.needs) == (pytest.approx(1.0), crossed.NEEDS_SEEDS)
    assert math.isnan(apart.p)
    assert math.isnan(apart.lo)
    assert math.isnan(arms.seed_variance)


def test_one_seed_of_an_arm_leaves_the_statement_about_its_trained_model() -> None:
    table = np.random.default_rng(3).normal(size=(1, 9))
    assert CrossedArms((table,)).mean(0) == crossed.units_mean(table[0])


def test_what_does_not_vary_has_no_interval() -> None:
    assert crossed.units_mean([0.5, 0.5, 0.5]).needs == crossed.NEEDS_VARIATION
    assert crossed.units_mean([0.5]).needs == crossed.NEEDS_UNITS
    with pytest.raises(ValueError, match="finite table"):
        crossed.crossed_mean([[1.0, math.nan]])


def test_seed_variance_is_pooled_over_arms_of_any_size() -> None:
    rng = np.random.default_rng(4)
    tables = tuple(rng.normal(0, 1, (s, 25)) + rng.normal(0, 3, (s, 1)) for s in (2, 3, 1))
    arms = CrossedArms(tables)
    values = [t.mean(axis=1) for t in tables]
    assert arms.seed_df == 3
    assert arms.seed_variance == pytest.approx((values[0].var(ddof=1) * 1 + values[1].var(ddof=1) * 2) / 3)
    rest = crossed.residual(tables)
    paired = tables[0].mean(axis=0) - tables[1].mean(axis=0)
    unit = paired.var(ddof=1) / 25 - rest * (1 / 2 + 1 / 3) / 25
    by_hand = crossed.effect(
        float(tables[0].mean() - tables[1].mean()),
        [Component(arms.seed_variance * (1 / 2 + 1 / 3), 3), Component(max(unit, 0.0), 24)],
    )
    assert arms.difference(0, 1) == by_hand


def test_few_units_keep_the_residual_in_both_components() -> None:
    table = np.random.default_rng(5).normal(size=(3, crossed.UNITS_FOR_RESIDUAL - 1))
    by_hand = crossed.effect(
        float(table.mean()),
        [
            Component(float(table.mean(axis=1).var(ddof=1)) / 3, 2),
            Component(float(table.mean(axis=0).var(ddof=1)) / table.shape[1], table.shape[1] - 1),
        ],
    )
    assert crossed.crossed_mean(table) == by_hand


def test_influence_on_a_ratio_of_sums() -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(5, 50, (1, 40)).astype(float).repeat(2, axis=0)
    nll = 3.0 * tokens + rng.normal(size=(2, 40))
    table = crossed.ratio_influence(nll, tokens)
    assert table.mean(axis=1) == pytest.approx(nll.sum(axis=1) / tokens.sum(axis=1))
    assert crossed.ratio_influence(2.0 * tokens, tokens) == pytest.approx(np.full((2, 40), 2.0))


def test_influences_are_jackknife_pseudo_values() -> None:
    """Their variance over units is the delete-one jackknife's of the ratio, also where one unit holds a third of it."""
    rng = np.random.default_rng(8)
    tokens = np.array([40.0, *rng.integers(1, 9, 19)])
    nll = tokens * rng.normal(3, 1, 20)
    influence_U = crossed.ratio_influence(nll, tokens)[0]
    without_U = (nll.sum() - nll) / (tokens.sum() - tokens)
    jackknife = 19 / 20 * float(((without_U - without_U.mean()) ** 2).sum())
    assert influence_U.var(ddof=1) / 20 == pytest.approx(jackknife)
    assert influence_U.mean() == pytest.approx(nll.sum() / tokens.sum())
    assert crossed.ratio_influence(nll[:1], tokens[:1]) == pytest.approx(nll[0] / tokens[0])
    assert np.isfinite(crossed.ratio_influence([3.0, 0.5, 0.0], [2.0, 0.0, 0.0])).all()  # one unit holds everything


def test_pairs_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(5)
    arms = CrossedArms(tuple(rng.normal(size=(s, 25)) for s in (2, 3, 1)))
    pairs = [(0, 1), (1, 0), (2, 0)]
    one_by_one = [arms.difference(*pair) for pair in pairs]
    for found, one in zip(arms.differences(pairs), one_by_one, strict=True):
        assert (found.value, found.lo, found.hi, found.p) == pytest.approx(
            (one.value, one.lo, one.hi, one.p), nan_ok=True
        )
        assert found.needs == one.needs
