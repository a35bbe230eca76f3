"""Block decomposition of the SSD layer (Dao, Gu 2024, arXiv 2405.21060, section 6) with a hand-written backward pass.

With u = dt x, gamma the running sum of dt A inside a chunk and S the state that enters it (here [N, P]):

    Y = (L * C B^T) u + e^gamma C S        L_ij = exp(gamma_i - gamma_j) for i >= j
    W = B^T (e^(gamma_c - gamma) u)        what the chunk writes
    [S_0 ... S_n] = Lambda [S_0, W_0 ... W_{n-1}]      Lambda_ij = exp(Gamma_i - Gamma_j) between boundaries

The backward pass recomputes everything from the inputs.

Shapes: B batch, R rows, T time, H heads, P head width, G groups of heads that share B and C, g = H // G, N state
width, n chunks, c chunk length, Z = R*H, Q = g*P (the heads of a group side by side).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import from_chunks, no_autocast, relative_decay, row_groups, time_spans, to_chunks

CHUNK = 64
SPAN = 256  # tokens


class _Chunks(NamedTuple):
    """Everything the forward pass of some rows computes before the output."""

    u_RHncP: Tensor
    B_RGncN: Tensor
    C_RGncN: Tensor
    dt_RHnc: Tensor
    decay_in_RHnc1: Tensor
    decay_out_RHnc1: Tensor
    L_RHncc: Tensor
    attention_RHncc: Tensor  # L * C B^T
    out_RGncQ: Tensor  # e^(gamma_c - gamma) u
    Lambda_Znn: Tensor
    sources_ZnX: Tensor  # initial state and writes, X = N*P
    states_ZnX: Tensor


def _to_groups(z_RHnaP: Tensor, G: int) -> Tensor:
    """[R, H, n, a, P] -> [R, G, n, a, Q]: heads that share B and C side by side in one product."""
    R, H, n, a, P = z_RHnaP.shape
    return z_RHnaP.view(R, G, H // G, n, a, P).permute(0, 1, 3, 4, 2, 5).reshape(R, G, n, a, H // G * P)


def _to_heads(z_RGnaQ: Tensor, H: int) -> Tensor:
    """Inverse of `_to_groups`."""
    R, G, n, a, Q = z_RGnaQ.shape
    g = H // G
    return z_RGnaQ.view(R, G, n, a, g, Q // g).permute(0, 1, 4, 2, 3, 5).reshape(R, H, n, a, Q // g)


def _prepare(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_RHNP: Tensor) -> _Chunks:
    R, _, H, P = x.shape
    G, N = B.shape[2:]
    c, dtype = CHUNK, initial_RHNP.dtype
    u = to_chunks(x, c, dtype).view(R, H, -1, c, P)
    n = u.shape[2]
    dt_RHnc = to_chunks(dt.unsqueeze(3), c, dtype).view(R, H, n, c)
    u.mul_(dt_RHnc.unsqueeze(4))
    B_RGncN, C_RGncN = (to_chunks(z, c, dtype).view(R, G, n, c, N) for z in (B, C))
    gamma64 = (dt_RHnc.double() * A.double().view(H, 1, 1)).cumsum(3)

    L = relative_decay(gamma64.view(-1, c), dtype).view(R, H, n, c, c)
    scores = torch.matmul(C_RGncN, B_RGncN.transpose(3, 4))
    attention = (scores.unsqueeze(2) * L.view(R, G, H // G, n, c, c)).view(R, H, n, c, c)
    decay_in = gamma64.exp().to(dtype).unsqueeze(4)
    decay_out = (gamma64[..., -1:] - gamma64).exp().to(dtype).unsqueeze(4)
    out = _to_groups(u * decay_out, G)
    writes = _to_heads(torch.matmul(B_RGncN.transpose(3, 4), out), H)
    sources = torch.cat([initial_RHNP.unsqueeze(2), writes], 2).view(R * H, n + 1, N * P)
    boundary = torch.nn.functional.pad(gamma64[..., -1].cumsum(2), (1, 0))
    Lambda = relative_decay(boundary.view(R * H, n + 1), dtype)
    states = torch.bmm(Lambda, sources)
    return _Chunks(u, B_RGncN, C_RGncN, dt_RHnc, decay_in, decay_out, L, attention, out, Lambda, sources, states)


def _entering(k: _Chunks, G: int) -> Tensor:
    """States before each chunk as [R, G, n, N, Q]."""
    R, H, n, _, P = k.u_RHncP.shape
    return _to_groups(k.states_ZnX[:, :n].reshape(R, H, n, -1, P), G)


class _SpanGrads(NamedTuple):
    u_RHncP: Tensor
    log_decay_RHnc: Tensor  # of dt A
    B_RGncN: Tensor
    C_RGncN: Tensor
    initial_RHNP: Tensor


def _backward_span(k: _Chunks, dy_RHncP: Tensor, dfinal_RHNP: Tensor) -> _SpanGrads:
    R, H, n, c, P = k.u_RHncP.shape
    G, N = k.B_RGncN.shape[1], k.B_RGncN.shape[4]

    dy_in = _to_groups(dy_RHncP * k.decay_in_RHnc1, G)
    entering = _entering(k, G)
    dC = torch.matmul(dy_in, entering.transpose(3, 4))
    dentering = _to_heads(torch.matmul(k.C_RGncN.transpose(3, 4), dy_in), H)
    dstates = torch.cat([dentering, dfinal_RHNP.unsqueeze(2)], 2).view(R * H, n + 1, N * P)
    dsources = torch.bmm(k.Lambda_Znn.transpose(1, 2), dstates).view(R, H, n + 1, N, P)
    through_Lambda = torch.bmm(dstates, k.sources_ZnX.transpose(1, 2)).mul_(k.Lambda_Znn).tril_(-1)
    dboundary = (through_Lambda.sum(2) - through_Lambda.sum(1)).view(R, H, n + 1)

    dwrites = _to_groups(dsources[:, :, 1:].contiguous(), G)
    dB = torch.matmul(k.out_RGncQ, dwrites.transpose(3, 4))
    dout = torch.matmul(k.B_RGncN, dwrites)
    # gamma_i enters through e^gamma_i (+), e^(gamma_c - gamma_i) (-) and its row (+) and column (-) of L; terms
    # where it meets itself cancel and are dropped: under fast decay they are far larger than what remains
    through_out = _to_heads(dout * k.out_RGncQ, H).sum(4)
    through_out[..., -1] = 0
    through_in = _to_heads(dy_in * torch.matmul(k.C_RGncN, entering), H).sum(4)

    dattention = torch.matmul(dy_RHncP, k.u_RHncP.transpose(3, 4))
    through_L = (dattention * k.attention_RHncc).tril_(-1)
    # summed in float64: what enters one row leaves one column, and only the small rest moves the rates
    f64 = torch.float64
    dgamma = through_L.sum(4, dtype=f64).sub_(through_L.sum(3, dtype=f64)).add_(through_in).sub_(through_out)
    after = dboundary[..., 1:].flip(2).cumsum(2).flip(2)
    dgamma[..., -1] += through_out.sum(3) + after
    dlog_decay = dgamma.flip(3).cumsum(3).flip(3)

    dscores = dattention.mul_(k.L_RHncc).view(R, G, H // G, n, c, c).sum(2)
    dC.add_(torch.matmul(dscores, k.B_RGncN))
    dB.add_(torch.matmul(dscores.transpose(3, 4), k.C_RGncN))
    du = torch.matmul(k.attention_RHncc.transpose(3, 4), dy_RHncP)
    du.addcmul_(_to_heads(dout, H), k.decay_out_RHnc1)
    return _SpanGrads(du, dlog_decay, dB, dC, dsources[:, :, 0])


def _floats(x_BTHP: Tensor, B_BTGN: Tensor) -> int:
    """Inputs of a row and a span."""
    H, P = x_BTHP.shape[2:]
    return min(SPAN, x_BTHP.shape[1]) * (H * P + 2 * B_BTGN[0, 0].numel())


class _ChunkedSSD(torch.autograd.Function):
    """Saves its inputs and one state per span; on a CPU one batch row and one span of time at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_BHNP: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, T, H, _ = x.shape
        G, spans = B.shape[2], time_spans(T, SPAN, x.device)
        y = torch.empty_like(x, dtype=initial_BHNP.dtype, memory_format=torch.contiguous_format)
        entering = initial_BHNP.new_empty(batch, len(spans), *initial_BHNP.shape[1:])
        final = torch.empty_like(initial_BHNP, memory_format=torch.contiguous_format)
        with no_autocast(x):
            for r in row_groups(batch, x.device, _floats(x, B)):
                state_RHNP = initial_BHNP[r]
                for i, t in enumerate(spans):
                    entering[r, i] = state_RHNP
                    k = _prepare(x[r, t], dt[r, t], A, B[r, t], C[r, t], state_RHNP)
                    across = _to_heads(torch.matmul(k.C_RGncN, _entering(k, G)), H)
                    y_RHncP = torch.matmul(k.attention_RHncc, k.u_RHncP).addcmul_(across, k.decay_in_RHnc1)
                    from_chunks(y_RHncP, y[r, t])
                    state_RHNP = k.states_ZnX[:, -1].view_as(state_RHNP)
                final[r] = state_RHNP
        ctx.save_for_backward(x, dt, A, B, C, entering)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, ...]:
        x, dt, A, B, C, entering = ctx.saved_tensors
        dtype = entering.dtype
        spans = list(enumerate(time_spans(x.shape[1], SPAN, x.device)))
        dx, ddt, dB, dC = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt, B, C))
        dA = torch.zeros_like(A, dtype=torch.float64)
        dinitial = torch.empty_like(entering[:, 0], memory_format=torch.contiguous_format)
        with no_autocast(x):
            for r in row_groups(x.shape[0], x.device, _floats(x, B)):
                dstate_RHNP = torch.zeros_like(dinitial[r]) if dfinal is None else dfinal[r]
                for i, t in reversed(spans):
                    k = _prepare(x[r, t], dt[r, t], A, B[r, t], C[r, t], entering[r, i])
                    if dy is None:
                        dy_RHncP = torch.zeros_like(k.u_RHncP)
                    else:
                        dy_RHncP = to_chunks(dy[r, t], CHUNK, dtype).view_as(k.u_RHncP)
                    d = _backward_span(k, dy_RHncP, dstate_RHNP)
                    x_RHncP = to_chunks(x[r, t], CHUNK, dtype).view_as(k.u_RHncP)
                    ddt_RHnc = (d.u_RHncP * x_RHncP).sum(4)
                    ddt_RHnc.add_(d.log_decay_RHnc * A.double().view(-1, 1, 1))
                    dA += (d.log_decay_RHnc * k.dt_RHnc).sum((0, 2, 3))
                    from_chunks(d.u_RHncP.mul_(k.dt_RHnc.unsqueeze(4)), dx[r, t])
                    from_chunks(ddt_RHnc, ddt[r, t].unsqueeze(3))
                    from_chunks(d.B_RGncN, dB[r, t])
                    from_chunks(d.C_RGncN, dC[r, t])
                    dstate_RHNP = d.initial_RHNP
                dinitial[r] = dstate_RHNP
        return dx, ddt, dA.to(A.dtype), dB, dC, dinitial


def chunked_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, T, H, P] in the state's dtype and final state [B, H, P, N]; arguments as in `models.ops.ssd`."""
    y, final_BHNP = _ChunkedSSD.apply(x, dt, A, B, C, initial_BHPN.transpose(2, 3))
    return y, final_BHNP.transpose(2, 3)
