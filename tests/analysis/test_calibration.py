"""Every statement of the reports at its hardest settings, by simulation through the product's own functions."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import calibration
from benchmarks._calibration import CLOSELY, Statement, Tally, measure, measure_closely, spelled

CASES = [
    pytest.param(statement, setting, id=f"{statement.name}: {spelled(setting)}")
    for statements in calibration.STUDIES.values()
    for statement in statements
    for setting in statement.quick
]


@pytest.mark.parametrize(("statement", "setting"), CASES)
def test_statement_keeps_its_error_rate(statement: Statement, setting: dict[str, object]) -> None:
    tally = measure(statement, setting, statement.quick_trials)
    assert tally.trials
    assert statement.holds(tally, level=0.99), f"{tally.rate:.3f} of {tally.trials}, bound {statement.bound:.3f}"


def _too_narrow(rng: np.random.Generator, trials: int) -> Tally:
    x = rng.normal(size=(trials, 4))
    half = 1.96 * x.std(axis=1, ddof=1) / 2  # a normal quantile for four values
    return Tally(int((np.abs(x.mean(axis=1)) <= half).sum()), trials)


def test_a_wrong_interval_is_found() -> None:
    wrong = Statement("z interval of four values", "nowhere", "coverage", _too_narrow, ({},), ({},))
    assert not wrong.holds(measure(wrong, {}, 600), level=0.99)


def _right(rng: np.random.Generator, trials: int) -> Tally:
    return Tally(int((rng.random(trials) < 0.96).sum()), trials)


def test_a_rate_beyond_its_bound_is_measured_again_with_fresh_draws() -> None:
    wrong, right = (
        Statement("an interval", "nowhere", "coverage", simulate, ({},), ({},)) for simulate in (_too_narrow, _right)
    )
    first, closely = measure(wrong, {}, 600), measure_closely(wrong, {}, 600)
    assert closely.before == (first.hits, 600)
    assert closely.trials == CLOSELY * 600
    assert closely.hits != measure(wrong, {}, CLOSELY * 600).hits  # whose first draws are those that were looked at
    assert measure_closely(right, {}, 600) == measure(right, {}, 600)


def test_bounds_follow_the_kind() -> None:
    def bound(kind: str, nominal: float = float("nan")) -> float:
        return Statement("", "", kind, _too_narrow, (), (), nominal=nominal).bound  # type: ignore[arg-type]

    assert bound("coverage") == pytest.approx(0.93)
    assert bound("size") == pytest.approx(0.065)
    assert bound("size", 0.0045) == pytest.approx(0.00585)
    assert bound("family-wise error") == pytest.approx(0.075)
