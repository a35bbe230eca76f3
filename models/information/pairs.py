"""Scores of all pairs of a batch by one hidden layer: s_ij = Σ_h v_h · leaky(a_ih + b_jh), with its gradients.

Plain tensors of all pairs and hidden units take 4 MiB per member and several passes over them; the kernels keep one row
of pairs in cache. `slow_pair_scores` is the same in torch, for devices without the kernels and for the tests.

Shape suffixes: M members (critics trained side by side), N pairs of a batch (rows i of x, columns j of y), H hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from models.cpu.threads import run_kernel, thread_shares

SLOPE = 0.01  # of the leaky ReLU below 0
_LOW, _ZERO = np.float32(SLOPE), np.float32(0)
_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})


@_kernel
def _scores(a_MNH, b_MHN, v_MH, s_MNN, start, stop):
    rows, hidden = a_MNH.shape[1:]
    for m in range(start, stop):
        for i in range(rows):
            s_N = s_MNN[m, i]
            s_N[:] = _ZERO
            for h in range(hidden):
                a, v, b_N = a_MNH[m, i, h], v_MH[m, h], b_MHN[m, h]
                for j in range(b_N.shape[0]):
                    z = a + b_N[j]
                    s_N[j] += v * (z if z > _ZERO else _LOW * z)


@_kernel
def _gradients(a_MNH, b_MHN, v_MH, up_MNN, da_MNH, db_MHN, dv_MH, start, stop):
    """Gradients from those of the scores; `db_MHN` and `dv_MH` begin at 0."""
    rows, hidden = a_MNH.shape[1:]
    for m in range(start, stop):
        for i in range(rows):
            up_N = up_MNN[m, i]
            for h in range(hidden):
                a, b_N, db_N = a_MNH[m, i, h], b_MHN[m, h], db_MHN[m, h]
                da, dv = _ZERO, _ZERO
                for j in range(b_N.shape[0]):
                    z = a + b_N[j]
                    t = up_N[j] if z > _ZERO else _LOW * up_N[j]
                    db_N[j] += t
                    da += t
                    dv += t * z
                da_MNH[m, i, h] = da * v_MH[m, h]
                dv_MH[m, h] += dv
        for h in range(hidden):
            db_N, v = db_MHN[m, h], v_MH[m, h]
            for j in range(db_N.shape[0]):
                db_N[j] *= v


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_MNH: Tensor, b_MNH: Tensor, v_MH: Tensor) -> Tensor:
        a_MNH, b_MHN, v_MH = a_MNH.contiguous(), b_MNH.transpose(1, 2).contiguous(), v_MH.contiguous()
        s_MNN = a_MNH.new_empty(len(a_MNH), a_MNH.shape[1], b_MHN.shape[2])
        run_kernel(_scores, thread_shares(len(a_MNH)), a_MNH, b_MHN, v_MH, s_MNN)
        ctx.save_for_backward(a_MNH, b_MHN, v_MH)
        return s_MNN

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_MNH, b_MHN, v_MH = ctx.saved_tensors
        da_MNH, db_MHN, dv_MH = torch.empty_like(a_MNH), torch.zeros_like(b_MHN), torch.zeros_like(v_MH)
        up_MNN = grad_outputs[0].contiguous()
        run_kernel(_gradients, thread_shares(len(a_MNH)), a_MNH, b_MHN, v_MH, up_MNN, da_MNH, db_MHN, dv_MH)
        return da_MNH, db_MHN.transpose(1, 2), dv_MH


def slow_pair_scores(a_MNH: Tensor, b_MNH: Tensor, v_MH: Tensor) -> Tensor:
    """`pair_scores` by plain tensor operations."""
    z_MNNH = a_MNH[:, :, None] + b_MNH[:, None]
    return torch.einsum("mijh,mh->mij", torch.nn.functional.leaky_relu(z_MNNH, SLOPE), v_MH)


def pair_scores(a_MNH: Tensor, b_MNH: Tensor, v_MH: Tensor) -> Tensor:
    """s_MNN[m, i, j] = Σ_h v[m, h] · leaky(a[m, i, h] + b[m, j, h]); differentiable."""
    if a_MNH.device.type == "cpu" and a_MNH.dtype == torch.float32:
        return _PairScores.apply(a_MNH, b_MNH, v_MH)
    return slow_pair_scores(a_MNH, b_MNH, v_MH)
