"""The elementwise half of the chunked delta rule in PyTorch, for any device and type; `_delta_rule_cpu` is the other.

Formulas are in `_delta_rule_chunked`, which makes the matrix products.

Shapes: R rows, T time, h query/key heads, H value heads, K, V head widths, X = V + K, C chunk length, M chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops._layout import compute_dtype, from_chunks, relative_decay, to_chunks

SOLVE_BLOCK = 16


class Rows(NamedTuple):
    """Inputs by chunk, padded with zeros, and what follows from them without a matrix product."""

    q_MCK: Tensor  # scaled
    k_MCK: Tensor
    v_MCV: Tensor
    beta_MC1: Tensor
    decay_in_MC1: Tensor  # e^gamma
    decay_out_MC1: Tensor  # e^(gamma_C - gamma)
    decay_all_M: Tensor  # e^gamma_C
    D_MCC: Tensor
    k_out_MCK: Tensor


class Backward(NamedTuple):
    """What the matrix products of the backward pass give: the states S, and gradients of what the names say."""

    S_MKV: Tensor
    dnext_MKV: Tensor  # of the state that leaves the chunk
    dwrites_MCX: Tensor
    dq_in_MCK: Tensor  # of e^gamma Q
    dk_out_MCK: Tensor
    dq_MCK: Tensor  # by way of Q K^T alone
    dk_MCK: Tensor  # by way of Q K^T and K K^T alone


def gather(
    q_RThK: Tensor, k_RThK: Tensor, v_RTHV: Tensor, g_RTH: Tensor, beta_RTH: Tensor, scale: float, chunk: int
) -> tuple[Rows, Tensor]:
    """Rows of whole chunks, in at least float32, and [beta V | beta e^gamma K]."""
    dtype = compute_dtype(q_RThK, k_RThK, v_RTHV)
    H, K, V = v_RTHV.shape[2], k_RThK.shape[3], v_RTHV.shape[3]
    group = H // k_RThK.shape[2]
    if group > 1:
        q_RThK = q_RThK.repeat_interleave(group, 2)
        k_RThK = k_RThK.repeat_interleave(group, 2)
    q = to_chunks(q_RThK, chunk, dtype).mul_(scale)
    k = to_chunks(k_RThK, chunk, dtype)
    v = to_chunks(v_RTHV, chunk, dtype)
    beta = to_chunks(beta_RTH.unsqueeze(3), chunk, dtype)
    gamma64 = to_chunks(g_RTH.unsqueeze(3), chunk, torch.float64).squeeze(2).cumsum(1)
    decay_in = gamma64.exp().to(dtype).unsqueeze(2)
    decay_out = (gamma64[:, -1:] - gamma64).exp().to(dtype).unsqueeze(2)
    writes = torch.empty(*k.shape[:2], V + K, dtype=dtype, device=k.device)
    torch.mul(v, beta, out=writes[..., :V])
    torch.mul(k, beta * decay_in, out=writes[..., V:])
    D = relative_decay(gamma64, dtype)
    return Rows(q, k, v, beta, decay_in, decay_out, decay_in[:, -1, 0], D, k * decay_out), writes


def decay_and_invert(kk_MCC: Tensor, qk_MCC: Tensor, rows: Rows) -> Tensor:
    """(I + A)^-1 with A = strictly_lower(beta D * K K^T); K K^T and Q K^T are multiplied by D in place."""
    kk_MCC.mul_(rows.D_MCC)
    qk_MCC.mul_(rows.D_MCC)
    # correlated keys at beta near 2 lose two digits in a float32 solve; in float64 it costs no measurable time
    return unit_lower_inverse((kk_MCC * rows.beta_MC1).tril_(-1).to(torch.float64)).to(kk_MCC.dtype)


def unit_lower_inverse(A_MCC: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower triangular A [M, C, C]; C <= 16 or 16 times a power of two.

    Diagonal blocks of 16 by forward substitution, merged pairwise: [[X, 0], [-Y A21 X, Y]]. A Neumann product
    costs fewer operations, but its powers of A overflow for correlated keys at beta near 2.
    """
    M, C, _ = A_MCC.shape
    size = min(SOLVE_BLOCK, C)
    eye = torch.eye(size, dtype=A_MCC.dtype, device=A_MCC.device)
    blocks = _blocks(A_MCC, size, row=0, col=0, step=1)
    inverse = torch.linalg.solve_triangular(blocks, eye.expand_as(blocks), upper=False, unitriangular=True)
    while size < C:
        pairs = inverse.reshape(-1, 2, size, size)
        upper_left, lower_right = pairs[:, 0], pairs[:, 1]
        coupling = _blocks(A_MCC, size, row=1, col=0, step=2)
        merged = A_MCC.new_zeros(pairs.shape[0], 2 * size, 2 * size)
        merged[:, :size, :size] = upper_left
        merged[:, size:, size:] = lower_right
        merged[:, size:, :size] = torch.bmm(lower_right, torch.bmm(coupling, upper_left)).neg_()
        inverse, size = merged, 2 * size
    return inverse.view(M, C, C)


