"""Blocks against slow definitions, ΔR² against planted effects, and bad input as one-line errors."""

from __future__ import annotations

import numpy as np
import pytest
from ripser import ripser
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesRegressor

from analysis import utility


def _h1(distance: np.ndarray) -> np.ndarray:
    return ripser(distance, distance_matrix=True, maxdim=1)["dgms"][1]


def _cloud(n: int = 60, dim: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x_ND = np.random.default_rng(seed).normal(size=(n, dim))
    return x_ND, cdist(x_ND, x_ND)


def test_patches_are_the_nearest_rows_with_ties_by_row_number() -> None:
    _, distance_NN = _cloud()
    patches_NP = utility.patches(distance_NN, 7)
    for i, patch in enumerate(patches_NP):
        assert patch[0] == i
        others = np.delete(distance_NN[i], i)
        np.testing.assert_allclose(distance_NN[i, patch[1:]], np.sort(others)[:7])
    tied = utility.patches(np.ones((5, 5)) - np.eye(5), 3)
    np.testing.assert_array_equal(tied[2], [2, 0, 1, 3])
    duplicates = utility.patches(np.zeros((4, 4)), 2)
    np.testing.assert_array_equal(duplicates[3], [3, 0, 1])


def test_geometry_block_equals_its_definition() -> None:
    x_ND, distance_NN = _cloud()
    patches_NP = utility.patches(distance_NN, 12)
    block = utility.geometry_block(distance_NN, x_ND, patches_NP, chunk=7)
    assert block.shape == (60, len(utility.GEOMETRY))
    named = dict(zip(utility.GEOMETRY, block.T, strict=True))
    for i in (0, 17, 59):
        patch, near = patches_NP[i], distance_NN[i, patches_NP[i, 1:]]
        inner = cdist(x_ND[patch], x_ND[patch])[np.triu_indices(13, 1)]
        pca = PCA().fit(x_ND[patch])
        assert named["neighbour_mean"][i] == pytest.approx(near.mean())
        assert named["neighbour_std"][i] == pytest.approx(near.std())
        assert named["neighbour_p90"][i] == pytest.approx(np.quantile(near, 0.9))
        assert named["neighbour_max"][i] == pytest.approx(near.max())
        assert named["patch_mean"][i] == pytest.approx(inner.mean())
        assert named["patch_std"][i] == pytest.approx(inner.std())
        assert named["density"][i] == pytest.approx(1 / near.mean(), rel=1e-6)
        spectrum = pca.explained_variance_
        assert named["participation_ratio"][i] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum())
        assert named["pca3_residual"][i] == pytest.approx(1 - pca.explained_variance_ratio_[:3].sum())


def test_a_line_has_one_dimension_and_identical_points_stay_finite() -> None:
    x_ND = np.linspace(0, 1, 20)[:, None] * np.ones(4)
    distance_NN = cdist(x_ND, x_ND)
    block = utility.geometry_block(distance_NN, x_ND, utility.patches(distance_NN, 6))
    np.testing.assert_allclose(block[:, 7], 1.0)
    np.testing.assert_allclose(block[:, 8], 0.0, atol=1e-12)
    same = utility.geometry_block(np.zeros((9, 9)), np.ones((9, 3)), utility.patches(np.zeros((9, 9)), 4))
    assert np.isfinite(same).all()
    np.testing.assert_array_equal(same[:, 7:], 0.0)


def test_topology_block_of_a_circle_and_of_a_line() -> None:
    angle = 2 * np.pi * np.arange(12) / 12
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    distance_NN = cdist(circle, circle)
    block = utility.topology_block(distance_NN, utility.patches(distance_NN, 11), _h1)
    life = np.sqrt(3) - 2 * np.sin(np.pi / 12)
    np.testing.assert_allclose(block, np.tile([1, life, life, life, life], (12, 1)), atol=1e-6)
    line = cdist(np.arange(12.0)[:, None], np.arange(12.0)[:, None])
    assert not utility.topology_block(line, utility.patches(line, 5), _h1).any()


