"""Blocks against slow definitions, gains against planted effects and patch noise, bad input as one-line errors."""

from __future__ import annotations

import numpy as np
import pytest
from ripser import ripser
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import RepeatedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from analysis.topology import utility, utility_folds, utility_models


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
    monkeypatch.setattr(utility_folds, "REPEATS", 1)
    alone_NP, draws = np.arange(150)[:, None], 39 if family == "ridge" else 1
    splits = utility_folds.folds(150)
    for result in utility.compare(
        *_planted(1.0), family=family, permutations=draws, patches_NP=alone_NP, splits=splits
    ):
        assert result.delta > 0.1
        assert result.gain == pytest.approx(result.r2_both - result.r2_geometry)
        assert result.delta == pytest.approx(result.gain - result.control)
        if family == "ridge":
            assert result.control_lo < result.control < result.control_hi < result.gain
            assert result.p == pytest.approx(1 / 40)
        else:
            assert np.isnan(result.p)
            assert result.why == "needs ≥ 19 draws"


def test_without_effect_the_p_of_independent_rows_is_spread_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility_folds, "REPEATS", 1)
    alone_NP, splits = np.arange(80)[:, None], utility_folds.folds(80)
    results = [
        r
        for seed in range(6)
        for r in utility.compare(*_planted(0.0, 80, seed), permutations=19, patches_NP=alone_NP, splits=splits)
    ]
    assert [r.target for r in results[:3]] == list(utility.TARGETS)
    p_values = np.array([r.p for r in results])
    assert p_values.mean() == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / len(results)))
    assert p_values.min() < 0.35
    assert p_values.max() > 0.65


