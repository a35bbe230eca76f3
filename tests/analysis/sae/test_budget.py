"""Rates, feature statistics and k*."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis.sae.budget import Censored, FeatureCounts, k_star, k_star_interval, rate_bits, rate_bits_entropy


def test_uniform_rate():
    assert rate_bits(16384, 8) == pytest.approx(160.698, abs=5e-4)
    assert rate_bits(10, 3) == pytest.approx(math.log2(120) + 24, rel=1e-14)
    assert rate_bits(10, 10) == 80.0


@pytest.mark.parametrize("k", [0, 16385])
def test_uniform_rate_refuses_impossible_k(k):
    with pytest.raises(ValueError, match=f"k={k} must lie in 1..d_sae=16384"):
        rate_bits(16384, k)


def test_entropy_rate_meets_the_uniform_bound_when_use_is_uniform():
    assert rate_bits_entropy(14.0, 8) == pytest.approx(rate_bits(16384, 8), abs=0.01)
    assert rate_bits_entropy(14.0, 1) == rate_bits(16384, 1)
    assert rate_bits_entropy(10.0, 8) < rate_bits(16384, 8)
    assert rate_bits_entropy(0.0, 8) == 64.0


def test_feature_counts_stream_equals_batch_and_knows_entropy():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 50, (300, 4), generator=generator)
    value = torch.rand(300, 4, generator=generator) - 0.2
    whole, parts = FeatureCounts(64), FeatureCounts(64)
    whole.update(index, value)
    for start in range(0, 300, 70):
        parts.update(index[start : start + 70], value[start : start + 70])
    fired = index[value > 0].numpy()
    expected = np.bincount(fired, minlength=64)
    np.testing.assert_array_equal(whole.counts_F, expected)
    np.testing.assert_array_equal(parts.counts_F, expected)
    assert whole.alive() == np.mean(expected > 0)
    share = expected[expected > 0] / expected.sum()
    assert whole.index_entropy() == pytest.approx(-(share * np.log2(share)).sum())
    assert whole.rate_bits_entropy(4) == rate_bits_entropy(whole.index_entropy(), 4)


def test_feature_counts_closed_forms_and_errors():
    uniform = FeatureCounts(32)
    uniform.update(torch.arange(16).reshape(4, 4))
    assert uniform.alive() == 0.5
    assert uniform.index_entropy() == pytest.approx(4.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"feature index 32 is outside \[0, d_sae=32\)"):
        uniform.update(torch.tensor([[32]]))
    with pytest.raises(ValueError, match="no feature fired"):
        FeatureCounts(4).index_entropy()


def test_k_star_interpolates_the_published_kind_of_curve():
    assert k_star([8, 16, 32, 64, 128, 256], [0.34, 0.58, 0.73, 0.80, 0.90, 0.95], 0.85) == pytest.approx(96.0)
    assert k_star([64, 8, 32], [0.9, 0.1, 0.5], 0.5) == 32.0
    assert k_star([8, 16, 32], [0.2, 0.9, 0.7], 0.85) == pytest.approx(8 + 8 * 0.65 / 0.7)


def test_k_star_is_censored_not_extrapolated():
    above = k_star([8, 256], [0.3, 0.8], 0.85)
    assert above == Censored(">", 256)
    assert str(above) == "> 256"
    assert str(k_star([8, 256], [0.9, 0.95], 0.85)) == "<= 8"


def test_interval_of_k_star_may_be_half_censored():
    found = k_star_interval([8, 16, 32], [0.2, 0.6, 1.0], [0.1, 0.4, 0.7], [0.8, 0.9, 1.1], 0.75)
    assert str(found) == "22.0 [<= 8, > 32]"


@pytest.mark.parametrize(
    ("k", "ce", "message"),
    [([8, 8], [0.1, 0.2], "distinct"), ([8, 16], [0.1], "shape"), ([8, 16], [0.1, float("nan")], "finite")],
)
def test_k_star_refuses_bad_grids(k, ce, message):
    with pytest.raises(ValueError, match=message):
        k_star(k, ce, 0.85)
