"""The universal null is calibrated on noise and finds a circle; matching and images follow closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from ripser import ripser
from scipy import stats

from analysis.topology import stability
from analysis.topology.universal_null import universal_null


def _diagram(x_ND: np.ndarray) -> np.ndarray:
    return ripser(x_ND, maxdim=1)["dgms"][1]


def _circle(n: int, seed: int, noise: float = 0.1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) + noise * rng.normal(size=(n, 2))


def test_universal_null_formula_by_hand() -> None:
    pairs = np.array([[1.0, 2.0], [1.0, 1.5], [2.0, 9.0]])
    loglog = np.log(np.log([2.0, 1.5, 4.5]))
    expected = np.exp(-np.exp(loglog - loglog.mean() - 0.5772156649015329))
    result = universal_null(pairs)
    np.testing.assert_allclose(result.p, expected)
    np.testing.assert_allclose(result.bonferroni, np.minimum(1, 3 * expected))
    assert (result.benjamini_hochberg <= result.bonferroni + 1e-12).all()


def test_universal_null_on_noise_and_on_a_circle() -> None:
    noise = universal_null(_diagram(np.random.default_rng(0).uniform(size=(400, 2))))
    assert stats.kstest(noise.p, "uniform").statistic < 0.12
    assert noise.significant(0.01) == (0, 0)
    circle = _diagram(_circle(200, 1))
    result = universal_null(circle)
    assert result.significant(0.05)[0] == 1
    assert result.p.argmin() == (circle[:, 1] - circle[:, 0]).argmax()


def test_universal_null_counts_what_it_leaves_out() -> None:
    pairs = np.array([[0.0, 1.0], [1.0, np.inf], [1.0, 2.0], [1.0, 3.0]])
    assert universal_null(pairs).left_out == 2
    with pytest.raises(ValueError, match="1 of 3 loops"):
        universal_null(pairs[:3])


def test_largest_sorts_by_persistence() -> None:
    pairs = np.array([[0.0, 1.0], [0.5, 4.0], [0.2, np.inf], [1.0, 1.1]])
    np.testing.assert_array_equal(stability.largest(pairs, 2), [[0.5, 4.0], [0.0, 1.0]])
    assert stability.largest(np.empty((0, 2)), 3).shape == (0, 2)


@pytest.mark.parametrize(("distance", "expected"), [("bottleneck", 0.25), ("wasserstein", 0.3 * 2**-0.5 + 0.25)])
def test_matching_by_hand(distance: str, expected: float) -> None:
    a = np.array([[1.0, 3.0], [0.5, 0.8]])
    b = np.array([[1.0, 3.25]])
    result = stability.match([a, b], distance=distance)
    assert result.distance_MM[0, 1] == pytest.approx(expected, abs=1e-6)
    assert result.relative == pytest.approx(expected / 2.125, abs=1e-6)
    assert result.recurrence == 1.0


def test_a_loop_that_goes_away_does_not_recur() -> None:
    a, b = np.array([[1.0, 3.0]]), np.array([[0.1, 0.2]])
    result = stability.match([a, b])
    assert result.recurrence == 0.0
    assert result.distance_MM[0, 1] == pytest.approx(1.0, abs=1e-6)
    empty = np.empty((0, 2))
    assert stability.match([a, empty]).distance_MM[0, 1] == pytest.approx(1.0)
    assert stability.match([a, empty], distance="wasserstein").distance_MM[1, 0] == pytest.approx(2**0.5)
    assert stability.match([empty, empty]).relative == 0.0


def test_samples_of_a_circle_are_stable_and_samples_of_noise_are_not() -> None:
    circles = [_diagram(_circle(120, seed)) for seed in range(4)]
    clouds = [_diagram(np.random.default_rng(seed).uniform(size=(120, 2))) for seed in range(4)]
    assert stability.match(circles).recurrence == 1.0
    assert stability.match(circles).relative < stability.match(clouds).relative
    assert 2 * stability.birth_death(circles).spread < stability.birth_death(clouds).spread
    assert stability.image_cosine(circles) > 0.5


def test_birth_death_by_hand() -> None:
    spread = stability.birth_death([np.array([[1.0, 3.0]]), np.array([[2.0, 4.0]])])
    assert spread.birth_spread == pytest.approx(np.sqrt(0.5) / 2)
    assert spread.death_spread == spread.birth_spread == spread.spread
    assert stability.birth_death([np.empty((0, 2)), np.ones((1, 2))]).spread == np.inf


def test_equal_diagrams_have_equal_images_and_far_ones_do_not_overlap() -> None:
    a, b = np.array([[0.0, 1.0], [0.3, 0.9]]), np.array([[9.0, 10.0]])
    assert stability.image_cosine([a, a, a]) == pytest.approx(1.0)
    assert stability.image_cosine([a, b]) == pytest.approx(0.0, abs=1e-6)


def test_bad_input_is_a_one_line_error() -> None:
    a = np.array([[0.0, 1.0]])
    with pytest.raises(ValueError, match="1 diagrams; stability needs 2 or more"):
        stability.match([a])
    with pytest.raises(ValueError, match="distance='l2', count=10"):
        stability.match([a, a], distance="l2")
    with pytest.raises(ValueError, match="1 diagrams without loops"):
        stability.image_cosine([a, np.empty((0, 2))])
