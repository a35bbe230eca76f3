"""k_MI* from estimates by fold: its rule, its limits, what is not printed, and the report's table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.sae.report import compose, measure
from analysis.sae.task_dimension import numbers, task_dimension

GRID = (1, 2, 3, 4, 6)


def estimates(*share: float, noise: float = 0.0, folds: int = 4) -> np.ndarray:
    """Folds whose estimates differ by `noise`."""
    rng = np.random.default_rng(0)
    return np.array(share) + rng.normal(0, noise, (folds, len(share)))


def test_the_smallest_width_within_the_tolerance_of_the_plateau() -> None:
    found = task_dimension(GRID, estimates(0.5, 1.0, 1.44, 1.50, 1.49))
    assert (found.k, found.lo, found.hi) == (3, 3, 3)
    assert found.plateau == pytest.approx(1.5)
    assert task_dimension(GRID, estimates(0.5, 1.0, 1.42, 1.50, 1.49)).k == 4
    assert task_dimension(GRID, estimates(0.5, 1.0, 1.42, 1.50, 1.49), tolerance=0.1).k == 3


def test_limits_are_paired_by_fold_and_widen_with_the_noise_between_folds() -> None:
    rng = np.random.default_rng(1)
    shared = np.array([0.5, 1.0, 1.47, 1.5, 1.5]) * (1 + 0.3 * rng.normal(size=(4, 1)))  # folds differ, shares do not
    assert (task_dimension(GRID, shared).lo, task_dimension(GRID, shared).hi) == (3, 3)
    noisy = task_dimension(GRID, estimates(0.5, 1.0, 1.44, 1.5, 1.5, noise=0.05))
    assert noisy.lo <= 3 <= noisy.hi
    assert noisy.hi > 3


def test_what_the_estimates_do_not_show_is_no_number() -> None:
    rising = task_dimension(GRID, estimates(0.5, 0.8, 1.1, 1.4, 1.7))
    assert math.isnan(rising.k)
    assert (rising.lo, rising.hi) == (6, math.inf)
    assert rising.needs == "a plateau: k_z beyond 6"
    nothing = task_dimension(GRID, estimates(0.0, 0.01, 0.0, 0.0, 0.0))
    assert math.isnan(nothing.k)
    assert nothing.needs == "information above 0.02 nats"
    with pytest.raises(ValueError, match="give folds >= 2 x k_z"):
        task_dimension(GRID, np.ones((1, 5)))
    with pytest.raises(ValueError, match="NaN or inf"):
        task_dimension(GRID, np.full((2, 5), np.nan))


def test_the_report_compares_it_with_the_participation_ratio(make_grid) -> None:
    grid = make_grid(models=("pythia-70m",), ks=(8, 16), n_sequences=9)

    def section(geometry) -> str:
        text = compose(measure(grid.cells, grid.sequences, geometry, n_resamples=5), {}, preset="x", facts={})
        return text.split("## Task-relevant dimension by mutual information")[1].split("\n## ")[0]

    assert "It needs cells that measure it (`--set information=on`)" in section(grid.geometry)
    geometry = grid.geometry.set_index("layer")
    ceiling = math.log(128)
    for layer, share in ((1, (0.5, 1.0, 1.44, 1.5, 1.49)), (3, (2.0, 4.75, 4.8, 4.8, 4.8)), (5, (1, 2, 3, 4, 4.5))):
        for name, value in numbers(GRID, estimates(*share), np.array([2.0, 3.0]), ceiling).items():
            geometry.loc[layer, name] = value
    text = section(geometry.reset_index())
    assert "| 3 [3, 3] | 2.5 | 1.50 | 4.85 |" in text
    assert "| ≥ 2 [2, 2] |" in text
    assert "| – (≥ 6; no plateau) |" in text
    assert "In 1 of 3 layers the information is within 5% of the ceiling" in text