def test_targets_by_hand() -> None:
    labels_NL = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]])
    patches_NP = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    jaccard, common, entropy = utility.targets(labels_NL, patches_NP).T
    np.testing.assert_allclose(jaccard, [(1 / 2 + 0) / 2, (1 / 2 + 0) / 2, 0])
    np.testing.assert_allclose(common, [0.5, 0.5, 0.0])
    quarter = -(0.5 * np.log2(0.5) * 2)
    np.testing.assert_allclose(entropy, [quarter, quarter, (0 + quarter) / 2])


def _planted(effect: float, n: int = 150, seed: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    geometry, topology = rng.normal(size=(n, 9)), rng.normal(size=(n, 5))
    signal = geometry[:, :1] + effect * topology[:, :1]
    return geometry, topology, signal + rng.normal(size=(n, 3))


@pytest.mark.parametrize("family", ["ridge", "trees"])
def test_a_planted_effect_is_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "REPEATS", 1)
    permutations = 19 if family == "ridge" else 0
    for result in utility.compare(*_planted(1.0), family=family, permutations=permutations):
        assert result.delta > 0.1
        assert result.delta_lo < result.delta < result.delta_hi
        assert family == "trees" or result.delta_lo > 0
        assert result.delta == pytest.approx(result.r2_both - result.r2_geometry)
        assert result.p == (pytest.approx(1 / 20) if permutations else None)


def test_without_effect_the_permutation_p_is_spread_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "REPEATS", 1)
    results = [r for seed in range(6) for r in utility.compare(*_planted(0.0, 80, seed), permutations=19)]
    assert [r.target for r in results[:3]] == list(utility.TARGETS)
    assert all(r.delta_lo < 0.05 for r in results)
    p_values = np.array([r.p for r in results])
    assert p_values.mean() == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / len(results)))
    assert p_values.min() < 0.35
    assert p_values.max() > 0.65


def test_runs_moved_together_keep_the_likeness_of_neighbouring_rows() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(600)
    drift = np.empty(600)
    drift[order] = np.convolve(rng.normal(size=607), np.ones(8), "valid")

    def likeness(values: np.ndarray) -> float:
        along = values[order]
        return float(np.corrcoef(along[:-1], along[1:])[0, 1])

    assert likeness(drift) > 0.8
    assert likeness(drift[utility._permutation(600, order, 40, rng)]) > 0.75
    assert abs(likeness(drift[utility._permutation(600, None, 40, rng)])) < 0.15


def test_permutations_are_permutations_that_keep_runs_together() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(50)
    moved = utility._permutation(50, order, 10, rng)
    assert sorted(moved) == list(range(50))
    place = np.argsort(order)
    steps = np.diff(place[moved[order]]) % 50
    assert (steps != 1).sum() <= 4
    assert sorted(utility._permutation(50, None, 10, rng)) == list(range(50))


def test_block_order_puts_clusters_together() -> None:
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat([0, 1, 2], 10))
    x_ND = 50.0 * label[:, None] + rng.normal(size=(30, 2))
    order = utility.block_order(cdist(x_ND, x_ND))
    assert (np.diff(label[order]) != 0).sum() == 2


def test_splits_are_shared_so_an_empty_block_changes_nothing() -> None:
    geometry, _, target = _planted(0.0)
    for result in utility.compare(geometry, np.zeros((150, 5)), target):
        assert result.delta == pytest.approx(0.0, abs=1e-9)
        assert result.delta_hi - result.delta_lo == pytest.approx(0.0, abs=1e-9)


def test_grouped_folds_are_partitions_that_no_group_straddles() -> None:
    rng = np.random.default_rng(0)
    groups_N = np.array([f"g{g}" for g in rng.permutation(np.repeat(np.arange(40), rng.integers(1, 9, 40)))])
    n = len(groups_N)
    splits = utility.folds(n, groups_N)
    assert len(splits) == utility.FOLDS * utility.REPEATS
    for train, test in splits:
        assert not set(groups_N[train]) & set(groups_N[test])
        assert sorted([*train, *test]) == list(range(n))
        assert len(test) == pytest.approx(n / utility.FOLDS, rel=0.15)
    for repeat in range(utility.REPEATS):
        tests = [test for _, test in splits[repeat * utility.FOLDS : (repeat + 1) * utility.FOLDS]]
        assert sorted(np.concatenate(tests)) == list(range(n))
    assert any(sorted(splits[0][1]) != sorted(test) for _, test in splits[utility.FOLDS : 2 * utility.FOLDS])


