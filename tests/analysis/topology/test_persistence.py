"""The exact H1 engine against ripser, closed forms and its own error rules; greedy landmarks."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.distance import pdist, squareform

from analysis.topology import distances
from analysis.topology.persistence import h1, landmarks, predicted_bytes


def bits(rng, n):
    return distances.jaccard(rng.random((n, 96)) < rng.beta(0.5, 3, size=96))


def counts(rng, n):
    return distances.tanimoto(rng.poisson(rng.gamma(0.4, 1.5, size=64), size=(n, 64)))


def physchem(rng, n):
    mass = rng.gamma(4, 50, n)
    columns = [mass, rng.poisson(mass / 80), rng.poisson(2, n), rng.poisson(1, n), mass * 0.3 + rng.normal(0, 9, n)]
    x = np.stack(columns, axis=1)
    return distances.euclidean((x - x.mean(0)) / x.std(0))


def gaussian(rng, n):
    return squareform(pdist(rng.normal(size=(n, 16))))


def integer_ties(rng, n):
    """Few distinct distances and, in a third of the draws, duplicate points: ties everywhere."""
    low = 0 if rng.random() < 1 / 3 else 1
    lower = np.tril(rng.integers(low, rng.integers(low + 1, 14), size=(n, n)), -1)
    return (lower + lower.T).astype(np.float64)


def ring(n):
    angle = 2 * np.pi * np.arange(n) / n
    return squareform(pdist(np.stack([np.cos(angle), np.sin(angle)], axis=1)))


def assert_equals_ripser(d):
    assert_array_equal(h1(d), h1(d, backend="ripser"))


@pytest.mark.parametrize("kind", [bits, counts, physchem, gaussian])
@pytest.mark.parametrize("n", [40, 90, 260])
def test_pairs_equal_ripser_on_every_data_type(kind, n):
    d = kind(np.random.default_rng(n), n)
    assert len(h1(d)) > 0
    assert_equals_ripser(d)


def test_pairs_equal_ripser_on_tie_heavy_matrices():
    rng = np.random.default_rng(1)
    for n in [*np.geomspace(3, 120, 190), *np.linspace(130, 300, 10)]:  # ripser's time is all in the largest
        assert_equals_ripser(integer_ties(rng, int(n)))


@pytest.mark.slow
def test_pairs_equal_ripser_on_larger_tie_heavy_matrices():
    rng = np.random.default_rng(2)
    for _ in range(200):
        assert_equals_ripser(integer_ties(rng, int(rng.integers(90, 201))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [bits, counts, physchem, gaussian])
def test_pairs_equal_ripser_at_a_thousand_rows(kind):
    assert_equals_ripser(kind(np.random.default_rng(3), 1000))


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_points_have_no_loop(n):
    for backend in ("exact", "ripser"):
        loops = h1(np.ones((n, n)) - np.eye(n), backend=backend)
        assert loops.shape == (0, 2)
        assert loops.dtype == np.float32


def test_points_that_all_coincide_have_no_loop():
    assert h1(np.zeros((70, 70))).shape == (0, 2)
    assert h1(np.ones((70, 70)) - np.eye(70)).shape == (0, 2)


@pytest.mark.parametrize("n", [6, 9, 12, 30, 99])
def test_regular_polygon(n):
    """Birth is the side; the loop dies with the inscribed equilateral triangle (Adamaszek & Adams 2017)."""
    assert_allclose(h1(ring(n)), [[2 * np.sin(np.pi / n), np.sqrt(3)]], rtol=1e-6)


def test_duplicating_points_changes_nothing():
    d = gaussian(np.random.default_rng(4), 60)
    twice = np.concatenate([np.arange(60), np.arange(0, 60, 3)])
    assert_array_equal(h1(d[np.ix_(twice, twice)]), h1(d))


def test_order_of_the_points_does_not_matter():
    rng = np.random.default_rng(5)
    d = integer_ties(rng, 80)
    p = rng.permutation(80)
    assert_array_equal(h1(d[np.ix_(p, p)]), h1(d))


def test_monotone_change_of_the_distances_maps_the_pairs():
    d = gaussian(np.random.default_rng(6), 80).astype(np.float32)
    assert_array_equal(h1(d * np.float32(8)), h1(d) * np.float32(8))
    assert_array_equal(h1(np.sqrt(d)), np.sqrt(h1(d)))


def test_projective_plane_has_one_loop_over_z2():
    """RP2 on 6 vertices (the hemi-icosahedron); its barycentric subdivision is a flag complex, so Rips at 1 is RP2."""
    triangles = ["012", "023", "034", "045", "015", "124", "235", "134", "245", "135"]
    simplices = sorted(
        {frozenset(face) for t in triangles for size in (1, 2, 3) for face in itertools.combinations(t, size)},
        key=lambda s: (len(s), sorted(s)),
    )
    assert len(simplices) == 6 + 15 + 10
    d = np.array([[0.0 if a == b else 1.0 if a < b or b < a else 2.0 for b in simplices] for a in simplices])
    assert_array_equal(h1(d), [[1, 2]])


def test_two_rings_far_apart_give_two_loops():
    d = np.full((24, 24), 10.0)
    d[:12, :12] = d[12:, 12:] = ring(12)
    pair = [2 * np.sin(np.pi / 12), np.sqrt(3)]
    assert_allclose(h1(d), [pair, pair], rtol=1e-6)


def test_pairs_are_sorted_and_float32():
    loops = h1(gaussian(np.random.default_rng(7), 120))
    assert loops.dtype == np.float32
    assert_array_equal(loops, sorted(loops.tolist()))
    assert (loops[:, 1] > loops[:, 0]).all()


def test_threads_give_the_same_pairs():
    matrices = [gaussian(np.random.default_rng(s), 150) for s in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for alone, together in zip(map(h1, matrices), pool.map(h1, matrices), strict=True):
            assert_array_equal(alone, together)


def test_input_is_left_alone():
    d = gaussian(np.random.default_rng(8), 40).astype(np.float32)
    before = d.copy()
    h1(d)
    assert_array_equal(d, before)


def test_negative_zero_is_zero():
    d = ring(12)
    np.fill_diagonal(d, -0.0)
    assert_array_equal(h1(d), h1(ring(12)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({(3, 7): np.nan}, r"distance_matrix\[3, 7\] = nan; distances must be finite in float32; drop or impute row 3"),
        ({(7, 3): np.nan}, r"distance_matrix\[7, 3\] = nan; distances must be finite"),
        ({(5, 2): np.inf, (2, 5): np.inf}, r"distance_matrix\[\d, \d\] = inf; distances must be finite"),
        ({(5, 2): 1e39, (2, 5): 1e39}, r"= 1e\+39; distances must be finite in float32"),
        ({(5, 2): -1.0, (2, 5): -1.0}, r"= -1.0; distances must be >= 0; check the metric"),
        ({(4, 1): 0.5}, r"= 0.5 but distance_matrix\[1, 4\] = .*; distances must be symmetric; pass \(D \+ D.T\) / 2"),
        ({(6, 6): 0.25}, r"distance_matrix\[6, 6\] = 0.25; the diagonal must be 0; set it to 0"),
        ({(6, 6): np.nan}, r"distance_matrix\[6, 6\] = nan; distances must be finite"),
    ],
)
@pytest.mark.parametrize("backend", ["exact", "ripser"])
def test_bad_entries_are_named(entries, message, backend):
    d = ring(12)
    for place, value in entries.items():
        d[place] = value
    with pytest.raises(ValueError, match=message):
        h1(d, backend=backend)


def test_bad_shapes_and_backends_are_named():
    with pytest.raises(ValueError, match=r"shape \[3, 4\]; it must be square"):
        h1(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        h1(np.zeros(3))
    with pytest.raises(ValueError, match="backend='gudhi' is unknown; choose one of exact, ripser"):
        h1(ring(6), backend="gudhi")  # type: ignore[arg-type]


def test_a_run_that_will_not_fit_is_refused_with_advice():
    with pytest.raises(
        MemoryError, match=r"H1 of 120 rows needs up to .* MiB may be used; subsample or take .* to about 60 "
    ):
        h1(ring(120), max_bytes=predicted_bytes(120) // 4)
    assert len(h1(ring(120), max_bytes=predicted_bytes(120))) == 1


def test_landmarks_are_greedy_farthest_points():
    rng = np.random.default_rng(9)
    x = rng.integers(0, 5, size=(40, 2))
    d = squareform(pdist(x))
    chosen = landmarks(d, 12, seed=3)
    assert chosen[0] == np.random.default_rng(3).integers(40)
    for i in range(1, 12):
        gap = d[:, chosen[:i]].min(axis=1)
        assert chosen[i] == np.flatnonzero(gap == gap.max())[0]


def test_landmarks_beyond_the_distinct_points_repeat_points_at_distance_zero():
    d = np.abs(np.subtract.outer([0.0, 0, 1, 1, 5], [0.0, 0, 1, 1, 5]))
    chosen = landmarks(d, 5, seed=0)
    assert len(set(chosen[:3])) == 3
    assert (d[:, chosen[:3]].min(axis=1) == 0).all()


@pytest.mark.parametrize("n", [0, -1, 13])
def test_landmark_counts_out_of_range_are_named(n):
    with pytest.raises(ValueError, match=rf"n={n} landmarks of 12 rows; n must lie in 1..12"):
        landmarks(ring(12), n, seed=0)