def _blocks(A_MCC: Tensor, size: int, *, row: int, col: int, step: int) -> Tensor:
    """Blocks (row + i*step, col + i*step) of a grid of size x size blocks, as one batch [M * C/(size*step), ...]."""
    M, C, _ = A_MCC.shape
    n = C // size
    grid = A_MCC.view(M, n, size, n, size)
    picked = [grid[:, row + i, :, col + i] for i in range(0, n, step)]
    return torch.stack(picked, 1).view(-1, size, size)


def through_products(
    minus_dA_MCC: Tensor, dqk_MCC: Tensor, kk_MCC: Tensor, qk_MCC: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Gradients of beta and gamma [M, C] by way of A and D * Q K^T, whose gradients are -minus_dA and dqk.

    In their place: the gradient of K K^T plus its transpose, and that of Q K^T.
    """
    dA, dqk = minus_dA_MCC.neg_().tril_(-1), dqk_MCC.tril_()
    # every product that D enters also feeds gamma: +1 to its row, -1 to its column. On the diagonal the two cancel
    # and are dropped: under fast decay they are far larger than what remains
    through_D = dA * kk_MCC
    dbeta = through_D.sum(2)
    through_D.mul_(rows.beta_MC1).addcmul_(dqk, qk_MCC).tril_(-1)
    dgamma = through_D.sum(2).sub_(through_D.sum(1))
    dA.mul_(rows.beta_MC1).mul_(rows.D_MCC)
    dA.add_(dA.transpose(1, 2).clone())
    dqk.mul_(rows.D_MCC)
    return dbeta, dgamma


def finish(
    rows: Rows, back: Backward, dbeta_MC: Tensor, dgamma_MC: Tensor, scale: float, grads: Sequence[Tensor]
) -> None:
    """Complete the gradients of q, k, v, g and beta and write them to `grads`, in the layout of the inputs."""
    V = rows.v_MCV.shape[2]
    dv_beta, dk_beta = back.dwrites_MCX[..., :V], back.dwrites_MCX[..., V:]
    dq = back.dq_MCK.addcmul_(back.dq_in_MCK, rows.decay_in_MC1).mul_(scale)
    dk = back.dk_MCK.addcmul_(dk_beta, rows.beta_MC1 * rows.decay_in_MC1)
    dk.addcmul_(back.dk_out_MCK, rows.decay_out_MC1)
    from_k_beta = (dk_beta * rows.k_MCK).sum(2).mul_(rows.decay_in_MC1.squeeze(2))
    dbeta = dbeta_MC + (dv_beta * rows.v_MCV).sum(2) + from_k_beta
    from_k_out = (back.dk_out_MCK * rows.k_out_MCK).sum(2)
    from_k_out[:, -1] = 0
    read = (back.dq_in_MCK * rows.q_MCK).sum(2) * rows.decay_in_MC1.squeeze(2)
    dgamma = dgamma_MC + from_k_beta * rows.beta_MC1.squeeze(2) + read - from_k_out
    dgamma[:, -1] += from_k_out.sum(1) + rows.decay_all_M * (back.S_MKV * back.dnext_MKV).sum((1, 2))
    dg = dgamma.flip(1).cumsum(1).flip(1)
    for x_MCK, out in ((dq, grads[0]), (dk, grads[1])):
        h, H = out.shape[2], grads[2].shape[2]
        per_head = torch.empty(*out.shape[:2], H, out.shape[3], dtype=x_MCK.dtype, device=out.device)
        from_chunks(x_MCK, per_head)
        out.copy_(per_head.unflatten(2, (h, H // h)).sum(3) if h < H else per_head)
    from_chunks(dv_beta * rows.beta_MC1, grads[2])
    from_chunks(dg.unsqueeze(2), grads[3].unsqueeze(3))
    from_chunks(dbeta.unsqueeze(2), grads[4].unsqueeze(3))
