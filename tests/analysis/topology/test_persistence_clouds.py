"""Low-dimensional clouds: long reduction chains, where the buffers of the exact engine grow and fill up."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.topology.distances import distance_matrix
from analysis.topology.persistence import h1


def torus(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0, 2 * np.pi, (2, n))
    points = np.stack([(2 + np.cos(b)) * np.cos(a), (2 + np.cos(b)) * np.sin(a), np.sin(b)], 1)
    return points + rng.normal(0, 0.05, points.shape)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("n", [60, 240])
def test_gaussian_blobs_equal_ripser(dimensions: int, n: int) -> None:
    for seed in range(4):
        distance = distance_matrix(np.random.default_rng(seed).normal(size=(n, dimensions)), "euclidean")
        assert np.array_equal(h1(distance), h1(distance, backend="ripser"))


def test_torus_equals_ripser() -> None:
    for seed in range(8):
        distance = distance_matrix(torus(240, seed), "euclidean")
        assert np.array_equal(h1(distance), h1(distance, backend="ripser"))
