"""The short convolution on CPUs: one pass over the tokens forward and one backward, a block of channels at a time.

The last W inputs of a block, their gradients and the taps stay in the first-level cache, so that memory is read and
written once. PyTorch makes W passes, and more for the activation and each type conversion.

Shapes: B batch, T time, D channels, W taps, w = W - 1 inputs before the first token, E = w + T, C channels of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.cpu.float32 import exp32, read_row, write_row
from models.cpu.threads import run_kernel, thread_shares

CHANNELS = 576  # three windows of four rows are 27 KiB

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})
_ZERO, _ONE = np.float32(0), np.float32(1)


@_kernel
def _read(x_BTD, initial_BwD, b, e, first, last, window_WC):
    """Input e of the extended sequence into its place in the window."""
    w = initial_BwD.shape[1]
    row = window_WC[e % (w + 1), : last - first]
    if e < w:
        read_row(initial_BwD[b, e, first:last], row)
    else:
        read_row(x_BTD[b, e - w, first:last], row)


@_kernel
def _convolve(window_WC, taps_WC, bias_C, t, z_C):
    """z = bias + sum_j taps_j * input t + j."""
    W = len(window_WC)
    for i in range(len(z_C)):
        z_C[i] = bias_C[i]
    for j in range(W):
        tap, row = taps_WC[j], window_WC[(t + j) % W]
        for i in range(len(z_C)):
            z_C[i] += tap[i] * row[i]


@_kernel
def _forward(x_BTD, taps_WD, bias_D, initial_BwD, silu, y_BTD, start, stop):
    """Outputs of blocks start:stop, counted over rows and channels."""
    _, T, D = x_BTD.shape
    W = len(taps_WD)
    blocks = -(-D // CHANNELS)
    window, taps = np.empty((W, CHANNELS), np.float32), np.empty((W, CHANNELS), np.float32)
    scratch = np.empty(CHANNELS, np.float32)
    for item in range(start, stop):
        b, first = item // blocks, item % blocks * CHANNELS
        last = min(first + CHANNELS, D)
        z, bias = scratch[: last - first], bias_D[first:last]
        for j in range(W):
            read_row(taps_WD[j, first:last], taps[j])
        for e in range(W - 1):
            _read(x_BTD, initial_BwD, b, e, first, last, window)
        for t in range(T):
            _read(x_BTD, initial_BwD, b, t + W - 1, first, last, window)
            _convolve(window, taps, bias, t, z)
            if silu:
                for i in range(len(z)):
                    z[i] /= _ONE + exp32(-z[i])
            write_row(z, y_BTD[b, t, first:last])


@_kernel
def _backward(
    x_BTD, taps_WD, bias_D, initial_BwD, silu, dy_BTD, dx_BTD, dinitial_BwD, dtaps_BWD, dbias_BD, start, stop
):  # fmt: skip
    """Gradients of blocks start:stop; `dtaps_BWD` and `dbias_BD` are zero at first."""
    _, T, D = x_BTD.shape
    W = len(taps_WD)
    blocks = -(-D // CHANNELS)
    window, dwindow = np.empty((W, CHANNELS), np.float32), np.empty((W, CHANNELS), np.float32)
    taps, dtaps = np.empty((W, CHANNELS), np.float32), np.empty((W, CHANNELS), np.float32)
    scratch, gradient = np.empty(CHANNELS, np.float32), np.empty(CHANNELS, np.float32)
    for item in range(start, stop):
        b, first = item // blocks, item % blocks * CHANNELS
        last = min(first + CHANNELS, D)
        C = last - first
        z, dz, bias, dbias = scratch[:C], gradient[:C], bias_D[first:last], dbias_BD[b, first:last]
        for j in range(W):
            read_row(taps_WD[j, first:last], taps[j])
        dtaps[:] = _ZERO
        dwindow[:] = _ZERO
        for e in range(W - 1):
            _read(x_BTD, initial_BwD, b, e, first, last, window)
        for t in range(T):
            _read(x_BTD, initial_BwD, b, t + W - 1, first, last, window)
            read_row(dy_BTD[b, t, first:last], dz)
            if silu:
                _convolve(window, taps, bias, t, z)
                for i in range(C):
                    open_ = _ONE / (_ONE + exp32(-z[i]))
                    dz[i] *= open_ * (_ONE + z[i] * (_ONE - open_))
            for i in range(C):
                dbias[i] += dz[i]
            for j in range(W):
                place = (t + j) % W
                tap, dtap, row, drow = taps[j], dtaps[j], window[place], dwindow[place]
                for i in range(C):
                    drow[i] += dz[i] * tap[i]
                    dtap[i] += dz[i] * row[i]
            _write_oldest(dwindow, t, dx_BTD, dinitial_BwD, b, first, last)
        for e in range(T, T + W - 1):
            _write_oldest(dwindow, e, dx_BTD, dinitial_BwD, b, first, last)
        for j in range(W):
            for i in range(C):
                dtaps_BWD[b, j, first + i] = dtaps[j, i]


@_kernel
def _write_oldest(dwindow_WC, e, dx_BTD, dinitial_BwD, b, first, last):
    """Gradient of input e of the extended sequence, which no later output reads; its place is free for the next."""
    w = dinitial_BwD.shape[1]
    row = dwindow_WC[e % (w + 1), : last - first]
    if e < w:
        write_row(row, dinitial_BwD[b, e, first:last])
    else:
        write_row(row, dx_BTD[b, e - w, first:last])
    row[:] = _ZERO


def _bounds(B: int, D: int) -> list[int]:
    """Blocks of each thread."""
    return thread_shares(B * -(-D // CHANNELS))


class CpuShortConv(torch.autograd.Function):
    """x [B, T, D] and initial [B, W - 1, D] of one type, float32 or bfloat16, on a CPU -> y [B, T, D] of that type.

    Computed in float32; saves its inputs only. As many threads as torch has change no bit of the results.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight_DW: Tensor, bias: Tensor | None, initial: Tensor, silu: bool
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        run_kernel(_forward, _bounds(x.shape[0], x.shape[2]), *_arguments(x, weight_DW, bias, initial), silu, y)
        ctx.save_for_backward(x, weight_DW, bias, initial)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_DW, bias, initial = ctx.saved_tensors
        B, _, D = x.shape
        dx, dinitial = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, initial))
        dtaps_BWD = torch.zeros(B, weight_DW.shape[1], D)
        dbias_BD = torch.zeros(B, D)
        inputs = _arguments(x, weight_DW, bias, initial)
        run_kernel(_backward, _bounds(B, D), *inputs, ctx.silu, dy.contiguous(), dx, dinitial, dtaps_BWD, dbias_BD)
        dbias = None if bias is None else dbias_BD.sum(0).to(bias.dtype)
        return dx, dtaps_BWD.sum(0).t().to(weight_DW.dtype), dbias, dinitial, None


def _arguments(x: Tensor, weight_DW: Tensor, bias: Tensor | None, initial: Tensor) -> tuple[Tensor, ...]:
    bias = weight_DW.new_zeros(len(weight_DW)) if bias is None else bias
    return x.contiguous(), weight_DW.float().t().contiguous(), bias.float().contiguous(), initial.contiguous()
