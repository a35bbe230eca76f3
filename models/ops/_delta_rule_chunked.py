"""Chunkwise Gated DeltaNet in plain PyTorch with a hand-written backward pass.

Inside a chunk that starts from state S (Yang et al. 2024, "Gated Delta Networks", eqs. 8-10; UT transform of
"Parallelizing Linear Transformers with the Delta Rule", eqs. 10-11), with gamma the running sum of the log decay:

    D_ij = exp(gamma_i - gamma_j) for i >= j            A = strictly_lower(beta_i D_ij k_i.k_j)
    [U | W] = (I + A)^-1 [beta V | beta e^gamma K]      V' = U - W S
    O = e^gamma Q S + (D * Q K^T) V'                    S_next = P S + R
    P = e^gamma_C I - K_out^T W    R = K_out^T U        K_out = e^(gamma_C - gamma) K

Only S_next = P S + R is sequential. The backward pass recomputes everything from
the inputs and the states S at the start of each span of time.

Shapes: B batch, R rows, T time, h query/key heads, H value heads, K, V head widths, N chunks, C chunk length,
G = R*H, M = G*N matrices of one chunk each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import (
    compute_dtype,
    from_chunks,
    no_autocast,
    relative_decay,
    row_groups,
    time_spans,
    to_chunks,
)

CHUNK = 32
SPAN = 128  # tokens
SOLVE_BLOCK = 16


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


class _Chunks(NamedTuple):
    """What depends on the inputs of a chunk alone, not on the state that enters it."""

    q_MCK: Tensor  # scaled
    k_MCK: Tensor
    v_MCV: Tensor
    beta_MC1: Tensor
    decay_in_MC1: Tensor  # e^gamma
    decay_out_MC1: Tensor  # e^(gamma_C - gamma)
    decay_all_M: Tensor  # e^gamma_C
    D_MCC: Tensor
    kk_MCC: Tensor  # D * K K^T
    qk_MCC: Tensor  # D * Q K^T
    inverse_MCC: Tensor  # (I + A)^-1
    UW_MCX: Tensor  # [U | W], X = V + K
    k_out_MCK: Tensor
    P_MKK: Tensor


def _prepare(
    q_RThK: Tensor, k_RThK: Tensor, v_RTHV: Tensor, g_RTH: Tensor, beta_RTH: Tensor, scale: float, chunk: int
) -> _Chunks:
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

    D = relative_decay(gamma64, dtype)
    kk = torch.bmm(k, k.transpose(1, 2)).mul_(D)
    qk = torch.bmm(q, k.transpose(1, 2)).mul_(D)
    # correlated keys at beta near 2 lose two digits in a float32 solve; in float64 it costs no measurable time
    inverse = unit_lower_inverse((kk * beta).tril_(-1).to(torch.float64)).to(dtype)

    decay_in = gamma64.exp().to(dtype).unsqueeze(2)
    decay_out = (gamma64[:, -1:] - gamma64).exp().to(dtype).unsqueeze(2)
    writes = torch.empty(*k.shape[:2], V + K, dtype=dtype, device=k.device)
    torch.mul(v, beta, out=writes[..., :V])
    torch.mul(k, beta * decay_in, out=writes[..., V:])
    UW = torch.bmm(inverse, writes)

    k_out = k * decay_out
    P = torch.bmm(k_out.transpose(1, 2), UW[..., V:]).neg_()
    decay_all = decay_in[:, -1, 0]
    P.diagonal(dim1=1, dim2=2).add_(decay_all.unsqueeze(1))
    return _Chunks(q, k, v, beta, decay_in, decay_out, decay_all, D, kk, qk, inverse, UW, k_out, P)


def _states(c: _Chunks, start_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """States that enter the chunks [G*N, K, V], and the one that leaves the last [G, K, V]."""
    G, K, V = start_GKV.shape
    P_GNKK = c.P_MKK.view(G, -1, K, K)
    R_GNKV = torch.bmm(c.k_out_MCK.transpose(1, 2), c.UW_MCX[..., :V]).view(G, -1, K, V)
    N = R_GNKV.shape[1]
    # chunks come first: a batched product with a contiguous result is one call, any other a call for each matrix
    states_nGKV = start_GKV.new_empty(N + 1, G, K, V)
    states_nGKV[0] = start_GKV
    for n in range(N):
        torch.baddbmm(R_GNKV[:, n], P_GNKK[:, n], states_nGKV[n], out=states_nGKV[n + 1])
    return states_nGKV[:N].transpose(0, 1).reshape(G * N, K, V), states_nGKV[N]


def _forward_span(c: _Chunks, start_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [M, C, V] and the state after the last chunk."""
    V = c.v_MCV.shape[2]
    S, final = _states(c, start_GKV)
    v_new = torch.baddbmm(c.UW_MCX[..., :V], c.UW_MCX[..., V:], S, alpha=-1)
    o = torch.bmm(c.q_MCK * c.decay_in_MC1, S).baddbmm_(c.qk_MCC, v_new)
    return o, final


