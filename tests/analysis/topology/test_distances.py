"""Distance kernels against SciPy in float64, and their rules."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import cdist, pdist, squareform
from sklearn.metrics import pairwise_distances

from analysis.topology import distances


@pytest.mark.parametrize("d", [1, 7, 63, 64, 65, 500])
def test_jaccard_is_scipys_to_the_last_bit(d):
    rng = np.random.default_rng(d)
    x = rng.random((70, d)) < rng.beta(0.5, 2, size=d)
    x[3] = x[4] = False
    x[5] = x[6]
    expected = pairwise_distances(x, metric="jaccard").astype(np.float32)
    assert expected[3, 4] == 0
    assert_array_equal(distances.jaccard(x), expected)
    assert_array_equal(distances.jaccard(x.astype(np.int8)), expected)


def test_tanimoto_is_its_formula_in_exact_integers():
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.3, 2, size=50), size=(60, 50))
    x[3] = x[4] = 0
    x[5] = x[6]
    inner = x @ x.T
    norm = np.diag(inner)
    denominator = norm[:, None] + norm[None] - inner
    expected = np.where(denominator > 0, 1 - inner / np.maximum(denominator, 1), 0)
    assert_array_equal(distances.tanimoto(x), expected.astype(np.float32))
    assert_array_equal(distances.tanimoto(x.astype(np.float32)), distances.tanimoto(x))


def test_tanimoto_of_bits_is_jaccard():
    x = np.random.default_rng(1).random((50, 80)) < 0.2
    assert_allclose(distances.tanimoto(x), distances.jaccard(x), atol=1e-7)


def test_tanimoto_does_not_overflow_small_integer_types():
    x = np.full((2, 40), 200, np.uint8)
    x[1, :20] = 0
    assert_allclose(distances.tanimoto(x)[0, 1], 0.5)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("rank", [3, 64])
def test_euclidean_keeps_float32_accuracy_for_close_and_offset_points(offset, rank):
    rng = np.random.default_rng(rank)
    x = rng.normal(size=(80, rank)) @ rng.normal(size=(rank, 96)) + offset
    x[40:] = x[:40] + 1e-4 * rng.normal(size=(40, 96))
    x[0] = x[1]
    got = distances.euclidean(x)
    assert got[0, 1] == 0
    assert_allclose(got, squareform(pdist(x)), rtol=3e-6)


def test_cosine_keeps_float32_accuracy_for_close_directions():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 48))
    x[30:] = x[:30] * rng.uniform(0.1, 9, size=(30, 1)) + 1e-4 * rng.normal(size=(30, 48))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert_allclose(distances.cosine(x), cdist(unit, unit, "sqeuclidean") / 2, rtol=1e-5)
    assert_allclose(distances.cosine(x), cdist(x, x, "cosine"), atol=1e-6)


@pytest.mark.parametrize("metric", distances.METRICS)
def test_every_metric_is_symmetric_with_zero_diagonal(metric):
    x = (np.random.default_rng(3).random((33, 20)) < 0.5).astype(np.int64)
    x[:, 0] = 1
    d = distances.distance_matrix(x, metric)
    assert d.dtype == np.float32
    assert d.shape == (33, 33)
    assert_array_equal(d, d.T)
    assert_array_equal(np.diag(d), 0)
    assert (d >= 0).all()
    assert distances.distance_matrix(x[:0], metric).shape == (0, 0)


@pytest.mark.parametrize(
    ("metric", "value", "message"),
    [
        ("jaccard", 2.0, r"x\[1, 2\] = 2.0; bits must be 0 or 1; pass x > 0, or treat x as counts"),
        ("tanimoto", 0.5, r"x\[1, 2\] = 0.5; counts must be whole numbers; treat x as reals"),
        ("tanimoto", np.nan, r"x\[1, 2\] = nan; counts must be whole numbers"),
        ("tanimoto", -1.0, r"x\[1, 2\] = -1; counts must be >= 0"),
        ("euclidean", np.nan, r"x\[1, 2\] = nan; entries must be finite; drop or impute row 1"),
        ("cosine", np.inf, r"x\[1, 2\] = inf; entries must be finite"),
    ],
)
def test_unsuitable_entries_are_named(metric, value, message):
    x = np.ones((4, 5))
    x[1, 2] = value
    with pytest.raises(ValueError, match=message):
        distances.distance_matrix(x, metric)


def test_unsuitable_rows_shapes_and_names_are_named():
    with pytest.raises(ValueError, match="row 2 is all zeros; cosine distance needs a direction"):
        distances.cosine(np.eye(4)[[0, 1, 2, 3]] * [1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"x has shape \[5\]; it must be \[rows, columns\]"):
        distances.euclidean(np.ones(5))
    with pytest.raises(ValueError, match="metric='hamming' is unknown; choose one of jaccard, tanimoto"):
        distances.distance_matrix(np.ones((3, 3)), "hamming")
