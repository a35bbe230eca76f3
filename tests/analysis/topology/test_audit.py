"""Monte-Carlo tests are calibrated, ratios follow the published definition, verdicts follow their rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ripser import ripser
from scipy import stats

from analysis.topology import null_tests, power, unit, verdict
from analysis.topology.distances import euclidean, jaccard
from analysis.topology.nulls import fixed_margin, gaussian, permute_columns
from analysis.topology.persistence import h1


def _top1_of_points(rng: np.random.Generator, n: int = 25) -> float:
    return unit.top1(ripser(rng.normal(size=(n, 3)), maxdim=1)["dgms"][1])


def test_under_a_true_null_the_monte_carlo_p_is_uniform() -> None:
    rng = np.random.default_rng(0)
    pool = np.array([_top1_of_points(rng) for _ in range(240 * 20)]).reshape(240, 20)
    p_values = np.array([null_tests.monte_carlo_p(row[0], row[1:]) for row in pool])
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
        top = [unit.top1(h1(jaccard(x))) for x in (x_ND, *(null(x_ND, 100 * test + b) for b in range(19)))]
        p_values.append(null_tests.monte_carlo_p(top[0], np.array(top[1:])))
    jittered = np.array(p_values) - rng.uniform(0, 1 / 20, 200)
    assert stats.kstest(jittered, "uniform").pvalue > 0.01


def test_the_calibration_check_notices_a_small_shift() -> None:
    rng = np.random.default_rng(1)
    pool = rng.normal(size=(240, 20))
    shifted = np.array([null_tests.monte_carlo_p(row[0] + 0.4, row[1:]) for row in pool])
    assert stats.kstest(shifted - rng.uniform(0, 1 / 20, 240), "uniform").pvalue < 0.01


def test_top1_ignores_loops_that_never_die() -> None:
    assert unit.top1(np.array([[0.1, 0.5], [0.2, np.inf], [0.3, 0.4]])) == pytest.approx(0.4)
    assert unit.top1(np.empty((0, 2))) == 0.0


def test_monte_carlo_p_counts_ties_and_is_never_zero() -> None:
    null = np.array([1.0, 2.0, 3.0, 3.0])
    assert null_tests.monte_carlo_p(3.0, null) == pytest.approx(3 / 5)
    assert null_tests.monte_carlo_p(9.0, null) == pytest.approx(1 / 5)
    assert null_tests.monte_carlo_p(0.0, null) == 1.0


def test_every_null_must_be_beaten() -> None:
    rng = np.random.default_rng(0)
    observed = np.array([3.0, 3.2])
    drawn = {"easy": rng.uniform(0, 1, (2, 199)), "hard": rng.uniform(2.5, 3.5, (2, 199))}
    result = null_tests.beats_nulls(observed, drawn, joint=True)
    assert result.null == "hard"
    assert result.p == result.p_by_null["hard"] > result.p_by_null["easy"] == pytest.approx(1 / 200)
    assert result.p_lo < result.p < result.p_hi


def test_runs_are_averaged_draw_by_draw() -> None:
    null_RB = np.array([[0.0, 4.0, 2.0], [4.0, 0.0, 2.5]])
    assert null_tests.beats_nulls([2.1, 2.1], {"n": null_RB}, joint=True).p == pytest.approx((1 + 1) / 4)


def test_draws_of_each_runs_own_are_merged_by_twice_the_average_p() -> None:
    null_RB = np.array([[0.0, 4.0, 2.0, 1.0], [0.0, 1.0, 2.0, 1.5]])
    test = null_tests.beats_nulls([3.0, 3.0], {"n": null_RB})
    assert test.p == pytest.approx(2 * (2 / 5 + 1 / 5) / 2)
    assert np.isnan(test.p_lo)
    assert test.least_p == pytest.approx(2 / 5)
    assert null_tests.beats_nulls([3.0], {"n": null_RB[:1]}).p == pytest.approx(2 / 5)


def runs_of_one_table(rng: np.random.Generator, draws: int, shared: float = 0.9) -> np.ndarray:
    """[R, B]: values of 8 overlapping subsamples under `draws` realisations, correlated within a realisation."""
    return np.sqrt(shared) * rng.normal(size=(1, draws)) + np.sqrt(1 - shared) * rng.normal(size=(8, draws))


@pytest.mark.parametrize("joint", [True, False])
def test_overlapping_runs_do_not_reject_a_true_null_too_often(joint: bool) -> None:
    """The mean compared with the mean over unrelated draws rejects at .16 to .25 here."""
    rng = np.random.default_rng(11)
    rejected = 0
    for _ in range(400):
        observed = runs_of_one_table(rng, 1)[:, 0]
        null_RB = runs_of_one_table(rng, 99) if joint else rng.normal(size=(8, 99))
        rejected += null_tests.beats_nulls(observed, {"n": null_RB}, joint=joint).p <= 0.05
    assert rejected / 400 <= 0.065 + 0.02


def test_one_subsample_that_is_like_the_null_keeps_eight_from_beating_it() -> None:
    """The physicochemical descriptors: p = .01 .05 .09 .01 .02 .22 .01 .83 by subsample."""
    share = np.array([0.01, 0.05, 0.09, 0.01, 0.02, 0.22, 0.01, 0.83])
    null_RB = np.tile(np.arange(99) / 99.0, (8, 1))
    test = null_tests.beats_nulls(1 - share + 1e-3, {"n": null_RB})
    assert test.p == pytest.approx(2 * share.mean(), abs=0.02)
    assert test.p > 0.05


def test_ratio_is_the_published_one() -> None:
    rng = np.random.default_rng(2)
    observed = rng.uniform(1, 2, 8)
    nulls = {"a": rng.uniform(0, 1, 8), "b": rng.uniform(0, 0.5, 8)}
    result = null_tests.top1_ratio(observed, nulls)
    bar = np.quantile(nulls["a"], 0.95)
    assert result.value == pytest.approx(observed.mean() / bar)
    assert result.threshold == pytest.approx(bar)
    assert (result.null, result.draws) == ("a", 8)
    assert result.share_above == 1.0
    assert result.lo <= result.value <= result.hi


@pytest.mark.parametrize("draws", [8, 50, 100, 400])
def test_ratio_interval_covers_the_true_ratio(draws: int) -> None:
    rng = np.random.default_rng(3)
    truth = 2.0 / stats.expon.ppf(0.95)
    results = [null_tests.top1_ratio([2.0], {"n": rng.exponential(size=draws)}) for _ in range(200)]
    assert np.mean([r.lo <= truth <= r.hi for r in results]) >= 0.93 - 2 * np.sqrt(0.93 * 0.07 / 200)
    assert all((r.lo == 0) == (draws < 72) for r in results)  # no upper limit of the threshold from fewer


def test_ratio_interval_covers_runs_and_clustered_draws() -> None:
    """Skewed runs, two nulls whose draws hang together within runs and within realisations."""
    rng = np.random.default_rng(4)
    truth = 2.0 / (1 + 0.1 * stats.norm.ppf(0.95))
    covered = 0
    for _ in range(200):
        run_R1 = rng.normal(size=(8, 1))
        nulls = {
            name: 1 + 0.1 * (0.4 * run_R1 + 0.5 * rng.normal(size=(1, 60)) + np.sqrt(0.59) * rng.normal(size=(8, 60)))
            for name in "ab"
        }
        ratio = null_tests.top1_ratio(2.0 + 0.2 * (rng.exponential(size=8) - 1), nulls)
        covered += ratio.lo <= truth <= ratio.hi
    assert covered / 200 >= 0.93 - 2 * np.sqrt(0.93 * 0.07 / 200)


def test_ratio_of_diagrams_without_loops() -> None:
    assert null_tests.top1_ratio([0.0], {"n": np.zeros(4)}).value == 1.0
    endless = null_tests.top1_ratio([1.0], {"n": np.zeros(4)})
    assert endless.value == endless.hi == np.inf
    assert endless.lo == 0  # a loop may come with the next draw
    assert null_tests.top1_ratio([0.0], {"n": np.ones(4)}).value == 0.0


def test_pooled_ratio_uses_every_loop_of_the_null() -> None:
    diagrams = [np.array([[0.0, 1.0], [0.0, 0.2]]), np.array([[0.0, 0.4], [0.1, np.inf]]), np.empty((0, 2))]
    result = null_tests.pooled_ratio([3.0, 1.0], {"n": {0: diagrams}})
    assert result.threshold == pytest.approx(np.quantile([1.0, 0.2, 0.4], 0.95))
    assert result.value == pytest.approx(2.0 / result.threshold)
    assert result.draws == 3
    with pytest.raises(ValueError, match="have a null without loops"):
        null_tests.pooled_ratio([1.0], {"n": {0: [np.empty((0, 2))]}})


def test_life_in_quantiles_of_the_distances_does_not_change_with_their_scale() -> None:
    rng = np.random.default_rng(6)
    distance_NN = euclidean(rng.normal(size=(60, 3)))
    shares, tops = [], []
    for power_of in (0.5, 1.0, 2.0):
        moved_NN = distance_NN**power_of
        pairs = h1(moved_NN)
        shares.append(null_tests.top1_quantile(pairs, moved_NN))
        tops.append(unit.top1(pairs))
    assert shares == pytest.approx([shares[0]] * 3, abs=2e-3)
    assert 0 < shares[0] < 1
    assert max(tops) / min(tops) > 1.2
    assert null_tests.top1_quantile(np.empty((0, 2)), distance_NN) == 0.0


def test_bad_values_are_one_line_errors() -> None:
    with pytest.raises(ValueError, match="give finite values"):
        null_tests.monte_carlo_p(1.0, np.array([]))
    with pytest.raises(ValueError, match="observed has 2 values, 1 not finite"):
        null_tests.top1_ratio([1.0, np.nan], {"n": np.ones(3)})
    with pytest.raises(ValueError, match="0 nulls"):
        null_tests.top1_ratio([1.0], {})
    with pytest.raises(ValueError, match=r"shape \[3, 5\] for 2 observed runs"):
        null_tests.beats_nulls([1.0, 2.0], {"n": np.ones((3, 5))})


@pytest.mark.parametrize(("alpha", "tests"), [(0.05, 1), (0.05, 6), (0.01, 3), (0.03, 7)])
def test_draws_needed_is_the_first_number_that_suffices(alpha: float, tests: int) -> None:
    draws = null_tests.draws_needed(alpha, tests)
    assert tests / (draws + 1) < alpha
    assert tests / draws >= alpha


def test_advice_says_what_is_decided_and_what_is_lacking() -> None:
    rng = np.random.default_rng(5)
    null_RB = rng.gamma(20, 0.05, (8, 50))
    observed = np.quantile(null_RB, 0.95) * rng.normal(1, 0.05, 8)
    test = null_tests.beats_nulls(observed, {"n": null_RB}, joint=True)
    unsure = power.advice(null_tests.top1_ratio(observed, {"n": null_RB}), test, runs=8)
    assert unsure.startswith("ratio undecided: 95% interval 0.")
    assert "holds 1 with 8 runs and 400 null draws worth" in unsure
    assert "ratio decided" in power.advice(null_tests.top1_ratio(3 * observed, {"n": null_RB}), test, runs=8)
    few = power.advice(null_tests.top1_ratio(observed, {"n": null_RB[:, :1]}), test, runs=8, tests=3)
    assert "95% interval – to" in few
    assert "an upper limit of the threshold needs ≥ 72" in few
    assert few.endswith("p < 0.05 over 3 tests needs ≥ 60 null draws, there are 50")
    assert "it needs ≥ 2 runs" in power.advice(null_tests.top1_ratio(observed[:1], {"n": null_RB}), test, runs=1)


def test_draws_needed_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="alpha=1, tests=1"):
        null_tests.draws_needed(1)


def test_the_whole_chain_tells_a_circle_from_a_blob() -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 60)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.1 * rng.normal(size=(60, 2))
    found = {}
    for name, x_ND in (("circle", circle), ("blob", rng.normal(size=(60, 3)))):
        nulls = {
            null.__name__: np.array([[unit.top1(h1(euclidean(null(x_ND, seed)))) for seed in range(39)]])
            for null in (permute_columns, gaussian)
        }
        test = null_tests.beats_nulls([unit.top1(h1(euclidean(x_ND)))], nulls)
        found[name] = verdict.criteria(p_adjusted=test.p, share_above=1.0)
    assert verdict.judge("circle", found, ["blob"]).label == "real, not found in baselines"
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
    assert verdict.criteria(p_by_metric={"a": 0.01, "b": 0.04, "c": 0.9}).metrics is False  # 2 · 0.04
    assert verdict.criteria(p_by_metric={"euclidean": 0.01, "cosine": 0.02}, metric_family=3).metrics is False


@pytest.mark.parametrize(
    ("mine", "baseline", "label"),
    [
        (ALL, {}, "real, uniqueness not tested"),
        (ALL, {"above_null": True, "recurs": True}, "real but not unique"),
        (ALL, {"above_null": False, "recurs": True}, "real, not found in baselines"),
        (ALL, {"above_null": True, "recurs": False}, "real, not found in baselines"),
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
