"""What stands before and after the delta rule on CPUs, each one pass over a token's row forward and one backward.

`CpuUnitHeads` splits [q | k | v] into heads and normalises those of q and k; `CpuGatedNorm` normalises the heads of
the output and multiplies by silu(gate). PyTorch makes either of a dozen passes over memory and joins gradients by
copies.

Shapes: N rows (batch times time), D = H * E, H heads, E width of a head, J = [q | k | v] joined, G groups of rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.cpu.float32 import exp32, read_row, write_row
from models.cpu.norm import GROUPS
from models.cpu.threads import run_kernel, thread_shares

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
_ZERO, _ONE = np.float32(0), np.float32(1)
_LEAST = np.float32(1e-12)  # length below which F.normalize does not divide by the length either


@_kernel
def _unit_forward(joint_NJ, q_ND, k_ND, v_NV, E, start, stop):
    D = q_ND.shape[1]
    row = np.empty(joint_NJ.shape[1], np.float32)
    heads_HE = row[: 2 * D].reshape(-1, E)
    for r in range(start, stop):
        read_row(joint_NJ[r], row)
        for h in range(len(heads_HE)):
            square = _ZERO
            for i in range(E):
                square += heads_HE[h, i] * heads_HE[h, i]
            inverse = _ONE / max(np.float32(math.sqrt(square)), _LEAST)
            for i in range(E):
                heads_HE[h, i] *= inverse
        write_row(row[:D], q_ND[r])
        write_row(row[D : 2 * D], k_ND[r])
        write_row(row[2 * D :], v_NV[r])


@_kernel
def _unit_backward(joint_NJ, dq_ND, dk_ND, dv_NV, djoint_NJ, E, start, stop):
    D, J = dq_ND.shape[1], joint_NJ.shape[1]
    row, grad = np.empty(J, np.float32), np.empty(J, np.float32)
    heads_HE, grads_HE = row[: 2 * D].reshape(-1, E), grad[: 2 * D].reshape(-1, E)
    for r in range(start, stop):
        read_row(joint_NJ[r], row)
        read_row(dq_ND[r], grad[:D])
        read_row(dk_ND[r], grad[D : 2 * D])
        read_row(dv_NV[r], grad[2 * D :])
        for h in range(len(heads_HE)):
            square, along = _ZERO, _ZERO
            for i in range(E):
                square += heads_HE[h, i] * heads_HE[h, i]
                along += heads_HE[h, i] * grads_HE[h, i]
            length = np.float32(math.sqrt(square))
            inverse = _ONE / max(length, _LEAST)
            along *= inverse * inverse if length > _LEAST else _ZERO
            for i in range(E):
                grads_HE[h, i] = (grads_HE[h, i] - heads_HE[h, i] * along) * inverse
        write_row(grad, djoint_NJ[r])


@_kernel
def _gated_forward(x_ND, gate_ND, weight_E, eps, y_ND, start, stop):
    D, E = x_ND.shape[1], len(weight_E)
    x, gate = np.empty(D, np.float32), np.empty(D, np.float32)
    x_HE, gate_HE = x.reshape(-1, E), gate.reshape(-1, E)
    for r in range(start, stop):
        read_row(x_ND[r], x)
        read_row(gate_ND[r], gate)
        for i in range(D):
            gate[i] /= _ONE + exp32(-gate[i])
        for h in range(len(x_HE)):
            square = _ZERO
            for i in range(E):
                square += x_HE[h, i] * x_HE[h, i]
            inverse = np.float32(1 / math.sqrt(square / np.float32(E) + eps))
            for i in range(E):
                x_HE[h, i] *= inverse * weight_E[i] * gate_HE[h, i]
        write_row(x, y_ND[r])


@_kernel
def _gated_backward(x_ND, gate_ND, weight_E, eps, dy_ND, dx_ND, dgate_ND, dweight_GE, start, stop):
    """Gradients of the rows of groups start:stop; dweight, zero at first, is summed over each group's rows."""
    (N, D), E = x_ND.shape, len(weight_E)
    x, gate, dy, silu = (
        np.empty(D, np.float32),
        np.empty(D, np.float32),
        np.empty(D, np.float32),
        np.empty(D, np.float32),
    )
    x_HE, gate_HE, dy_HE, silu_HE = x.reshape(-1, E), gate.reshape(-1, E), dy.reshape(-1, E), silu.reshape(-1, E)
    for g in range(start, stop):
        dweight = dweight_GE[g]
        for r in range(N * g // GROUPS, N * (g + 1) // GROUPS):
            read_row(x_ND[r], x)
            read_row(gate_ND[r], gate)
            read_row(dy_ND[r], dy)
            for i in range(D):
                open_ = _ONE / (_ONE + exp32(-gate[i]))
                silu[i] = gate[i] * open_
                gate[i] = dy[i] * (open_ + silu[i] * (_ONE - open_))
            for h in range(len(x_HE)):
                square, product = _ZERO, _ZERO
                for i in range(E):
                    dy_HE[h, i] *= silu_HE[h, i]
                    square += x_HE[h, i] * x_HE[h, i]
                    product += dy_HE[h, i] * weight_E[i] * x_HE[h, i]
                inverse = np.float32(1 / math.sqrt(square / np.float32(E) + eps))
                along = product * inverse * inverse * inverse / np.float32(E)
                for i in range(E):
                    unit = x_HE[h, i] * inverse
                    gate_HE[h, i] *= unit * weight_E[i]
                    dweight[i] += dy_HE[h, i] * unit
                    x_HE[h, i] = dy_HE[h, i] * weight_E[i] * inverse - x_HE[h, i] * along
            write_row(x, dx_ND[r])
            write_row(gate, dgate_ND[r])


def _rows(x: Tensor, axes: int) -> Tensor:
    """[N, D] of the joined last axes."""
    return x.flatten(x.dim() - axes).flatten(0, -2).contiguous()


class CpuUnitHeads(torch.autograd.Function):
    """joint [..., q | k | v] float32 or bfloat16 on a CPU -> q, k [..., H, E] and v [..., H, V] by heads.

    q and k are float32 and divided by their length, or by 1e-12 where they are shorter, as F.normalize does.
    """

    @staticmethod
    def forward(ctx: Any, joint: Tensor, n_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        joint_NJ, D = _rows(joint, 1), n_heads * width
        q_ND, k_ND = (torch.empty(len(joint_NJ), D) for _ in range(2))
        v_NV = joint_NJ.new_empty(len(joint_NJ), joint_NJ.shape[1] - 2 * D)
        bounds = thread_shares(len(joint_NJ))
        run_kernel(_unit_forward, bounds, joint_NJ, q_ND, k_ND, v_NV, width)
        ctx.save_for_backward(joint_NJ)
        ctx.width = width
        q, k, v = (x.view(*joint.shape[:-1], n_heads, -1) for x in (q_ND, k_ND, v_NV))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        (joint_NJ,) = ctx.saved_tensors
        djoint_NJ = torch.empty_like(joint_NJ)
        bounds = thread_shares(len(joint_NJ))
        grads = (_rows(d, 2) for d in (dq, dk, dv))
        run_kernel(_unit_backward, bounds, joint_NJ, *grads, djoint_NJ, ctx.width)
        return djoint_NJ.view(*dq.shape[:-2], -1), None, None


class CpuGatedNorm(torch.autograd.Function):
    """x, gate [..., H, E], weight [E] on a CPU -> x / sqrt(mean(x^2) + eps) * weight * silu(gate), in the gate's type.

    Types are float32 or bfloat16, the weight float32; computed in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x_ND, gate_ND = _rows(x, 2), _rows(gate, 2)
        y_ND = torch.empty_like(gate_ND)
        bounds = thread_shares(len(x_ND))
        run_kernel(_gated_forward, bounds, x_ND, gate_ND, weight.contiguous(), eps, y_ND)
        ctx.save_for_backward(x_ND, gate_ND, weight)
        ctx.eps = eps
        return y_ND.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, gate_ND, weight = ctx.saved_tensors
        dx_ND, dgate_ND = torch.empty_like(x_ND), torch.empty_like(gate_ND)
        dweight_GE = weight.new_zeros(GROUPS, len(weight))
        bounds = thread_shares(GROUPS)
        results = (dx_ND, dgate_ND, dweight_GE)
        run_kernel(_gated_backward, bounds, x_ND, gate_ND, weight.contiguous(), ctx.eps, _rows(dy, 2), *results)
        return dx_ND.view(dy.shape), dgate_ND.view(dy.shape), dweight_GE.sum(0), None
