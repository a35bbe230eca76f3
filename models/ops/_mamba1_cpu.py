"""The selective scan on CPUs as a differentiable function around the kernels of `_mamba1_kernels`.

Shapes: B batch, T time, D channels, N states a channel, L chunks, G groups of channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.cpu.threads import run_kernel, thread_shares
from models.ops import _mamba1_kernels as kernels


class CpuScan(torch.autograd.Function):
    """x, dt [B, T, D], A [D, N], B, C [B, T, N], initial [B, N, D] float32 -> y [B, T, D], final [B, N, D], float32.

    Saves the inputs and the state that enters each chunk. As many threads as torch has change no bit of the results.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, T, width = x.shape
        N = A.shape[1]
        inputs = _contiguous(x, dt, A.t(), B, C)
        y = inputs[0].new_empty(batch, T, width)
        entering = y.new_empty(batch, -(-T // kernels.CHUNK), N, width)
        final = y.new_empty(batch, N, width)
        run_kernel(kernels.scan_forward, _items(batch), *inputs, *_contiguous(initial_BND), y, entering, final)
        ctx.save_for_backward(x, dt, A, B, C, entering)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, ...]:
        x, dt, A, B, C, entering = ctx.saved_tensors
        batch, T, _ = x.shape
        inputs = _contiguous(x, dt, A.t(), B, C)
        dy = torch.zeros_like(inputs[0]) if dy is None else dy
        dfinal = torch.zeros_like(entering[:, 0]) if dfinal is None else dfinal
        dx, ddt = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
        dA_BND, dinitial = torch.empty_like(entering[:, 0]), torch.empty_like(entering[:, 0])
        dB_GBTN, dC_GBTN = (entering.new_zeros(kernels.GROUPS, batch, T, B.shape[2]) for _ in range(2))
        results = (dx, ddt, dA_BND, dB_GBTN, dC_GBTN, dinitial)
        run_kernel(kernels.scan_backward, _items(batch), *inputs, entering, *_contiguous(dy, dfinal), *results)
        grads = (dx, ddt, dA_BND.sum(0).t(), dB_GBTN.sum(0), dC_GBTN.sum(0))
        return *(grad.to(z.dtype) for grad, z in zip(grads, (x, dt, A, B, C), strict=True)), dinitial


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [z.to(torch.float32).contiguous() for z in tensors]


def _items(batch: int) -> list[int]:
    """Bounds of the items of each thread."""
    return thread_shares(batch * kernels.GROUPS)