class _SpanGrads(NamedTuple):
    q_MCK: Tensor
    k_MCK: Tensor
    v_MCV: Tensor
    g_MC1: Tensor
    beta_MC1: Tensor
    initial_GKV: Tensor


def _backward_span(c: _Chunks, start_GKV: Tensor, do_MCV: Tensor, dfinal_GKV: Tensor) -> _SpanGrads:
    G, K, V = start_GKV.shape
    S, _ = _states(c, start_GKV)
    W = c.UW_MCX[..., V:]
    v_new = torch.baddbmm(c.UW_MCX[..., :V], W, S, alpha=-1)
    q_in = c.q_MCK * c.decay_in_MC1

    dv_new = torch.bmm(c.qk_MCC.transpose(1, 2), do_MCV)
    read = torch.bmm(q_in.transpose(1, 2), do_MCV).baddbmm_(W.transpose(1, 2), dv_new, alpha=-1)
    read_GNKV, P_GNKK = read.view(G, -1, K, V), c.P_MKK.view(G, -1, K, K)
    N = read_GNKV.shape[1]
    dstates_nGKV = read.new_empty(N + 1, G, K, V)
    dstates_nGKV[N] = dfinal_GKV
    for n in reversed(range(N)):
        torch.baddbmm(read_GNKV[:, n], P_GNKK[:, n].transpose(1, 2), dstates_nGKV[n + 1], out=dstates_nGKV[n])
    dnext, dinitial = dstates_nGKV[1:].transpose(0, 1).reshape(G * N, K, V), dstates_nGKV[0]

    dv_new.baddbmm_(c.k_out_MCK, dnext)
    dUW = torch.empty_like(c.UW_MCX)
    dUW[..., :V] = dv_new
    dUW[..., V:] = torch.bmm(dv_new, S.transpose(1, 2)).neg_()
    dwrites = torch.bmm(c.inverse_MCC.transpose(1, 2), dUW)
    dA = torch.bmm(dwrites, c.UW_MCX.transpose(1, 2)).neg_().tril_(-1)
    dqk = torch.bmm(do_MCV, v_new.transpose(1, 2)).tril_()
    dq_in = torch.bmm(do_MCV, S.transpose(1, 2))
    dk_out = torch.bmm(v_new, dnext.transpose(1, 2))
    dv_beta, dk_beta = dwrites[..., :V], dwrites[..., V:]

    # every product that D enters also feeds gamma: +1 to its row, -1 to its column. On the diagonal the two cancel
    # and are dropped: under fast decay they are far larger than what remains
    through_D = dA * c.kk_MCC
    dbeta = through_D.sum(2, keepdim=True)
    through_D.mul_(c.beta_MC1).addcmul_(dqk, c.qk_MCC).tril_(-1)
    dgamma = through_D.sum(2).sub_(through_D.sum(1))
    dA.mul_(c.beta_MC1).mul_(c.D_MCC)
    dqk.mul_(c.D_MCC)

    dq = torch.bmm(dqk, c.k_MCK).addcmul_(dq_in, c.decay_in_MC1)
    dk = torch.bmm(dA, c.k_MCK).baddbmm_(dA.transpose(1, 2), c.k_MCK).baddbmm_(dqk.transpose(1, 2), c.q_MCK)
    dk.addcmul_(dk_beta, c.beta_MC1 * c.decay_in_MC1).addcmul_(dk_out, c.decay_out_MC1)
    from_k_beta = (dk_beta * c.k_MCK).sum(2, keepdim=True).mul_(c.decay_in_MC1)
    dbeta.add_((dv_beta * c.v_MCV).sum(2, keepdim=True)).add_(from_k_beta)
    from_k_out = (dk_out * c.k_out_MCK).sum(2)
    from_k_out[:, -1] = 0
    dgamma.add_((from_k_beta * c.beta_MC1).squeeze(2)).add_((dq_in * q_in).sum(2)).sub_(from_k_out)
    dgamma[:, -1] += from_k_out.sum(1) + c.decay_all_M * (S * dnext).sum((1, 2))
    dg = dgamma.flip(1).cumsum(1).flip(1)
    return _SpanGrads(dq, dk, dv_beta * c.beta_MC1, dg.unsqueeze(2), dbeta, dinitial)


