"""Root-mean-square norm on CPUs: one pass over a row forward and one backward, in its first-level cache.

PyTorch's norm takes six operations forward and a dozen backward, each of which passes over memory.

Shapes: N rows, D width, G groups of rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.cpu.threads import run_kernel, thread_shares

GROUPS = 8  # the weight's gradient is summed in this many parts, whatever the number of threads

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


@_kernel
def _forward(x_ND, weight_D, eps, y_ND, inverse_N, start, stop):
    """y = x / rms * weight and 1 / rms of rows start:stop."""
    D = x_ND.shape[1]
    for r in range(start, stop):
        square = np.float32(0)
        for i in range(D):
            square += x_ND[r, i] * x_ND[r, i]
        inverse = np.float32(1 / math.sqrt(square / np.float32(D) + eps))
        inverse_N[r] = inverse
        for i in range(D):
            y_ND[r, i] = x_ND[r, i] * inverse * weight_D[i]


@_kernel
def _backward(x_ND, weight_D, inverse_N, dy_ND, dx_ND, dweight_GD, start, stop):
    """Gradients of the rows of groups start:stop; dweight, zero at first, is summed over each group's rows."""
    N, D = x_ND.shape
    for g in range(start, stop):
        for r in range(N * g // GROUPS, N * (g + 1) // GROUPS):
            inverse, product = inverse_N[r], np.float32(0)
            for i in range(D):
                product += dy_ND[r, i] * weight_D[i] * x_ND[r, i]
            along = product * inverse * inverse * inverse / np.float32(D)
            for i in range(D):
                dx_ND[r, i] = dy_ND[r, i] * weight_D[i] * inverse - x_ND[r, i] * along
                dweight_GD[g, i] += dy_ND[r, i] * x_ND[r, i] * inverse


class CpuRMSNorm(torch.autograd.Function):
    """x [..., D] and weight [D] float32 on a CPU -> x / sqrt(mean(x^2) + eps) * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x_ND = x.reshape(-1, x.shape[-1]).contiguous()
        y_ND, inverse_N = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND))
        bounds = thread_shares(len(x_ND))
        run_kernel(_forward, bounds, x_ND, weight.contiguous(), eps, y_ND, inverse_N)
        ctx.save_for_backward(x_ND, weight, inverse_N)
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight, inverse_N = ctx.saved_tensors
        dx_ND, dweight_GD = torch.empty_like(x_ND), x_ND.new_zeros(GROUPS, x_ND.shape[1])
        bounds = thread_shares(GROUPS)
        arguments = (x_ND, weight.contiguous(), inverse_N, dy.reshape(x_ND.shape).contiguous(), dx_ND, dweight_GD)
        run_kernel(_backward, bounds, *arguments)
        return dx_ND.view(dy.shape), dweight_GD.sum(0), None
