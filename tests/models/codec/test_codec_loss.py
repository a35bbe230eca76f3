"""Sliced cross-entropy over codebooks against PyTorch's own on full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.codec.loss import codebook_loss

PAD = 11


def _case(batch=2, steps=9, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, steps, 6, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(3, 14, 6, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, 14, (batch, 3, steps), generator=generator)
    targets[:, 1:, 0] = PAD
    targets[1, :, 6:] = PAD
    return hidden, weight, targets


def _reference(hidden, weight, targets, smoothing):
    logits = torch.einsum("btd,kvd->bktv", hidden, weight)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 5, 512])
def test_loss_and_gradients_equal_cross_entropy_on_full_logits(smoothing, rows):
    hidden, weight, targets = _case()
    expected = _reference(hidden, weight, targets, smoothing)
    expected_gradients = torch.autograd.grad(3 * expected, (hidden, weight))
    result = codebook_loss(hidden, weight, targets, pad=PAD, label_smoothing=smoothing, rows=rows)
    gradients = torch.autograd.grad(3 * result.loss, (hidden, weight))
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_true_and_smoothed_validation_loss_come_from_one_pass_whatever_the_training_smoothing():
    hidden, weight, targets = (x.detach() for x in _case())
    result = codebook_loss(hidden, weight, targets, pad=PAD, label_smoothing=0.3)
    for k in range(3):
        own = torch.full_like(targets, PAD)
        own[:, k] = targets[:, k]
        assert int(result.count_K[k]) == int((own != PAD).sum())
        nll, uniform = float(result.nll_K[k] / result.count_K[k]), float(result.uniform_K[k] / result.count_K[k])
        assert nll == pytest.approx(float(_reference(hidden, weight, own, 0.0)), rel=1e-12)
        smoothed = 0.9 * nll + 0.1 * uniform
        assert smoothed == pytest.approx(float(_reference(hidden, weight, own, 0.1)), rel=1e-12)
        assert smoothed != pytest.approx(nll, rel=1e-3)


def test_accuracy_counts():
    hidden, weight, targets = _case()
    result = codebook_loss(hidden, weight, targets, pad=PAD, accuracy=True, rows=4)
    best = torch.einsum("btd,kvd->bktv", hidden, weight).topk(5, dim=-1).indices
    hit = (best == targets[..., None]) & (targets != PAD)[..., None]
    assert result.top1_K.tolist() == hit[..., 0].sum((0, 2)).tolist()
    assert result.top5_K.tolist() == hit.any(-1).sum((0, 2)).tolist()


def test_padding_has_no_loss_and_no_gradient():
    hidden, weight, targets = _case()
    result = codebook_loss(hidden, weight, targets, pad=PAD)
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert torch.count_nonzero(gradient[1, 6:]) == 0
    assert gradient[1, :6].abs().sum() > 0
    empty = codebook_loss(hidden, weight, torch.full_like(targets, PAD), pad=PAD)
    assert float(empty.loss.detach()) == 0


def test_hidden_states_alone_or_weights_alone_may_need_the_gradient():
    hidden, weight, targets = _case()
    both = torch.autograd.grad(codebook_loss(hidden, weight, targets, pad=PAD).loss, (hidden, weight))
    one = torch.autograd.grad(codebook_loss(hidden, weight.detach(), targets, pad=PAD).loss, hidden)[0]
    other = torch.autograd.grad(codebook_loss(hidden.detach(), weight, targets, pad=PAD).loss, weight)[0]
    torch.testing.assert_close(one, both[0])
    torch.testing.assert_close(other, both[1])


def test_autocast_products_are_narrow_and_sums_are_not():
    hidden, weight, targets = _case(dtype=torch.float32)
    exact = codebook_loss(hidden, weight, targets, pad=PAD)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = codebook_loss(hidden, weight, targets, pad=PAD)
    assert narrow.loss.dtype == torch.float32
    assert 0 < abs(float((narrow.loss - exact.loss).detach())) < 0.02
    (gradient,) = torch.autograd.grad(narrow.loss, weight)
    (expected,) = torch.autograd.grad(exact.loss, weight)
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_bad_arguments_are_named():
    hidden, weight, targets = _case()
    with pytest.raises(ValueError, match="token 14 is outside the vocabulary of 14"):
        codebook_loss(hidden, weight, targets + 14 - targets.max(), pad=PAD)
    with pytest.raises(ValueError, match=r"expected \[B, K, T\] = \(2, 3, 9\)"):
        codebook_loss(hidden, weight, targets[:, :2], pad=PAD)
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        codebook_loss(hidden, weight, targets, pad=PAD, label_smoothing=1.5)