def _store(d: _SpanGrads, grads: list[Tensor]) -> None:
    """Write a span's gradients where they belong in those of q, k, v, g and beta."""
    dq, dk, dv, dg, dbeta = grads
    R, T, H, _ = dv.shape
    for x_MCK, out in ((d.q_MCK, dq), (d.k_MCK, dk)):
        h, K = out.shape[2:]
        per_head = torch.empty(R, T, H, K, dtype=x_MCK.dtype, device=out.device)
        from_chunks(x_MCK, per_head)
        out.copy_(per_head.unflatten(2, (h, H // h)).sum(3) if h < H else per_head)
    from_chunks(d.v_MCV, dv)
    from_chunks(d.g_MC1, dg.unsqueeze(3))
    from_chunks(d.beta_MC1, dbeta.unsqueeze(3))


class _ChunkedGatedDelta(torch.autograd.Function):
    """Saves the inputs and one state a span of time; on a CPU one batch row and one span at once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        B, T, H, V = v.shape
        spans = time_spans(T, SPAN, v.device)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        states = torch.zeros(len(spans) + 1, B, H, k.shape[3], V, dtype=compute_dtype(q, k, v), device=v.device)
        if initial is not None:
            states[0] = initial
        with no_autocast(v):
            for r in row_groups(B, v.device):
                for i, t in enumerate(spans):
                    c = _prepare(q[r, t], k[r, t], v[r, t], g[r, t], beta[r, t], scale, chunk)
                    o_MCV, next_GKV = _forward_span(c, states[i, r].flatten(0, 1))
                    states[i + 1, r] = next_GKV.view_as(states[i + 1, r])
                    from_chunks(o_MCV, o[r, t])
                    del c, o_MCV  # before the next span makes its own
        ctx.save_for_backward(q, k, v, g, beta, states[:-1])
        ctx.scale, ctx.chunk = scale, chunk
        ctx.initial_dtype = None if initial is None else initial.dtype
        ctx.set_materialize_grads(False)
        return o, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, states = ctx.saved_tensors
        spans = list(enumerate(time_spans(v.shape[1], SPAN, v.device)))
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
        dinitial = torch.zeros_like(states[0]) if dfinal is None else dfinal.to(states.dtype, copy=True)
        with no_autocast(v):
            for r in row_groups(v.shape[0], v.device):
                for i, t in reversed(spans):
                    c = _prepare(q[r, t], k[r, t], v[r, t], g[r, t], beta[r, t], ctx.scale, ctx.chunk)
                    do_MCV = torch.zeros_like(c.v_MCV) if do is None else to_chunks(do[r, t], ctx.chunk, states.dtype)
                    d = _backward_span(c, states[i, r].flatten(0, 1), do_MCV, dinitial[r].flatten(0, 1))
                    d.q_MCK.mul_(ctx.scale)
                    dinitial[r] = d.initial_GKV.view_as(dinitial[r])
                    _store(d, [x[r, t] for x in grads])
                    del c, do_MCV, d  # before the next span makes its own
        dstart = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
        return (*grads, dstart, None, None)


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as in `models.ops.gated_delta`, already checked."""
    chunk = CHUNK if k.shape[1] > SOLVE_BLOCK else SOLVE_BLOCK
    return _ChunkedGatedDelta.apply(q, k, v, g, beta, initial_state, scale, chunk)
