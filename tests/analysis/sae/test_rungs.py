"""What a cell's sequences say of the rungs, and how the report prints them with their costs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.sae.columns import RUNG_SUMS
from analysis.sae.leaderboard import BEYOND_R2
from analysis.sae.plots import cost
from analysis.sae.report import compose, measure
from analysis.sae.rungs import cost_of, deviation, merged_costs, rung_numbers


def _table(predicted: np.ndarray, rise: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame(dict.fromkeys(RUNG_SUMS, np.full(len(rise), np.nan)))
    return table.assign(n_tokens=256, loss_orig=2.0, loss_recon=2.0 + rise, first_order=predicted, kl=np.abs(rise))


def test_first_order_slope_correlation_and_signs():
    x = np.array([0.1, -0.2, 0.3, 0.4])
    numbers = rung_numbers(_table(x, 1.5 * x))
    assert numbers["first_order_slope"] == pytest.approx(1.5)
    assert numbers["first_order_correlation"] == pytest.approx(1.0)
    assert numbers["first_order_signs"] == 1.0
    assert numbers["first_order"] == pytest.approx(0.15)
    assert np.isnan(numbers["fisher"])
    assert rung_numbers(_table(x, np.abs(x)))["first_order_signs"] == 0.75
    bent = rung_numbers(_table(x, x + x**2))
    assert bent["first_order_slope"] == pytest.approx(float((x * (x + x**2)).sum() / (x**2).sum()))


def test_weights_are_those_of_the_losses():
    table = _table(np.array([0.1, 0.2]), np.array([1.0, 3.0])).assign(n_tokens=[10, 30])
    assert rung_numbers(table)["kl"] == pytest.approx(2.5)


def test_deviation_is_one_where_random_directions_do_as_much():
    assert deviation(3.0, 3.0) == 1.0
    assert np.isnan(deviation(0.0, 0.0))


def _costs() -> pd.DataFrame:
    rows = [
        ("backward", 2.0, True, ""),
        ("drawn", 1.2, True, ""),
        ("fisher", 2.6, False, ""),
        ("patched", 0.9, False, ""),
    ]
    rows += [("plans", np.nan, False, "no later layer has softmax attention")]
    return pd.DataFrame(rows, columns=["rung", "passes", "shared", "reason"])


def test_costs_are_medians_shared_ones_divided():
    costs = merged_costs({"a": _costs(), "b": _costs().assign(passes=lambda t: 3 * t["passes"]), "c": _costs()})
    assert str(cost_of("r2", costs)) == "0.00"
    assert str(cost_of("fisher", costs)) == "2.60"
    assert str(cost_of("inv_swd", costs)) == "2.00 per model"
    assert cost_of("inv_swd", costs).each(10) == pytest.approx(0.2)
    assert str(cost_of("attention_plan", costs)) == "– (no later layer has softmax attention)"
    assert str(cost_of("kl", merged_costs({}))) == "–"


def test_the_report_ranks_every_rung_with_its_cost(make_grid, tmp_path):
    grid = make_grid(ks=(8, 16, 32), n_sequences=33)
    study = measure(grid.cells, grid.sequences, grid.geometry, n_resamples=20, costs={"x": _costs()})
    text = compose(study, {}, preset="local", facts={})
    assert "CE_rec itself takes 0.90." in text
    ranked = set(study.board.table["proxy"])
    assert set(BEYOND_R2) <= ranked
    assert "| 2.00 per model |" in text
    assert "Not measured: plans (no later layer has softmax attention)." in text
    assert "## The ladder of proxies, every configuration" in text
    assert cost(study) is not None
    old = measure(grid.cells.drop(columns=["kl", "fisher"]), grid.sequences, None, n_resamples=20)
    assert "−KL(p ‖ p̂): no cell measured `kl`" in old.board.dropped
    assert cost(old) is None
    assert "| – |" in compose(old, {}, preset="local", facts={})
