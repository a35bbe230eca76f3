"""The compiled kernels of training on CPUs against PyTorch in float64: outputs, gradients, threads, NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit

from models.codec.loss import codebook_loss
from models.cpu.float32 import exp32, read_row, write_row
from models.cpu.threads import torch_threads
from models.mixers.base import GatedHeadNorm, RMSNorm, SwiGLU
from models.mixers.gated_delta import GatedDeltaNet


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x, reference):
    return float((x.double() - reference.double()).norm() / reference.double().norm())


@njit
def _exp_each(x, y):
    for i in range(len(x)):
        y[i] = exp32(x[i])


@njit
def _through(row, z, out):
    read_row(row, z)
    write_row(z, out)


def test_exp_over_its_range():
    x = np.linspace(-87.2, 88.3, 100_001).astype(np.float32)
    y = np.empty_like(x)
    _exp_each(x, y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 1.5e-7
    x = np.array([0.0, -1e30, -np.inf, np.inf, 1e30, np.nan], np.float32)
    y = np.empty_like(x)
    _exp_each(x, y)
    assert y[0] == 1
    assert (y[1:3] >= 0).all()
    assert (y[1:3] < 1.3e-38).all()
    assert np.isinf(y[3:5]).all()
    assert np.isnan(y[5])


def test_rows_are_rounded_as_torch_rounds_them():
    x = torch.cat([randn(0, 4000) * 10.0 ** torch.arange(-20, 20).repeat(100), torch.tensor([0.0, -0.0, math.inf])])
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, ties, -ties])
    out, z = torch.empty(len(x), dtype=torch.bfloat16), np.empty(len(x), np.float32)
    _through(x.numpy(), z, out.view(torch.int16).numpy())
    assert torch.equal(out, x.bfloat16())
    _through(out.view(torch.int16).numpy(), z, z)
    assert torch.equal(torch.from_numpy(z), out.float())


def norm_run(norm, x, dy):
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, (x, norm.weight), dy)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 96), (2, 6, 130)])
def test_rms_norm(shape):
    norm = RMSNorm(shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(randn(1, shape[-1]))
    x, dy = 0.1 * randn(2, *shape).transpose(0, 1), randn(3, *shape).transpose(0, 1)
    actual = norm_run(norm, x, dy)
    reference = RMSNorm(shape[-1], eps=1e-3).double()
    reference.load_state_dict(norm.state_dict())
    expected = norm_run(reference, x.double(), dy.double())
    assert all(relative(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(norm(x), actual[0])
    with torch_threads(3):
        again = norm_run(norm, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def unit_heads(heads, joint, grads):
    joint = joint.detach().requires_grad_()
    out = heads(joint)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, joint, grads)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_unit_heads(dtype, tolerance):
    """Split and normalised as by F.normalize, rows that are a part of wider ones too, and shorter than its floor."""
    mixer = GatedDeltaNet(8, 3, 5, 7, conv_width=4, norm_eps=1e-6)
    joint = randn(0, 2, 11, 60).to(dtype)
    joint[0, 3, :5] *= 1e-14
    joint[1, 2, 15:20] = 0
    grads = [randn(1, 2, 11, 3, 5), randn(2, 2, 11, 3, 5), randn(3, 2, 11, 3, 7).to(dtype)]
    grads[0][0, 3, 0] *= 1e-12
    grads[1][1, 2, 0] = 0
    part = joint[..., :51]
    actual = unit_heads(mixer._heads, part, grads)
    expected = unit_heads(mixer._heads, part.double(), [g.double() for g in grads])
    assert [x.dtype for x in actual] == [torch.float32, torch.float32, dtype, dtype]
    assert all(relative(a, b) < tolerance for a, b in zip(actual, expected, strict=True))
    with torch_threads(3):
        again = unit_heads(mixer._heads, part, grads)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def gated_run(norm, x, gate, dy):
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    y = norm(x, gate)
    return [y.detach(), *torch.autograd.grad(y, (x, gate, norm.norm.weight), dy)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (3, 7, 2, 96), (2, 6, 3, 13)])
def test_gated_head_norm(shape, dtype, tolerance):
    norm, reference = GatedHeadNorm(shape[-1], 1e-3), GatedHeadNorm(shape[-1], 1e-3).double()
    with torch.no_grad():
        norm.norm.weight.copy_(randn(1, shape[-1]))
    reference.load_state_dict(norm.state_dict())
    x, gate, dy = (3 * randn(seed, *shape).transpose(0, 1).to(dtype) for seed in (2, 3, 4))
    actual, expected = gated_run(norm, x, gate, dy), gated_run(reference, x.double(), gate.double(), dy.double())
    assert [a.dtype for a in actual] == [dtype, dtype, dtype, torch.float32]
    assert all(relative(a, b) < tolerance for a, b in zip(actual, expected, strict=True))
    with torch.no_grad():
        assert relative(norm(x, gate), actual[0]) < 2 * tolerance
    with torch_threads(3):
        again = gated_run(norm, x, gate, dy)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def mlp_run(mlp, x, dy):
    x = x.detach().requires_grad_()
    y = mlp(x)
    return [y.detach(), *torch.autograd.grad(y, (x, mlp.gate_up.weight, mlp.down.weight), dy)]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_swiglu(precision, tolerance):
    mlp, reference = SwiGLU(6, 70), SwiGLU(6, 70).double()
    reference.load_state_dict(mlp.state_dict())
    x, dy = 3 * randn(0, 2, 5, 6), randn(1, 2, 5, 6)
    expected = mlp_run(reference, x.double(), dy.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        actual = mlp_run(mlp, x, dy.to(getattr(torch, precision)))
        with torch.no_grad():
            unfused = mlp(x)
    assert all(relative(a, b) < tolerance for a, b in zip(actual, expected, strict=True))
    assert relative(unfused, actual[0]) < tolerance


def loss_run(dtype, smoothing=0.1, rows=4):
    hidden = randn(0, 2, 9, 6).to(dtype).requires_grad_()
    weight = (2 * randn(1, 3, 150, 6)).to(dtype).requires_grad_()
    targets = torch.randint(0, 149, (2, 3, 9), generator=torch.Generator().manual_seed(2))
    targets[:, 1:, 0], targets[1, :, 6:] = 149, 149
    result = codebook_loss(hidden, weight, targets, pad=149, label_smoothing=smoothing, rows=rows)
    return [result.loss.detach(), result.nll_K, result.uniform_K, *torch.autograd.grad(result.loss, (hidden, weight))]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_codebook_loss(smoothing):
    expected, actual = (loss_run(dtype, smoothing) for dtype in (torch.float64, torch.float32))
    assert all(relative(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))
    with torch_threads(3):
        again = loss_run(torch.float32, smoothing)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


def test_codebook_loss_of_bfloat16_logits():
    """Under autocast the kernel's results are those of float32 arithmetic on the rounded logits."""
    hidden, weight = randn(0, 1, 40, 6), 2 * randn(1, 2, 150, 6)
    targets = torch.randint(0, 149, (1, 2, 40), generator=torch.Generator().manual_seed(2))
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = codebook_loss(*leaves, targets, pad=149)
    logits = F.linear(hidden.bfloat16(), weight.bfloat16().flatten(0, 1)).double().unflatten(-1, (2, 150))
    logits.requires_grad_()
    expected = F.cross_entropy(logits.permute(0, 3, 2, 1), targets, label_smoothing=0.1)
    assert float(ours.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (dlogits,) = torch.autograd.grad(expected, logits)
    actual = torch.autograd.grad(ours.loss, leaves)
    assert relative(actual[0], torch.einsum("btkv,kvd->btd", dlogits, weight.double())) < 1e-2
    assert relative(actual[1], torch.einsum("btkv,btd->kvd", dlogits, hidden.double())) < 1e-2


def test_nan_reaches_the_loss():
    hidden, weight = randn(0, 1, 3, 6), randn(1, 2, 150, 6)
    hidden[0, 1, 2] = math.nan
    targets = torch.zeros(1, 2, 3, dtype=torch.long)
    assert math.isnan(float(codebook_loss(hidden, weight, targets, pad=149).loss))