def test_a_group_larger_than_a_fold_is_a_fold_alone() -> None:
    groups_N = np.array([0] * 60 + list(range(1, 101)))
    for train, test in utility.folds(160, groups_N):
        assert len(test) in (25, 60)
        assert len(train) + len(test) == 160


def test_random_folds_are_the_published_ones() -> None:
    from sklearn.model_selection import RepeatedKFold

    published = RepeatedKFold(n_splits=5, n_repeats=3, random_state=0).split(np.zeros(37))
    for ours, theirs in zip(utility.folds(37), published, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_neighbours_in_training_by_hand() -> None:
    patches_NP = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 2, 1]])
    splits = [(np.array([1, 3]), np.array([0, 2])), (np.array([0]), np.array([3]))]
    assert utility.neighbours_in_training(patches_NP, splits) == pytest.approx((0.5 + 0.0) / 2)


def test_copies_of_test_rows_in_training_are_what_grouped_folds_take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row four times, topology tells the copies apart, the target is noise: only leaks can be learned."""

    def forest(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
        return ExtraTreesRegressor(20, random_state=0).fit(x, y).predict(x_test)

    monkeypatch.setattr(utility, "FAMILIES", {"forest": forest})
    monkeypatch.setattr(utility, "REPEATS", 1)
    rng = np.random.default_rng(0)
    copy_N = np.repeat(np.arange(60), 4)
    geometry = rng.normal(size=(240, 9))
    topology = rng.normal(size=(60, 5))[copy_N]
    target = rng.normal(size=(60, 3))[copy_N]
    leaky = utility.compare(geometry, topology, target, family="forest")
    honest = utility.compare(geometry, topology, target, family="forest", groups_N=copy_N)
    assert min(r.r2_both for r in leaky) > 0.3
    assert max(r.r2_both for r in honest) < 0.1


def test_bad_input_is_a_one_line_error() -> None:
    _, distance_NN = _cloud(20)
    with pytest.raises(ValueError, match="k=20 neighbours for n=20 rows; choose 1 <= k <= n - 1"):
        utility.patches(distance_NN, 20)
    with pytest.raises(ValueError, match="give a square matrix"):
        utility.patches(distance_NN[:5], 2)
    patches_NP = utility.patches(distance_NN, 5)
    with pytest.raises(ValueError, match="labels of one class explain nothing"):
        utility.targets(np.ones((20, 4), int), patches_NP)
    with pytest.raises(ValueError, match="give a 0/1 matrix"):
        utility.targets(np.full((20, 2), 3), patches_NP)
    blocks = np.ones((20, 9)), np.ones((20, 5)), np.ones((20, 3))
    with pytest.raises(ValueError, match="family='boost'; choose one of"):
        utility.compare(*blocks, family="boost")
    with pytest.raises(ValueError, match="20 geometry, 19 topology and 20 target rows"):
        utility.compare(blocks[0], blocks[1][:19], blocks[2])
    with pytest.raises(ValueError, match="9 rows for 5 folds; give at least 10"):
        utility.folds(9)
    with pytest.raises(ValueError, match="20 group labels of 4 groups for 20 rows and 5 folds"):
        utility.folds(20, np.arange(20) % 4)
    with pytest.raises(ValueError, match="permutations=-5; choose permutations >= 0"):
        utility.compare(*blocks, permutations=-5)
    with pytest.raises(ValueError, match="block=5 cuts 20 rows into 4 runs; choose block <= 4"):
        utility.compare(*blocks, permutations=1, order_N=np.arange(20), block=5)
