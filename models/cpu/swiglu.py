"""silu(gate) * up on CPUs, one pass forward and one backward over the joint [gate | up] rows.

PyTorch rounds each step to the rows' type and joins the two gradients by a copy; here steps are float32 and each
gradient goes to its place.

Shapes: N rows, F hidden width, J = 2F.
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

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})
_ONE = np.float32(1)


@_kernel
def _forward(joint_NJ, y_NF, start, stop):
    F = y_NF.shape[1]
    gate, up = np.empty(F, np.float32), np.empty(F, np.float32)
    for r in range(start, stop):
        read_row(joint_NJ[r, :F], gate)
        read_row(joint_NJ[r, F:], up)
        for i in range(F):
            up[i] *= gate[i] / (_ONE + exp32(-gate[i]))
        write_row(up, y_NF[r])


@_kernel
def _backward(joint_NJ, dy_NF, djoint_NJ, start, stop):
    F = dy_NF.shape[1]
    gate, up, dy = np.empty(F, np.float32), np.empty(F, np.float32), np.empty(F, np.float32)
    for r in range(start, stop):
        read_row(joint_NJ[r, :F], gate)
        read_row(joint_NJ[r, F:], up)
        read_row(dy_NF[r], dy)
        for i in range(F):
            open_ = _ONE / (_ONE + exp32(-gate[i]))
            silu = gate[i] * open_
            gate[i] = dy[i] * up[i] * (open_ + silu * (_ONE - open_))
            up[i] = dy[i] * silu
        write_row(gate, djoint_NJ[r, :F])
        write_row(up, djoint_NJ[r, F:])


class CpuSwiGLU(torch.autograd.Function):
    """[..., gate | up] float32 or bfloat16 on a CPU -> silu(gate) * up in the same type."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:  # type: ignore[override]
        joint_NJ = joint.reshape(-1, joint.shape[-1]).contiguous()
        y_NF = joint.new_empty(len(joint_NJ), joint.shape[-1] // 2)
        run_kernel(_forward, thread_shares(len(joint_NJ)), joint_NJ, y_NF)
        ctx.save_for_backward(joint_NJ)
        return y_NF.view(*joint.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (joint_NJ,) = ctx.saved_tensors
        djoint_NJ = torch.empty_like(joint_NJ)
        dy_NF = dy.reshape(len(joint_NJ), -1).contiguous()
        run_kernel(_backward, thread_shares(len(joint_NJ)), joint_NJ, dy_NF, djoint_NJ)
        return djoint_NJ.view(*dy.shape[:-1], -1)