def test_without_patches_there_is_a_gain_and_neither_p_nor_interval() -> None:
    geometry, topology, target = _planted(1.0)
    old = {"order_N": np.arange(150), "block": 10, "groups_N": np.arange(150) // 3}
    for result in utility.compare(geometry, topology, target, permutations=19, **old):
        assert result.delta == result.gain > 0.1
        assert np.isnan([result.p, result.delta_lo, result.delta_hi, result.control]).all()
        assert result.why.startswith("needs patches")
    assert utility.compare(geometry, topology, target)[0].p is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'permutation'"):
        utility.compare(geometry, topology, target, permutation=19)


def patch_noise_world(
    n: int, k: int, seed: int, effect: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Geometry, noise per molecule averaged over patches, targets that share theirs likewise, and the patches."""
    rng = np.random.default_rng(seed)
    x_ND = rng.normal(size=(n, 2))
    distance_NN = cdist(x_ND, x_ND)
    patches_NP = utility.patches(distance_NN, k)
    geometry = utility.geometry_block(distance_NN, x_ND, patches_NP)
    topology, noise = (rng.normal(size=(n, columns))[patches_NP].mean(axis=1) for columns in (5, 3))
    target = noise / noise.std(axis=0) + np.sin(x_ND[:, :1]) + effect * topology[:, :1] / topology[:, 0].std()
    return geometry, topology, target, patches_NP


def test_patch_noise_gains_under_random_folds_and_is_no_finding_under_neighbourhood_folds() -> None:
    """The old test called such noise significant in 28 to 73% of trials."""
    p_values, deltas, above, leaky = [], [], 0, []
    for seed in range(12):
        *blocks, patches_NP = patch_noise_world(160, 8, seed)
        results = utility.compare(*blocks, patches_NP=patches_NP, permutations=39, seed=seed)
        p_values += [r.p for r in results]
        deltas += [r.delta for r in results]
        above += sum(r.gain > r.control_hi for r in results)
        leaky += [r.gain for r in utility.compare(*blocks)]
    assert np.mean(leaky) > 0.03
    assert abs(np.mean(deltas)) < 0.1
    assert stats.binom.sf(int((np.array(p_values) <= 0.05).sum()) - 1, len(p_values), 0.05) > 0.01
    assert stats.binom.sf(above - 1, len(p_values), 0.025) > 0.01
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.2)


def test_topology_that_says_something_is_found_beyond_patch_noise() -> None:
    *blocks, patches_NP = patch_noise_world(400, 8, 0, effect=1.0)
    for result in utility.compare(*blocks, patches_NP=patches_NP, permutations=39):
        assert result.p == pytest.approx(1 / 40)
        assert result.delta > 0.15


def test_folds_that_share_molecules_have_a_control_but_no_p() -> None:
    *blocks, patches_NP = patch_noise_world(160, 8, 0)
    splits = utility_folds.folds(160)
    for result in utility.compare(*blocks, patches_NP=patches_NP, permutations=39, splits=splits):
        assert np.isnan(result.p)
        assert result.why == "needs folds that share no molecules"
        assert result.control_lo < result.control < result.control_hi


def test_patch_noise_has_the_margins_of_topology_and_the_sharing_of_patches() -> None:
    _, topology, _, patches_NP = patch_noise_world(300, 8, 1)
    topology = np.exp(topology @ np.triu(np.ones((5, 5))))  # skewed and correlated
    drawn = utility.PatchNoise(topology, patches_NP).draw(np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(topology, axis=0))

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(stats.spearmanr(a, b).statistic)

    assert correlation(drawn[:, 3], drawn[:, 4]) == pytest.approx(correlation(topology[:, 3], topology[:, 4]), abs=0.1)
    shared = utility_folds.shared_molecules(patches_NP).toarray()
    np.testing.assert_array_equal(
        shared[:40, :40], [[len(set(a) & set(b)) for b in patches_NP[:40]] for a in patches_NP[:40]]
    )
    i, j = np.triu_indices(300, 1)
    for least in (1, 5, 7):
        near = shared[i, j] >= least
        own = correlation(topology[i[near], 0], topology[j[near], 0])
        assert correlation(drawn[i[near], 0], drawn[j[near], 0]) == pytest.approx(own, abs=0.12)


def test_neighbourhood_folds_share_no_molecule_and_test_every_row_once() -> None:
    *_, patches_NP = patch_noise_world(300, 8, 2)
    splits = utility_folds.neighbourhood_folds(patches_NP)
    for train, test in splits:
        assert not set(patches_NP[train].ravel()) & set(patches_NP[test].ravel())
        assert len(test) <= 9
    assert sorted(np.concatenate([test for _, test in splits])) == list(range(300))
    assert not utility_folds.share_molecules(patches_NP, splits)
    assert utility_folds.share_molecules(patches_NP, utility_folds.folds(300))
    assert utility_folds.neighbours_in_training(patches_NP, splits) == 0
    found = utility_folds.reach(splits)
    assert (found.folds, found.tested) == (len(splits), 300)
    assert found.fewest_training == min(len(train) for train, _ in splits) >= 30


def test_ridge_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x_BnC = rng.normal(size=(3, 60, 14)) * np.logspace(-3, 3, 14)
    x_BnC[1, :, 3], x_BnC[2, :, 5] = x_BnC[1, :, 2], 7.0  # a repeated and a constant column
    y_nY = x_BnC[0, :, :1] * 500 + rng.normal(size=(60, 3)) * [0.1, 1, 10]
    found = utility_models.ridge(x_BnC[:, :40], y_nY[:40], x_BnC[:, 40:])
    for x_nC, predicted in zip(x_BnC, found, strict=True):
        slow = make_pipeline(StandardScaler(), RidgeCV(utility_models.ALPHAS, alpha_per_target=True))
        np.testing.assert_allclose(predicted, slow.fit(x_nC[:40], y_nY[:40]).predict(x_nC[40:]), atol=1e-9)


def test_splits_are_shared_so_an_empty_block_changes_nothing() -> None:
    geometry, _, target = _planted(0.0)
    alone_NP, splits = np.arange(150)[:, None], utility_folds.folds(150)
    for result in utility.compare(
        geometry, np.zeros((150, 5)), target, permutations=39, patches_NP=alone_NP, splits=splits
    ):
        assert result.delta == pytest.approx(0.0, abs=1e-9)
        assert result.control_hi - result.control_lo == pytest.approx(0.0, abs=1e-9)


def test_grouped_folds_are_partitions_that_no_group_straddles() -> None:
    rng = np.random.default_rng(0)
    groups_N = np.array([f"g{g}" for g in rng.permutation(np.repeat(np.arange(40), rng.integers(1, 9, 40)))])
    n = len(groups_N)
    splits = utility_folds.folds(n, groups_N)
    assert len(splits) == utility_folds.FOLDS * utility_folds.REPEATS
    for train, test in splits:
        assert not set(groups_N[train]) & set(groups_N[test])
        assert sorted([*train, *test]) == list(range(n))
        assert len(test) == pytest.approx(n / utility_folds.FOLDS, rel=0.15)
    for repeat in range(utility_folds.REPEATS):
        tests = [test for _, test in splits[repeat * utility_folds.FOLDS : (repeat + 1) * utility_folds.FOLDS]]
        assert sorted(np.concatenate(tests)) == list(range(n))
    assert any(
        sorted(splits[0][1]) != sorted(test) for _, test in splits[utility_folds.FOLDS : 2 * utility_folds.FOLDS]
    )


def test_a_group_larger_than_a_fold_is_a_fold_alone() -> None:
    groups_N = np.array([0] * 60 + list(range(1, 101)))
    for train, test in utility_folds.folds(160, groups_N):
        assert len(test) in (25, 60)
        assert len(train) + len(test) == 160


def test_random_folds_are_the_published_ones() -> None:
    published = RepeatedKFold(n_splits=5, n_repeats=3, random_state=0).split(np.zeros(37))
    for ours, theirs in zip(utility_folds.folds(37), published, strict=True):
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_neighbours_in_training_by_hand() -> None:
    patches_NP = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 2, 1]])
    splits = [(np.array([1, 3]), np.array([0, 2])), (np.array([0]), np.array([3]))]
    assert utility_folds.neighbours_in_training(patches_NP, splits) == pytest.approx((0.5 + 0.0) / 2)


def test_copies_of_test_rows_in_training_are_what_grouped_folds_take_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row four times, topology tells the copies apart, the target is noise: only leaks can be learned."""

    def forest(x_BnC: np.ndarray, y_nY: np.ndarray, x_BmC: np.ndarray) -> np.ndarray:
        model = ExtraTreesRegressor(20, random_state=0)
        return np.stack([model.fit(x, y_nY).predict(x_test) for x, x_test in zip(x_BnC, x_BmC, strict=True)])

    monkeypatch.setattr(utility, "FAMILIES", {"forest": forest})
    monkeypatch.setattr(utility_folds, "REPEATS", 1)
    rng = np.random.default_rng(1)
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
        utility_folds.folds(9)
    with pytest.raises(ValueError, match="20 group labels of 4 groups for 20 rows and 5 folds"):
        utility_folds.folds(20, np.arange(20) % 4)
    with pytest.raises(ValueError, match="permutations=-5; choose permutations >= 0"):
        utility.compare(*blocks, permutations=-5)
    with pytest.raises(utility_folds.TooFewRows, match="patches of 16 among 20 rows overlap so widely"):
        utility_folds.neighbourhood_folds(utility.patches(distance_NN, 15))
