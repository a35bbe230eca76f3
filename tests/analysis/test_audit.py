"""Monte-Carlo tests are calibrated, ratios follow the published definition, verdicts follow their rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ripser import ripser
from scipy import stats

from analysis import audit, power, verdict
from analysis.distances import euclidean, jaccard
from analysis.nulls import fixed_margin, gaussian, permute_columns
from analysis.persistence import h1


def _top1_of_points(rng: np.random.Generator, n: int = 25) -> float:
    return audit.top1(ripser(rng.normal(size=(n, 3)), maxdim=1)["dgms"][1])


def test_under_a_true_null_the_monte_carlo_p_is_uniform() -> None:
    rng = np.random.default_rng(0)
    pool = np.array([_top1_of_points(rng) for _ in range(240 * 20)]).reshape(240, 20)
    p_values = np.array([audit.monte_carlo_p(row[0], row[1:]) for row in pool])
    # p lives on the grid 1/20 … 1; a uniform jitter below each grid value makes the law continuous
    jittered = p_values - rng.uniform(0, 1 / 20, p_values.size)
    assert stats.kstest(jittered, "uniform").pvalue > 0.01
    assert (p_values <= 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 240))


@pytest.mark.parametrize("null", [fixed_margin, permute_columns])
def test_p_is_uniform_through_the_whole_chain_when_the_null_made_the_data(null: Callable[..., np.ndarray]) -> None:
    """Data drawn from the null itself and its null draws are exchangeable: 200 tests of distances, H1 and p."""
    rng = np.random.default_rng(7)
    p_values = []
    for test in range(200):
        x_ND = null(rng.random((24, 40)) < rng.beta(1, 3, 40), 10_000 + test)
        top = [audit.top1(h1(jaccard(x))) for x in (x_ND, *(null(x_ND, 100 * test + b) for b in range(19)))]
        p_values.append(audit.monte_carlo_p(top[0], np.array(top[1:])))
    jittered = np.array(p_values) - rng.uniform(0, 1 / 20, 200)
    assert stats.kstest(jittered, "uniform").pvalue > 0.01


def test_the_calibration_check_notices_a_small_shift() -> None:
    rng = np.random.default_rng(1)
    pool = rng.normal(size=(240, 20))
    shifted = np.array([audit.monte_carlo_p(row[0] + 0.4, row[1:]) for row in pool])
    assert stats.kstest(shifted - rng.uniform(0, 1 / 20, 240), "uniform").pvalue < 0.01


def test_top1_ignores_loops_that_never_die() -> None:
    assert audit.top1(np.array([[0.1, 0.5], [0.2, np.inf], [0.3, 0.4]])) == pytest.approx(0.4)
    assert audit.top1(np.empty((0, 2))) == 0.0


def test_monte_carlo_p_counts_ties_and_is_never_zero() -> None:
    null = np.array([1.0, 2.0, 3.0, 3.0])
    assert audit.monte_carlo_p(3.0, null) == pytest.approx(3 / 5)
    assert audit.monte_carlo_p(9.0, null) == pytest.approx(1 / 5)
    assert audit.monte_carlo_p(0.0, null) == 1.0


def test_every_null_must_be_beaten() -> None:
    rng = np.random.default_rng(0)
    observed = np.array([3.0, 3.2])
    result = audit.beats_nulls(observed, {"easy": rng.uniform(0, 1, (2, 199)), "hard": rng.uniform(2.5, 3.5, (2, 199))})
    assert result.null == "hard"
    assert result.p == result.p_by_null["hard"] > result.p_by_null["easy"] == pytest.approx(1 / 200)
    assert result.p_lo < result.p < result.p_hi


def test_runs_are_averaged_draw_by_draw() -> None:
    null_RB = np.array([[0.0, 4.0, 2.0], [4.0, 0.0, 2.5]])
    assert audit.beats_nulls([2.1, 2.1], {"n": null_RB}).p == pytest.approx((1 + 1) / 4)


def test_ratio_is_the_published_one() -> None:
    rng = np.random.default_rng(2)
    observed = rng.uniform(1, 2, 8)
    nulls = {"a": rng.uniform(0, 1, 8), "b": rng.uniform(0, 0.5, 8)}
    result = audit.top1_ratio(observed, nulls)
    bar = np.quantile(nulls["a"], 0.95)
    assert result.value == pytest.approx(observed.mean() / bar)
    assert result.threshold == pytest.approx(bar)
    assert (result.null, result.draws) == ("a", 8)
    assert result.share_above == 1.0
    assert result.lo <= result.value <= result.hi


def test_ratio_interval_covers_the_true_ratio_and_narrows_with_draws() -> None:
    rng = np.random.default_rng(3)
    truth = 2.0 / stats.expon.ppf(0.95)
    results = [audit.top1_ratio([2.0], {"n": rng.exponential(size=400)}, resamples=400) for _ in range(60)]
    covered = np.mean([r.lo <= truth <= r.hi for r in results])
    assert covered >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60)
    wide = audit.top1_ratio([2.0], {"n": rng.exponential(size=30)})
    assert wide.hi - wide.lo > results[0].hi - results[0].lo


def test_ratio_of_diagrams_without_loops() -> None:
    assert audit.top1_ratio([0.0], {"n": np.zeros(4)}).value == 1.0
    endless = audit.top1_ratio([1.0], {"n": np.zeros(4)})
    assert endless.lo == endless.value == endless.hi == np.inf
    assert audit.top1_ratio([0.0], {"n": np.ones(4)}).value == 0.0


def test_pooled_ratio_uses_every_loop_of_the_null() -> None:
    diagrams = [np.array([[0.0, 1.0], [0.0, 0.2]]), np.array([[0.0, 0.4], [0.1, np.inf]]), np.empty((0, 2))]
    result = audit.pooled_ratio([3.0, 1.0], {"n": diagrams})
    assert result.threshold == pytest.approx(np.quantile([1.0, 0.2, 0.4], 0.95))
    assert result.value == pytest.approx(2.0 / result.threshold)
    assert result.draws == 3
    with pytest.raises(ValueError, match="have a null without loops"):
        audit.pooled_ratio([1.0], {"n": [np.empty((0, 2))]})


def test_pooled_resampling_equals_concatenating_the_drawn_diagrams() -> None:
    rng = np.random.default_rng(0)
    for sizes in ([3, 0, 5], [200, 1, 50, 90], [0, 1], rng.integers(0, 30, 40)):
        lives = [np.round(rng.exponential(size=n), 1) for n in sizes]  # rounded: ties
        fast = audit._pooled_quantiles(lives, 60, np.random.default_rng(1))
        draw = np.random.default_rng(1)
        for value in fast:
            picked = np.concatenate([lives[i] for i in draw.integers(len(lives), size=len(lives))])
            assert value == pytest.approx(np.quantile(picked, audit.QUANTILE) if picked.size else 0.0, rel=1e-12)


def test_bad_values_are_one_line_errors() -> None:
    with pytest.raises(ValueError, match="give finite values"):
        audit.monte_carlo_p(1.0, np.array([]))
    with pytest.raises(ValueError, match="observed has 2 values, 1 not finite"):
        audit.top1_ratio([1.0, np.nan], {"n": np.ones(3)})
    with pytest.raises(ValueError, match="0 nulls"):
        audit.top1_ratio([1.0], {})
    with pytest.raises(ValueError, match=r"shape \[3, 5\] for 2 observed runs"):
        audit.beats_nulls([1.0, 2.0], {"n": np.ones((3, 5))})


@pytest.mark.parametrize(("alpha", "tests"), [(0.05, 1), (0.05, 6), (0.01, 3), (0.03, 7)])
def test_draws_needed_is_the_first_number_that_suffices(alpha: float, tests: int) -> None:
    draws = power.draws_needed(alpha, tests)
    assert tests / (draws + 1) < alpha
    assert tests / draws >= alpha


def test_power_of_a_known_shift() -> None:
    rng = np.random.default_rng(4)
    null = rng.normal(size=4000)
    assert power.power(rng.normal(size=500), null, draws=199) == pytest.approx(0.045, abs=0.02)
    assert power.power(rng.normal(6, 1, 500), null, draws=199) > 0.99
    assert power.power(rng.normal(6, 1, 500), null, draws=15) == 0.0


def test_more_runs_decide_what_eight_cannot() -> None:
    rng = np.random.default_rng(5)
    nulls = {"n": rng.gamma(20, 0.05, 400)}
    observed = 1.04 * np.quantile(nulls["n"], 0.95) * rng.normal(1, 0.05, 400)
    assert not power.ratio_precision(observed, nulls, 8).decided
    needed = power.runs_needed(observed, nulls)
    assert needed is not None
    assert needed > 8
    assert power.ratio_precision(observed, nulls, needed).decided
    sentence = power.advice(observed, nulls)
    assert sentence.startswith("ratio undecidable with 8 runs")
    assert f"{needed} runs would decide it" in sentence
    assert "ratio decided" in power.advice(3 * observed, nulls)
    assert "no number of runs" in power.advice(observed / 1.04, nulls)


def test_power_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="alpha=1, tests=1"):
        power.draws_needed(1)
    with pytest.raises(ValueError, match="draws=0; choose draws >= 1"):
        power.power([1.0], np.ones(3), 0)
    with pytest.raises(ValueError, match="runs=1; choose runs >= 2"):
        power.ratio_precision([1.0], {"n": np.ones(3)}, 1)


def test_the_whole_chain_tells_a_circle_from_a_blob() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 60)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * rng.normal(size=(60, 2))
    found = {}
    for name, x_ND in (("circle", circle), ("blob", rng.normal(size=(60, 3)))):
        nulls = {
            null.__name__: np.array([[audit.top1(h1(euclidean(null(x_ND, seed)))) for seed in range(39)]])
            for null in (permute_columns, gaussian)
        }
        test = audit.beats_nulls([audit.top1(h1(euclidean(x_ND)))], nulls)
        found[name] = verdict.criteria(p_adjusted=test.p, share_above=1.0)
    assert verdict.judge("circle", found, ["blob"]).label == "real and unique"
    assert verdict.judge("blob", found, ["circle"]).label == "not distinguishable"


ALL = {"above_null": True, "recurs": True, "metrics": True, "compression": True, "stable": True}


def test_criteria_follow_their_thresholds() -> None:
    found = verdict.criteria(
        p_adjusted=0.049,
        share_above=0.75,
        p_by_metric={"euclidean": 0.01, "cosine": 0.02},
        p_by_compression={"pca256": 0.01, "rp256": 0.3},
        spread=0.25,
    )
    assert found == verdict.Criteria(above_null=True, recurs=True, metrics=True, compression=False, stable=True)
    assert verdict.criteria() == verdict.Criteria()
    assert verdict.criteria(p_by_metric={"euclidean": 0.01}).metrics is None
    assert verdict.criteria(p_by_metric={"euclidean": 0.01, "cosine": 0.2}).metrics is False


@pytest.mark.parametrize(
    ("mine", "baseline", "label"),
    [
        (ALL, {}, "real, uniqueness not tested"),
        (ALL, {"above_null": True, "recurs": True}, "real but not unique"),
        (ALL, {"above_null": False, "recurs": True}, "real and unique"),
        (ALL, {"above_null": True, "recurs": False}, "real and unique"),
        (ALL | {"stable": False}, {}, "fragile"),
        (ALL | {"above_null": False}, {}, "not distinguishable"),
        (ALL | {"above_null": None}, {}, "undecided"),
        ({"above_null": True}, {}, "undecided"),
    ],
)
def test_verdict_by_rule(mine: dict[str, bool | None], baseline: dict[str, bool], label: str) -> None:
    found = {"pom": verdict.Criteria(**mine), "bits_r4": verdict.Criteria(**baseline)}
    result = verdict.judge("pom", found, ["bits_r4"])
    assert result.label == label
    assert result.label in verdict.LABELS
    assert result.sentence.startswith("pom: ")


def test_verdict_says_what_decided_it() -> None:
    found = {
        "pom": verdict.Criteria(above_null=True, recurs=True, stable=False),
        "bits_r4": verdict.Criteria(**ALL),
    }
    fragile = verdict.judge("pom", found, ["bits_r4"]).sentence
    assert "not at a stable birth and death" in fragile
    assert "not measured: metrics, compression" in fragile
    assert verdict.judge("bits_r4", found, ["bits_r4"]).label == "real, uniqueness not tested"
    with pytest.raises(KeyError, match="no criteria for 'x'"):
        verdict.judge("x", found, [])
