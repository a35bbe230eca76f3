"""Quantile thresholds: exact for independent draws, honest about draws that hang together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.thresholds import largest_threshold, least_draws, threshold


def test_least_draws_are_those_whose_largest_is_a_limit() -> None:
    assert (least_draws(), least_draws(two_sided=False)) == (72, 59)
    assert np.isinf(threshold(np.arange(71.0)).hi)
    assert threshold(np.arange(72.0)).hi == 71.0


@pytest.mark.parametrize("draws", [8, 72, 199, 999])
def test_independent_draws_have_the_exact_order_statistics(draws: int) -> None:
    found = threshold(np.arange(1.0, draws + 1))
    tails = stats.binom.cdf([found.lo - 1, min(found.hi, 2 * draws) - 1], draws, 0.95)
    assert tails[0] <= 0.025
    assert tails[1] >= 0.975
    assert found.effective == draws


@pytest.mark.parametrize(
    ("run", "realisation"), [(0.0, 0.0), (0.3, 0.0), (0.6, 0.0), (0.9, 0.0), (0.0, 0.7), (0.3, 0.7)]
)
def test_coverage_of_draws_that_hang_together(run: float, realisation: float) -> None:
    rng = np.random.default_rng(1)
    rest, truth, covered = np.sqrt(1 - run**2 - realisation**2), stats.norm.ppf(0.95), 0
    for _ in range(150):
        runs_R1, draws_1B = rng.normal(size=(8, 1)), rng.normal(size=(1, 40))
        found = threshold(run * runs_R1 + realisation * draws_1B + rest * rng.normal(size=(8, 40)))
        covered += found.lo <= truth <= found.hi
    assert covered / 150 >= 0.93 - 2 * np.sqrt(0.93 * 0.07 / 150)


def test_the_largest_of_several_thresholds() -> None:
    rng = np.random.default_rng(2)
    name, found = largest_threshold({"low": rng.normal(size=500), "high": 3 + rng.normal(size=400)})
    assert name == "high"
    assert found.draws == 400
    assert found.lo < found.value < found.hi
    truth, covered = stats.norm.ppf(0.95), 0
    for _ in range(200):
        _, found = largest_threshold({str(k): rng.normal(size=300) for k in range(3)})
        covered += found.lo <= truth <= found.hi
    assert covered / 200 >= 0.93


def test_bad_values_are_one_line_errors() -> None:
    with pytest.raises(ValueError, match="0 null values, not all finite; give"):
        threshold([])
    with pytest.raises(ValueError, match=r"runs has shape \[2\] for 3 values"):
        threshold([1.0, 2.0, 3.0], runs=np.arange(2))
    with pytest.raises(ValueError, match=r"quantile=1, level=0\.95; choose both within"):
        threshold([1.0], quantile=1)
    with pytest.raises(ValueError, match=r"0 nulls; give one or more"):
        largest_threshold({})
