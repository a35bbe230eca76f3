"""Fidelity: identities of the definitions, agreement of stream and batch, and the study's own check."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from analysis.sae import fidelity

BATCH_METRICS = ("r2", "r2_legacy", "r2_energy", "mse", "cosine", "relative_error", "nmse")


def _activations(n: int = 480, d: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 5, d) + 3.0
    return a, a + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)


def _stream(a, a_hat, g, batches, t=20, mean=None) -> fidelity.SequenceSums:
    shape = (-1, t, a.shape[1])
    sums = fidelity.SequenceSums(a.mean(dim=0) if mean is None else mean)
    for ids in batches:
        rows = torch.as_tensor(ids)
        sums.update(
            a.reshape(shape)[rows], a_hat.reshape(shape)[rows], rows, None if g is None else g.reshape(shape)[rows]
        )
    return sums


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_r2_of_the_mean_predictor_is_zero_at_any_scale_and_offset(offset, scale):
    a = _activations()[0] * scale + offset
    mean = a.mean(dim=0, keepdim=True).expand_as(a)
    assert abs(fidelity.r2(a, mean)) < 1e-12
    assert abs(fidelity.r2(a.numpy(), mean.numpy())) < 1e-12


@pytest.mark.parametrize("metric", [fidelity.r2, fidelity.r2_legacy, fidelity.r2_energy, fidelity.cosine])
def test_perfect_reconstruction_scores_one(metric):
    a, _ = _activations()
    assert metric(a, a) == pytest.approx(1.0, abs=1e-12)
    assert metric(a.float(), a.float()) == pytest.approx(1.0, abs=1e-6)


def test_errors_of_a_perfect_reconstruction_are_zero():
    a, _ = _activations()
    assert fidelity.mse(a, a) == fidelity.nmse(a, a) == fidelity.relative_error(a, a) == 0.0


def test_r2_follows_its_formula_and_is_invariant_to_shift_and_scale():
    a, a_hat = _activations()
    x, y = a.numpy(), a_hat.numpy()
    expected = 1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fidelity.r2(a, a_hat) == pytest.approx(expected, rel=1e-13)
    assert fidelity.r2(7 * a + 100, 7 * a_hat + 100) == pytest.approx(expected, rel=1e-10)


def test_legacy_is_the_mean_of_token_ratios_and_differs_from_r2():
    a, a_hat = _activations()
    x, y = a.numpy(), a_hat.numpy()
    ratios = [((xt - yt) ** 2).sum() / ((xt - x.mean(0)) ** 2).sum() for xt, yt in zip(x, y, strict=True)]
    assert fidelity.r2_legacy(a, a_hat) == pytest.approx(1 - np.mean(ratios), rel=1e-12)
    assert abs(fidelity.r2_legacy(a, a_hat) - fidelity.r2(a, a_hat)) > 1e-4


def test_energy_convention_equals_r2_until_cancellation():
    a, a_hat = _activations()
    assert fidelity.r2_energy(a, a_hat) == pytest.approx(fidelity.r2(a, a_hat), abs=1e-12)
    far, far_hat = a + 1e7, a_hat + 1e7
    assert abs(fidelity.r2_energy(far, far_hat) - fidelity.r2(far, far_hat)) > 1e-6


def test_cosine_and_relative_error_closed_forms():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    a_hat = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert fidelity.cosine(a, a_hat) == pytest.approx((0 + 0.6) / 2)
    assert fidelity.relative_error(a, a_hat) == pytest.approx((math.sqrt(5) / 1 + 4 / 5) / 2)
    assert fidelity.cosine(a, torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize(("d", "mse_d", "sst", "published"), [(512, 43.7, 226.7, 0.807), (1024, 161.3, 4131.1, 0.961)])
def test_published_check_on_definitions(d, mse_d, sst, published):
    """Activations built to the study's SST/token and mse·d give the study's R² (mid, k=8)."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(64, d, generator=generator, dtype=torch.float64)
    a = a - a.mean(dim=0)
    a *= (sst * 64 / a.square().sum()).sqrt()
    noise = torch.randn(64, d, generator=generator, dtype=torch.float64)
    noise *= (mse_d * 64 / noise.square().sum()).sqrt()
    a = a + 50.0
    assert fidelity.mse(a, a + noise) * d == pytest.approx(mse_d, rel=1e-9)
    assert round(fidelity.r2(a, a + noise), 3) == published


