"""Short causal depthwise convolution, the local mixing before Gated DeltaNet and Mamba (Dao, Gu 2023, section 3.4).

    y_t = act(bias + sum_{j=0}^{W-1} w_j x_{t-W+1+j})        act = SiLU or the identity

Shapes: B batch, R rows, T time, D channels, W taps (the last one multiplies the current token), E = W - 1 + T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import check_rank, check_shape, compute_dtype, no_autocast, row_groups

BLOCK = 128
ACTIVATIONS = ("silu", None)


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, differentiable in every tensor argument.

    Args:
        x: [B, T, D] inputs.
        weight: [D, W] taps.
        bias: [D].
        activation: "silu" or None.
        initial_state: [B, W - 1, D] inputs before the first token; zeros when None.

    Returns:
        y [B, T, D] in x's dtype, computed in float32 (float64 for float64 inputs), and the last W - 1 inputs
        [B, W - 1, D] in x's dtype, the state that continues the sequence.

    Raises:
        ValueError: shapes that disagree, an empty sequence or an unknown activation.
    """
    check_rank("x", x, "[B, T, D]")
    check_rank("weight", weight, "[D, W]")
    B, T, D = x.shape
    W = weight.shape[1]
    check_shape("weight", weight, (D, W), "[D, W]")
    _check_activation(activation)
    if T == 0:
        raise ValueError("sequence of 0 tokens; pass at least one token")
    if bias is not None:
        check_shape("bias", bias, (D,), "[D]")
    if initial_state is None:
        initial_state = x.new_zeros(B, W - 1, D)
    check_shape("initial_state", initial_state, (B, W - 1, D), "[B, W - 1, D]")
    if _compiles(x, weight, initial_state):
        from models.ops._convolution_cpu import CpuShortConv  # numba takes a second to import

        y = CpuShortConv.apply(x, weight, bias, initial_state, activation == "silu")
    else:
        y = _ShortConv.apply(x, weight, bias, initial_state, activation)
    tail = torch.cat([initial_state, x[:, max(0, T - W + 1) :]], 1)
    return y, tail[:, tail.shape[1] - (W - 1) :]


def short_conv_step(
    x: Tensor, weight: Tensor, state: Tensor, *, bias: Tensor | None = None, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], weight [D, W], state [B, W - 1, D] -> (y [B, D], new state)."""
    _check_activation(activation)
    dtype = compute_dtype(x, weight)
    window_BWD = torch.cat([state, x.unsqueeze(1)], 1)
    y = (window_BWD.to(dtype) * weight.to(dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation else y).to(x.dtype), window_BWD[:, 1:]


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is neither 'silu' nor None; choose one of these")


def _compiles(x: Tensor, weight: Tensor, initial: Tensor) -> bool:
    """Whether the kernel for CPUs takes these types; it is for the precisions of training."""
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype == initial.dtype and {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}


def _extend(x_RTD: Tensor, initial_RwD: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs with their history in front, [R, E, D]."""
    return torch.cat([initial_RwD.to(dtype), x_RTD.to(dtype)], 1)


def _convolve(x_RED: Tensor, taps_WD: Tensor, bias_D: Tensor | None, tokens: slice) -> Tensor:
    length = tokens.stop - tokens.start
    y = x_RED[:, tokens.start : tokens.start + length] * taps_WD[0]
    for j in range(1, taps_WD.shape[0]):
        y.addcmul_(x_RED[:, tokens.start + j : tokens.start + j + length], taps_WD[j])
    return y if bias_D is None else y.add_(bias_D)


def _blocks(T: int, device: torch.device) -> list[slice]:
    """Pieces of time that stay in a CPU's cache across the operations of a tap; all of it on a GPU."""
    step = BLOCK if device.type == "cpu" else T
    return [slice(start, min(start + step, T)) for start in range(0, T, step)]


class _ShortConv(torch.autograd.Function):
    """Saves its inputs only: the sum before the activation costs W passes to make again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor, activation: str | None
    ) -> Tensor:
        dtype = compute_dtype(x, weight)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        taps_WD = weight.to(dtype).t().contiguous()
        with no_autocast(x):
            for r in row_groups(x.shape[0], x.device, x[0].numel()):
                x_RED = _extend(x[r], initial[r], dtype)
                for tokens in _blocks(x.shape[1], x.device):
                    z = _convolve(x_RED, taps_WD, bias, tokens)
                    y[r, tokens] = F.silu(z, inplace=True) if activation else z
        ctx.save_for_backward(x, weight, bias, initial)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, initial = ctx.saved_tensors
        dtype = compute_dtype(x, weight)
        W = weight.shape[1]
        taps_WD = weight.to(dtype).t().contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dinitial = torch.empty_like(initial)
        dtaps_WD = torch.zeros_like(taps_WD)
        dbias_D = torch.zeros_like(taps_WD[0])
        with no_autocast(x):
            for r in row_groups(x.shape[0], x.device, x[0].numel()):
                x_RED = _extend(x[r], initial[r], dtype)
                dx_RED = torch.zeros_like(x_RED)
                for tokens in _blocks(x.shape[1], x.device):
                    dz = dy[r, tokens].to(dtype)
                    if ctx.activation:
                        dz = torch.ops.aten.silu_backward(dz, _convolve(x_RED, taps_WD, bias, tokens))
                    for j in range(W):
                        window = slice(tokens.start + j, tokens.stop + j)
                        dx_RED[:, window].addcmul_(dz, taps_WD[j])
                        dtaps_WD[j] += (dz * x_RED[:, window]).sum((0, 1))
                    if bias is not None:
                        dbias_D += dz.sum((0, 1))
                dinitial[r], dx[r] = dx_RED[:, : W - 1], dx_RED[:, W - 1 :]
        dbias = None if bias is None else dbias_D.to(bias.dtype)
        return dx, dtaps_WD.t().to(weight.dtype), dbias, dinitial, None
