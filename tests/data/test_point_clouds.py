"""Each cloud has the loops it claims, by ripser's diagrams; draws depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from ripser import ripser

from data import point_clouds


def _persistence(x_ND: np.ndarray) -> np.ndarray:
    pairs = ripser(x_ND, maxdim=1)["dgms"][1]
    return np.sort(pairs[:, 1] - pairs[:, 0])[::-1]


@pytest.mark.parametrize(("name", "n", "gap"), [("circle", 200, 3.0), ("figure_eight", 250, 2.0), ("torus", 500, 1.4)])
def test_the_known_loops_stand_apart_from_the_rest(name: str, n: int, gap: float) -> None:
    cloud = point_clouds.CLOUDS[name]
    life = _persistence(cloud.sample(n, 3))
    assert life[cloud.loops - 1] > gap * life[cloud.loops]


def test_blob_has_no_loop_that_stands_apart() -> None:
    life = _persistence(point_clouds.gaussian_blob(200, 0))
    assert life[0] < 2 * life[1]


@pytest.mark.parametrize("name", sorted(point_clouds.CLOUDS))
def test_same_seed_same_points(name: str) -> None:
    sample = point_clouds.CLOUDS[name].sample
    np.testing.assert_array_equal(sample(40, 1), sample(40, 1))
    assert not np.array_equal(sample(40, 1), sample(40, 2))


def test_torus_is_uniform_by_area() -> None:
    x_ND = point_clouds.torus(20_000, 0, noise=0.0)
    inside = np.hypot(x_ND[:, 0], x_ND[:, 1]) < 2.0
    # area share of the inner half: (π·major − 2·minor) / (2π·major)
    expected = (np.pi * 2.0 - 2 * 1.0) / (2 * np.pi * 2.0)
    assert inside.mean() == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 20_000))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"n=0, noise=0\.05; choose n >= 1"):
        point_clouds.circle(0, 0)
    with pytest.raises(ValueError, match=r"minor=3\.0, major=2\.0"):
        point_clouds.torus(10, 0, minor=3.0)
    with pytest.raises(ValueError, match="dim=0"):
        point_clouds.gaussian_blob(5, 0, dim=0)
