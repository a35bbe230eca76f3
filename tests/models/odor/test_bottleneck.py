"""Bottlenecks against closed forms; seeds decide everything random; impossible sizes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.linear_model import LinearRegression

from models.odor import bottleneck


def _low_rank(n: int = 90, d: int = 20, rank: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)) + 3.0


def test_pca_keeps_distances_of_low_rank_data_and_matches_the_spectrum() -> None:
    x_ND = _low_rank()
    np.testing.assert_allclose(pdist(bottleneck.pca(x_ND, 4)), pdist(x_ND), rtol=1e-9)
    spectrum = np.linalg.svd(x_ND - x_ND.mean(axis=0), compute_uv=False) ** 2
    np.testing.assert_allclose((bottleneck.pca(x_ND, 2) ** 2).sum(axis=0), spectrum[:2])


def test_random_projection_keeps_squared_distances_on_average() -> None:
    x_ND = np.random.default_rng(1).normal(size=(80, 300))
    ratio = (pdist(bottleneck.random_projection(x_ND, 64, seed=2)) / pdist(x_ND)) ** 2
    assert ratio.mean() == pytest.approx(1.0, abs=0.05)
    assert ratio.std() == pytest.approx(np.sqrt(2 / 64), rel=0.25)


@pytest.mark.parametrize("binary", [True, False])
def test_autoencoder_learns_a_low_dimensional_cause(binary: bool) -> None:
    x_ND = _low_rank(200) - 3.0
    x_ND = (x_ND > 0).astype(float) if binary else x_ND
    settings = {"hidden": 64, "epochs": 60, "batch_size": 32, "learning_rate": 3e-3}
    code_NE = bottleneck.autoencoder(x_ND, 4, seed=0, **settings)
    assert code_NE.shape == (200, 4)
    kept, most = (LinearRegression().fit(e_NE, x_ND).score(e_NE, x_ND) for e_NE in (code_NE, bottleneck.pca(x_ND, 4)))
    assert kept > 0.9 * most  # untrained codes: 0.57 and 0.63 of it
    np.testing.assert_array_equal(code_NE, bottleneck.autoencoder(x_ND, 4, seed=0, **settings))


@pytest.mark.parametrize("name", ["rp256", "ae256"])
def test_seeds_matter(name: str) -> None:
    method = bottleneck.METHODS[name]
    assert not np.allclose(method(_low_rank(), 4, seed=0), method(_low_rank(), 4, seed=1))


@pytest.mark.parametrize("name", sorted(bottleneck.METHODS))
def test_bad_input(name: str) -> None:
    method = bottleneck.METHODS[name]
    with pytest.raises(ValueError, match="dim=21 for 90 rows of 20 features"):
        method(_low_rank(), 21)
    with pytest.raises(ValueError, match="give a finite matrix"):
        method(np.full((5, 5), np.nan), 2)
    if name == "ae256":
        with pytest.raises(ValueError, match="epochs=0"):
            bottleneck.autoencoder(_low_rank(), 2, epochs=0)
