"""Chunkwise Gated DeltaNet with a hand-written backward pass.

Inside a chunk that starts from state S (Yang et al. 2024, "Gated Delta Networks", eqs. 8-10; UT transform of
"Parallelizing Linear Transformers with the Delta Rule", eqs. 10-11), with gamma the running sum of the log decay:

    D_ij = exp(gamma_i - gamma_j) for i >= j            A = strictly_lower(beta_i D_ij k_i.k_j)
    [U | W] = (I + A)^-1 [beta V | beta e^gamma K]      V' = U - W S
    O = e^gamma Q S + (D * Q K^T) V'                    S_next = P S + R
    P = e^gamma_C I - K_out^T W    R = K_out^T U        K_out = e^(gamma_C - gamma) K

Only S_next = P S + R is sequential. Matrix products are made here, the rest in `_delta_rule_torch` or, in float32 on
CPUs, by the compiled passes of `_delta_rule_cpu`. The backward pass recomputes everything from the inputs and the
states S at the start of each span of time.

Shapes: B batch, R rows, T time, h query/key heads, H value heads, K, V head widths, N chunks, C chunk length,
G = R*H, M = G*N matrices of one chunk each.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops import _delta_rule_torch
from models.ops._delta_rule_torch import SOLVE_BLOCK, Backward, Rows
from models.ops._layout import compute_dtype, from_chunks, no_autocast, row_groups, time_spans, to_chunks

CHUNK = 32
SPAN = 128  # tokens


class _Chunks(NamedTuple):
    """What depends on the inputs of a chunk alone, not on the state that enters it."""

    rows: Rows
    kk_MCC: Tensor  # D * K K^T
    qk_MCC: Tensor  # D * Q K^T
    inverse_MCC: Tensor  # (I + A)^-1
    UW_MCX: Tensor  # [U | W]
    P_MKK: Tensor


def _floats(k: Tensor, v: Tensor) -> int:
    """Queries, keys and values of a row and a span."""
    return min(SPAN, v.shape[1]) * v.shape[2] * (2 * k.shape[3] + v.shape[3])


def _elementwise(*inputs: Tensor) -> ModuleType:
    """What makes everything but the matrix products for these queries, keys and values."""
    if any(x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) for x in inputs):
        return _delta_rule_torch
    from models.ops import _delta_rule_cpu  # numba takes a second to import

    return _delta_rule_cpu


def _prepare(rest: ModuleType, inputs: Sequence[Tensor], scale: float, chunk: int) -> _Chunks:
    rows: Rows
    rows, writes = rest.gather(*inputs, scale, chunk)
    k_MKC = rows.k_MCK.transpose(1, 2)
    kk, qk = torch.bmm(rows.k_MCK, k_MKC), torch.bmm(rows.q_MCK, k_MKC)
    inverse = rest.decay_and_invert(kk, qk, rows)
    UW = torch.bmm(inverse, writes)
    P = torch.bmm(rows.k_out_MCK.transpose(1, 2), UW[..., rows.v_MCV.shape[2] :]).neg_()
    P.diagonal(dim1=1, dim2=2).add_(rows.decay_all_M.unsqueeze(1))
    return _Chunks(rows, kk, qk, inverse, UW, P)


def _states(c: _Chunks, start_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """States that enter the chunks [G*N, K, V], and the one that leaves the last [G, K, V]."""
    G, K, V = start_GKV.shape
    P_GNKK = c.P_MKK.view(G, -1, K, K)
    R_GNKV = torch.bmm(c.rows.k_out_MCK.transpose(1, 2), c.UW_MCX[..., :V]).view(G, -1, K, V)
    N = R_GNKV.shape[1]
    # chunks come first: a batched product with a contiguous result is one call, any other a call for each matrix
    states_nGKV = start_GKV.new_empty(N + 1, G, K, V)
    states_nGKV[0] = start_GKV
    for n in range(N):
        torch.baddbmm(R_GNKV[:, n], P_GNKK[:, n], states_nGKV[n], out=states_nGKV[n + 1])
    return states_nGKV[:N].transpose(0, 1).reshape(G * N, K, V), states_nGKV[N]


def _forward_span(c: _Chunks, start_GKV: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [M, C, V] and the state after the last chunk."""
    V = start_GKV.shape[2]
    S, final = _states(c, start_GKV)
    v_new = torch.baddbmm(c.UW_MCX[..., :V], c.UW_MCX[..., V:], S, alpha=-1)
    o = torch.bmm(c.rows.q_MCK * c.rows.decay_in_MC1, S).baddbmm_(c.qk_MCC, v_new)
    return o, final


