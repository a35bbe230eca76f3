"""Short causal convolution: equals torch's conv1d, gradients, state, causality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cpu.threads import torch_threads
from models.ops import short_conv, short_conv_step


def make_inputs(T: int = 150, *, W: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(T)
    shapes = [(2, T, 5), (5, W), (5,), (2, W - 1, 5)]
    x, weight, bias, state = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in shapes)
    return x, weight, bias, state


def by_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None) -> Tensor:
    extended = torch.cat([state, x], 1).transpose(1, 2)
    y = F.conv1d(extended, weight.unsqueeze(1), bias, groups=x.shape[2]).transpose(1, 2)
    return F.silu(y) if activation else y


@pytest.mark.parametrize("T", [1, 2, 3, 127, 128, 129, 300])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_conv1d_with_gradients(T: int, activation: str | None, with_bias: bool) -> None:
    x, weight, bias, state = make_inputs(T)
    leaves = [z.requires_grad_() for z in ((x, weight, state, bias) if with_bias else (x, weight, state))]
    used_bias = bias if with_bias else None
    expected = by_conv1d(x, weight, used_bias, state, activation)
    y, final = short_conv(x, weight, bias=used_bias, activation=activation, initial_state=state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, torch.cat([state, x], 1)[:, -3:])
    loss_weights = [torch.randn_like(y), torch.randn_like(final)]
    slow_final = torch.cat([state, x], 1)[:, -3:]
    slow = torch.autograd.grad([expected, slow_final], leaves, loss_weights)
    fast = torch.autograd.grad([y, final], leaves, loss_weights)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("T", "W", "D"), [(1, 4, 3), (2, 4, 600), (300, 4, 1200), (40, 1, 5)])
@pytest.mark.parametrize("activation", ["silu", None])
def test_compiled_equals_the_same_in_float64(T: int, W: int, D: int, activation: str | None, dtype, tolerance) -> None:
    """Outputs and gradients of the kernel for CPUs, blocks of channels and rows apart; threads change no bit."""
    gen = torch.Generator().manual_seed(T)
    x, weight, bias, state = (torch.randn(*s, generator=gen) for s in ((2, T, D + 2), (D, W), (D,), (2, W - 1, D)))
    arguments = [x[..., :D].to(dtype), weight, bias, state.to(dtype)]
    dy = torch.randn(2, T, D, generator=gen).to(dtype)

    def run(*arguments: Tensor) -> list[Tensor]:
        leaves = x, weight, bias, state = [z.detach().requires_grad_() for z in arguments]
        y, _ = short_conv(x, weight, bias=bias, activation=activation, initial_state=state)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    actual, expected = run(*arguments), run(*(z.double() for z in arguments))
    for a, b in zip(actual, expected, strict=True):
        assert float((a.double() - b).detach().norm()) <= tolerance * float(b.detach().norm())
    with torch_threads(3):
        again = run(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("W", [1, 2, 4])
def test_two_parts_and_steps_equal_the_whole(W: int) -> None:
    x, weight, bias, state = make_inputs(20, W=W)
    whole, final = short_conv(x, weight, bias=bias, initial_state=state)
    first, middle = short_conv(x[:, :2], weight, bias=bias, initial_state=state)
    second, end = short_conv(x[:, 2:], weight, bias=bias, initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, final)
    for t in range(20):
        y_t, state = short_conv_step(x[:, t], weight, state, bias=bias)
        torch.testing.assert_close(y_t, whole[:, t])
    torch.testing.assert_close(state, final)


def test_no_gradient_from_the_future() -> None:
    x, weight, *_ = make_inputs(200)
    leaf = x.requires_grad_()
    y, _ = short_conv(leaf, weight)
    (grad,) = torch.autograd.grad(y[:, :140].square().sum(), leaf)
    assert grad[:, 140:].abs().max() == 0
    assert grad[:, :140].abs().max() > 0


def test_bfloat16_and_autocast_are_computed_in_float32() -> None:
    x, weight, _, state = make_inputs()
    x16, w32, s16 = x.bfloat16(), weight.float(), state.bfloat16()
    expected = by_conv1d(x16.double(), w32.double(), None, s16.double(), "silu")
    with torch.autocast("cpu", torch.bfloat16):
        y, final = short_conv(x16, w32, initial_state=s16)
    assert y.dtype == final.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


def test_bad_arguments_say_what_was_expected() -> None:
    x, weight, _, state = make_inputs(8)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \[D, W\] = \(5, 4\)"):
        short_conv(x, weight[:4])
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2, 5\), expected \[B, W - 1, D\]"):
        short_conv(x, weight, initial_state=state[:, 1:])
    with pytest.raises(ValueError, match="activation='relu' is neither 'silu' nor None"):
        short_conv(x, weight, activation="relu")
