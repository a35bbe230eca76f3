"""Participation ratio: closed forms, invariances, stream = batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analysis.sae.geometry import CovarianceSums, participation_ratio


def _cloud(eigenvalues, n: int = 400, seed: int = 0) -> torch.Tensor:
    """Rows whose centred covariance has exactly the given eigenvalues, in a random basis."""
    d = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    left, _, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return (left * (n * torch.as_tensor(eigenvalues, dtype=torch.float64)).sqrt()) @ basis


def test_isotropic_gives_d_and_rank_one_gives_one():
    assert participation_ratio(_cloud([2.5] * 12)) == pytest.approx(12.0, rel=1e-12)
    rank_one = torch.linspace(-1, 2, 50, dtype=torch.float64)[:, None] * torch.arange(1.0, 9.0, dtype=torch.float64)
    assert participation_ratio(rank_one + 5.0) == pytest.approx(1.0, rel=1e-12)


def test_known_spectrum_raw_and_deflated():
    spectrum = np.array([100.0, 4.0, 3.0, 2.0, 1.0])
    for deflate in range(4):
        kept = spectrum[deflate:]
        expected = kept.sum() ** 2 / (kept**2).sum()
        assert participation_ratio(_cloud(spectrum), deflate) == pytest.approx(expected, rel=1e-10)


def test_invariant_to_offset_scale_and_rotation_and_accepts_numpy():
    x = _cloud([5.0, 2.0, 1.0, 0.5])
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    expected = participation_ratio(x)
    assert participation_ratio((3 * x + 1e4) @ rotation) == pytest.approx(expected, rel=1e-9)
    assert participation_ratio(x.numpy()) == expected


def test_fewer_tokens_than_dimensions():
    x = _cloud([4.0, 3.0, 2.0, 1.0] * 10, n=60)[:15]
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy().T))[-14:]
    assert participation_ratio(x) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_stream_equals_batch_for_any_batching(offset):
    x = _cloud([50.0, 4.0, 3.0, 2.0, 1.0, 0.5]) + offset
    for sizes in ([400], [1, 199, 200], [100, 100, 100, 100]):
        sums = CovarianceSums()
        for batch in torch.split(x, sizes):
            sums.update(batch)
        summary = sums.summary()
        assert summary["pr"] == pytest.approx(participation_ratio(x), rel=1e-9)
        assert summary["pr_deflated"] == pytest.approx(participation_ratio(x, deflate=1), rel=1e-9)
        assert summary["pr_over_d"] == pytest.approx(summary["pr"] / 6)
        assert (summary["n_tokens"], summary["d_model"]) == (400, 6)
        torch.testing.assert_close(sums.mean_D, x.mean(dim=0), rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(sums.covariance_DD(), torch.cov(x.T, correction=0), rtol=1e-8, atol=1e-9)


def test_stream_flattens_sequences_and_takes_float32():
    x = _cloud([5.0, 2.0, 1.0, 0.5]).float()
    sums = CovarianceSums()
    sums.update(x.reshape(20, 20, 4))
    assert sums.summary()["pr"] == pytest.approx(participation_ratio(x), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: participation_ratio(torch.ones(1, 4)), "tokens >= 2"),
        (lambda: participation_ratio(torch.ones(9, 4)), "rank 0"),
        (lambda: participation_ratio(_cloud([1.0, 1.0]), deflate=2), "deflate=2 leaves nothing"),
        (lambda: participation_ratio(torch.arange(8.0)[:, None] * torch.ones(4), deflate=1), "rank 1"),
        (lambda: participation_ratio(_cloud([1.0, 1.0]), deflate=-1), "deflate=-1"),
        (lambda: participation_ratio(torch.tensor([[1.0, float("inf")], [0.0, 0.0]])), "non-finite"),
        (lambda: CovarianceSums().summary(), "0 tokens were added"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