def _backward_span(
    rest: ModuleType,
    c: _Chunks,
    start_GKV: Tensor,
    do_MCV: Tensor,
    dfinal_GKV: Tensor,
    scale: float,
    grads: Sequence[Tensor],
) -> Tensor:
    """Write the gradients of a span's q, k, v, g and beta to `grads`; returns that of the state at its start."""
    G, K, V = start_GKV.shape
    rows = c.rows
    S, _ = _states(c, start_GKV)
    W = c.UW_MCX[..., V:]
    v_new = torch.baddbmm(c.UW_MCX[..., :V], W, S, alpha=-1)

    dv_new = torch.bmm(c.qk_MCC.transpose(1, 2), do_MCV)
    q_in = rows.q_MCK * rows.decay_in_MC1
    read = torch.bmm(q_in.transpose(1, 2), do_MCV).baddbmm_(W.transpose(1, 2), dv_new, alpha=-1)
    read_GNKV, P_GNKK = read.view(G, -1, K, V), c.P_MKK.view(G, -1, K, K)
    N = read_GNKV.shape[1]
    dstates_nGKV = read.new_empty(N + 1, G, K, V)
    dstates_nGKV[N] = dfinal_GKV
    for n in reversed(range(N)):
        torch.baddbmm(read_GNKV[:, n], P_GNKK[:, n].transpose(1, 2), dstates_nGKV[n + 1], out=dstates_nGKV[n])
    dnext, dinitial = dstates_nGKV[1:].transpose(0, 1).reshape(G * N, K, V), dstates_nGKV[0]

    del q_in, read, read_GNKV  # memory for what follows

    dv_new.baddbmm_(rows.k_out_MCK, dnext)
    dUW = torch.empty_like(c.UW_MCX)
    dUW[..., :V] = dv_new
    dUW[..., V:] = torch.bmm(dv_new, S.transpose(1, 2)).neg_()
    dwrites = torch.bmm(c.inverse_MCC.transpose(1, 2), dUW)
    del dv_new, dUW
    minus_dA = torch.bmm(dwrites, c.UW_MCX.transpose(1, 2))
    dqk = torch.bmm(do_MCV, v_new.transpose(1, 2))
    dbeta, dgamma = rest.through_products(minus_dA, dqk, c.kk_MCC, c.qk_MCC, rows)
    back = Backward(
        S,
        dnext,
        dwrites,
        dq_in_MCK=torch.bmm(do_MCV, S.transpose(1, 2)),
        dk_out_MCK=torch.bmm(v_new, dnext.transpose(1, 2)),
        dq_MCK=torch.bmm(dqk, rows.k_MCK),
        dk_MCK=torch.bmm(minus_dA, rows.k_MCK).baddbmm_(dqk.transpose(1, 2), rows.q_MCK),
    )
    rest.finish(rows, back, dbeta, dgamma, scale, grads)
    return dinitial


class _ChunkedGatedDelta(torch.autograd.Function):
    """Saves the inputs and one state per span of time; on a CPU few batch rows and one span at once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        B, T, H, V = v.shape
        dtype = compute_dtype(q, k, v)
        rest, spans = _elementwise(q, k, v), time_spans(T, SPAN, v.device)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        states = torch.zeros(len(spans) + 1, B, H, k.shape[3], V, dtype=dtype, device=v.device)
        if initial is not None:
            states[0] = initial
        with no_autocast(v):
            for r in row_groups(B, v.device, _floats(k, v)):
                for i, t in enumerate(spans):
                    c = _prepare(rest, [x[r, t] for x in (q, k, v, g, beta)], scale, chunk)
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
        dtype, chunk = states.dtype, ctx.chunk
        rest, spans = _elementwise(q, k, v), list(enumerate(time_spans(v.shape[1], SPAN, v.device)))
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta)]
        dinitial = torch.zeros_like(states[0]) if dfinal is None else dfinal.to(dtype, copy=True)
        do = torch.zeros_like(v) if do is None else do
        with no_autocast(v):
            for r in row_groups(v.shape[0], v.device, _floats(k, v)):
                for i, t in reversed(spans):
                    c = _prepare(rest, [x[r, t] for x in (q, k, v, g, beta)], ctx.scale, chunk)
                    do_MCV, out = to_chunks(do[r, t], chunk, dtype), [x[r, t] for x in grads]
                    state, dstate = states[i, r].flatten(0, 1), dinitial[r].flatten(0, 1)
                    before = _backward_span(rest, c, state, do_MCV, dstate, ctx.scale, out)
                    dinitial[r] = before.view_as(dinitial[r])
                    del c  # before the next span makes its own
        dstart = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
        return (*grads, dstart, None, None)


def chunked_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as in `models.ops.gated_delta`, already checked."""
    chunk = CHUNK if k.shape[1] > SOLVE_BLOCK else SOLVE_BLOCK
    return _ChunkedGatedDelta.apply(q, k, v, g, beta, initial_state, scale, chunk)