def test_ce_rec_and_loss_score():
    assert fidelity.ce_rec(3.0, 3.0) == 1.0
    assert fidelity.ce_rec(3.0, 6.0) == 0.0
    assert fidelity.ce_rec(torch.tensor([2.0, 4.0]), np.array([3.0, 6.0])) == pytest.approx(2 - 4.5 / 3)
    assert fidelity.ce_loss_score(3.0, 3.0, 12.0) == 1.0
    assert fidelity.ce_loss_score(3.0, 12.0, 12.0) == 0.0
    assert fidelity.ce_loss_score(3.0, 6.0, 12.0) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fidelity.r2(torch.zeros(3, 2), torch.zeros(3, 3)), "same non-empty"),
        (lambda: fidelity.r2(torch.ones(3, 2), torch.zeros(3, 2)), "activations that vary"),
        (lambda: fidelity.r2(torch.tensor([[1.0, float("nan")]]), torch.zeros(1, 2)), "1 non-finite"),
        (lambda: fidelity.ce_rec(0.0, 1.0), "loss_orig=0 must be > 0"),
        (lambda: fidelity.ce_rec(float("nan"), 1.0), "loss_orig averages to nan"),
        (lambda: fidelity.ce_loss_score(3.0, 4.0, 3.0), "report ce_rec instead"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stream_equals_batch_and_ignores_batching_and_order():
    a, a_hat = _activations()
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = _stream(a, a_hat, g, [range(24)])
    parts = _stream(a, a_hat, g, [[5, 3], range(6, 24), [0, 1, 2], [4]])
    for sums in (whole, parts):
        metrics = sums.metrics()
        for name in BATCH_METRICS:
            assert metrics[name] == pytest.approx(getattr(fidelity, name)(a, a_hat), rel=1e-12), name
        effect = (g * (a_hat - a)).sum(dim=1)
        assert metrics["swd"] == pytest.approx(float(effect.square().mean()), rel=1e-12)
        assert metrics["abs_gdelta"] == pytest.approx(float(effect.abs().mean()), rel=1e-12)
    np.testing.assert_allclose(whole.table(), parts.table(), rtol=1e-12)


def test_a_sequence_sums_bitwise_the_same_in_any_batch():
    a, a_hat = _activations()
    whole, parts = _stream(a, a_hat, None, [range(24)]), _stream(a, a_hat, None, [[5, 3], range(6, 24), [0, 1, 2], [4]])
    assert whole.table().equals(parts.table())


def test_stream_table_holds_each_sequence_alone_and_accepts_pieces():
    a, a_hat = _activations()
    sums = fidelity.SequenceSums(a.mean(dim=0))
    for start in (0, 12):  # each of 24 sequences of 20 tokens arrives as 12 + 8 tokens
        piece = slice(start, start + 12)
        sums.update(a.reshape(24, 20, -1)[:, piece], a_hat.reshape(24, 20, -1)[:, piece], range(24))
    table = sums.table()
    assert list(table.columns) == list(fidelity.SEQUENCE_COLUMNS)
    assert table["n_tokens"].tolist() == [20] * 24
    row = table.loc[table["sequence"] == 7].iloc[0]
    x, y = a[140:160], a_hat[140:160]
    assert row["sse"] == pytest.approx(float((x - y).square().sum()), rel=1e-12)
    assert row["sst"] == pytest.approx(float((x - a.mean(dim=0)).square().sum()), rel=1e-12)
    assert row["cos_sum"] == pytest.approx(20 * fidelity.cosine(x, y), rel=1e-12)
    assert table["swd_sum"].isna().all()
    assert math.isnan(sums.metrics()["swd"])
    assert "ce_rec" not in sums.metrics()


def test_streamed_mean_predictor_is_zero_far_from_the_origin():
    a = _activations()[0] + 1e6
    mean = a.mean(dim=0)
    metrics = _stream(a, mean.expand_as(a), None, [range(12), range(12, 24)]).metrics()
    assert abs(metrics["r2"]) < 1e-12
    assert metrics["r2_legacy"] == 0.0


def test_stream_losses_are_joined_by_sequence_and_aggregated():
    a, a_hat = _activations()
    sums = _stream(a, a_hat, None, [range(24)])
    ids = torch.arange(24).flip(0)
    orig = 2.0 + ids / 10
    sums.add_losses(ids, orig, orig * 1.25, orig + 6.0)
    table, metrics = sums.table(), sums.metrics()
    np.testing.assert_allclose(table["loss_orig"], 2.0 + np.arange(24) / 10)
    assert metrics["ce_rec"] == pytest.approx(0.75)
    assert metrics["ce_loss_score"] == pytest.approx(
        fidelity.ce_loss_score(
            table["loss_orig"].to_numpy(), table["loss_recon"].to_numpy(), table["loss_zero"].to_numpy()
        )
    )


def test_stream_refuses_a_mean_of_other_tokens_and_nan_activations():
    a, a_hat = _activations()
    with pytest.raises(ValueError, match="mean_D misses the streamed tokens' mean"):
        _stream(a, a_hat, None, [range(24)], mean=a.mean(dim=0) + 0.1).table()
    with pytest.raises(ValueError, match="no batch was added"):
        fidelity.SequenceSums(a.mean(dim=0)).table()
    broken = a_hat.clone()
    broken[145, 3] = float("nan")
    with pytest.raises(ValueError, match=r"sequences \[7\] have non-finite sums"):
        _stream(a, broken, None, [range(24)]).table()
