"""Memory caching with gated residual memory (arXiv 2602.24281): reads from the states of earlier segments.

    h_t = sum_{i < t // segment} gamma_{t,i} q_t^T S_i  [ / (q_t^T z_i + eps) with normalisers ]

S_i is the state of linear attention after segment i, gamma a softmax over the similarities of the token's query to
the mean input of each segment.

Shapes: B batch, R rows, T time, H heads, K feature width, V value width, D model width, L cached segments,
G = R*H, n tokens of one segment, s caches they see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import check_impl, check_rank, check_shape, compute_dtype, no_autocast, row_groups


def memory_cache_retrieval(
    q: Tensor,
    states: Tensor,
    gates: Tensor,
    *,
    segment: int,
    normalizers: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Gated reads from cached states; token t sees the caches i < t // segment, whatever its gates hold beyond.

    Args:
        q: [B, T, H, K] feature-mapped queries, starting at a segment boundary.
        states: [B, L, H, K, V] cached states, L >= (T - 1) // segment.
        gates: [B, T, L] shared by the heads, or [B, T, L, H].
        segment: tokens per segment.
        normalizers: [B, L, H, K] cached sums of keys; divides each read by q.z_i + eps.
        impl: "recurrent" (token by token, the reference), "chunked", or "auto" (= chunked).

    Returns:
        [B, T, H, V] in q's dtype, computed in float32 (float64 for float64 inputs); zeros in the first segment.

    Raises:
        ValueError: shapes that disagree, too few caches, or an unknown impl.
    """
    check_impl(impl)
    _check(q, states, gates, segment, normalizers)
    dtype = compute_dtype(q, states, gates)
    with no_autocast(q):
        weights = gates.to(dtype)
        if weights.dim() == 3:
            weights = weights.unsqueeze(3)
        if impl == "recurrent":
            return _recurrent(q.to(dtype), states.to(dtype), weights, segment, normalizers, eps).to(q.dtype)
        if normalizers is not None:
            q_BHTK, z_BHKL = q.to(dtype).transpose(1, 2), normalizers.to(dtype).permute(0, 2, 3, 1)
            weights = weights / (torch.matmul(q_BHTK, z_BHKL).permute(0, 2, 3, 1) + eps)
        return _ChunkedRetrieval.apply(q, states.to(dtype), weights, segment)


def memory_cache_retrieval_step(
    q: Tensor, states: Tensor, gates: Tensor, *, normalizers: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """One token that sees all its caches.

    q [B, H, K], states [B, L, H, K, V], gates [B, L] or [B, L, H], normalizers [B, L, H, K] -> [B, H, V].
    """
    dtype = compute_dtype(q, states, gates)
    with no_autocast(q):
        weights = gates.to(dtype)
        weights = weights.unsqueeze(2) if weights.dim() == 2 else weights
        if normalizers is not None:
            weights = weights / ((q.to(dtype).unsqueeze(1) * normalizers.to(dtype)).sum(-1) + eps)
        reads_BLHV = (q.to(dtype)[:, None, :, None] @ states.to(dtype)).squeeze(3)
        return (weights.unsqueeze(3) * reads_BLHV).sum(1).to(q.dtype)


def segment_gate_logits(u: Tensor, x: Tensor, *, segment: int) -> Tensor:
    """Similarity of each token to the segments it may read, from which a softmax makes the gates.

    Args:
        u: [B, T, D] gate queries W_u x_t.
        x: [B, T, D] inputs whose segment means stand for the segments.
        segment: tokens per segment.

    Returns:
        [B, T, L + 1] with L = T // segment: <u_t, mean of segment i> in column i, -inf unless segment i ended
        before token t, and in the last column <u_t, mean of the current segment up to and including t>.

    Raises:
        ValueError: shapes that disagree or a segment below 1.
    """
    check_rank("x", x, "[B, T, D]")
    B, T, D = x.shape
    check_shape("u", u, (B, T, D), "[B, T, D] of x")
    if segment < 1:
        raise ValueError(f"segment={segment} tokens; choose segment >= 1")
    L = T // segment
    dtype = compute_dtype(u, x)
    with no_autocast(x):
        u, x = u.to(dtype), x.to(dtype)
        means_BLD = x[:, : L * segment].unflatten(1, (L, segment)).mean(2) if L else x[:, :0]
        position = torch.arange(T, device=x.device)
        unseen_TL = torch.arange(L, device=x.device) >= (position // segment).unsqueeze(1)
        cached = torch.matmul(u, means_BLD.transpose(1, 2)).masked_fill(unseen_TL, -torch.inf)
        return torch.cat([cached, _RunningMeanDot.apply(u, x, segment).unsqueeze(2)], -1)


class _RunningMeanDot(torch.autograd.Function):
    """[B, T] of <u_t, mean of x over its segment up to and including t>.

    Running means are products with a triangular matrix, a row of the batch at a time: less than half the time of
    cumulative sums, whose backward reverses its operand twice.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, segment: int) -> Tensor:
        ctx.save_for_backward(u, x)
        ctx.segment = segment
        y = u.new_empty(u.shape[:2])
        for b, t, mean_SS in _pieces(x, segment):
            torch.sum(u[b, t] * torch.matmul(mean_SS, x[b, t]), -1, out=y[b, t])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        u, x = ctx.saved_tensors
        du, dx = torch.empty_like(u), torch.empty_like(x)
        with no_autocast(x):
            for b, t, mean_SS in _pieces(x, ctx.segment):
                d_S1 = dy[b, t].unsqueeze(1)
                torch.mul(torch.matmul(mean_SS, x[b, t]), d_S1, out=du[b, t])
                torch.matmul(mean_SS.t(), u[b, t] * d_S1, out=dx[b, t])
        return du, dx, None


def _pieces(x_BTD: Tensor, segment: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Row, tokens and the matrix of running means of every segment, the last of which may be short."""
    B, T, _ = x_BTD.shape
    size = min(segment, T)
    mean_SS = x_BTD.new_ones(size, size).tril_().div_(torch.arange(1, size + 1, device=x_BTD.device).unsqueeze(1))
    for b in range(B):
        for start in range(0, T, segment):
            S = min(segment, T - start)
            yield b, slice(start, start + S), mean_SS[:S, :S]


def _check(q: Tensor, states: Tensor, gates: Tensor, segment: int, normalizers: Tensor | None) -> None:
    check_rank("q", q, "[B, T, H, K]")
    check_rank("states", states, "[B, L, H, K, V]")
    B, T, H, K = q.shape
    L, V = states.shape[1], states.shape[4]
    check_shape("states", states, (B, L, H, K, V), "[B, L, H, K, V]")
    if gates.dim() == 4:
        check_shape("gates", gates, (B, T, L, H), "[B, T, L, H]")
    else:
        check_shape("gates", gates, (B, T, L), "[B, T, L] or [B, T, L, H]")
    if normalizers is not None:
        check_shape("normalizers", normalizers, (B, L, H, K), "[B, L, H, K]")
    if segment < 1:
        raise ValueError(f"segment={segment} tokens; choose segment >= 1")
    if (T - 1) // segment > L:
        raise ValueError(
            f"{L} cached states for {T} tokens in segments of {segment}; pass at least {(T - 1) // segment}"
        )


def _recurrent(
    q: Tensor, states: Tensor, weights: Tensor, segment: int, normalizers: Tensor | None, eps: float
) -> Tensor:
    B, T, H, _ = q.shape
    outputs = []
    for t in range(T):
        s = t // segment
        gates = weights[:, t, :s].expand(B, s, H)
        z = None if normalizers is None else normalizers[:, :s]
        outputs.append(memory_cache_retrieval_step(q[:, t], states[:, :s], gates, normalizers=z, eps=eps))
    return torch.stack(outputs, 1)


def _segments(T: int, segment: int) -> Iterator[tuple[int, slice]]:
    """(caches seen, tokens) of each segment after the first."""
    for start in range(segment, T, segment):
        yield start // segment, slice(start, min(start + segment, T))


class _ChunkedRetrieval(torch.autograd.Function):
    """One product a segment, [gamma_0 q | gamma_1 q | ...] [S_0; S_1; ...]: never a [B, T, L, H, V] tensor."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, states: Tensor, weights: Tensor, segment: int) -> Tensor:
        B, T, H, _ = q.shape
        V = states.shape[4]
        out = torch.zeros(B, T, H, V, dtype=q.dtype, device=q.device)
        with no_autocast(q):
            for r in row_groups(B, q.device, states[0].numel() + q[0].numel() * states.shape[1]):
                S_GLKV = states[r].transpose(1, 2).flatten(0, 1)
                q_GTK = q[r].transpose(1, 2).to(states.dtype).flatten(0, 1)
                w_GTL = _per_head(weights[r], H)
                for s, tokens in _segments(T, segment):
                    gated = (w_GTL[:, tokens, :s, None] * q_GTK[:, tokens, None]).flatten(2)
                    h = torch.bmm(gated, S_GLKV[:, :s].flatten(1, 2))
                    out[r, tokens] = h.unflatten(0, (-1, H)).transpose(1, 2)
        ctx.save_for_backward(q, states, weights)
        ctx.segment = segment
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, states, weights = ctx.saved_tensors
        B, T, H, K = q.shape
        dq, dstates, dweights = (torch.zeros_like(x) for x in (q, states, weights))
        with no_autocast(q):
            for r in row_groups(B, q.device, states[0].numel() + q[0].numel() * states.shape[1]):
                S_GLKV = states[r].transpose(1, 2).flatten(0, 1)
                q_GTK = q[r].transpose(1, 2).to(states.dtype).flatten(0, 1)
                d_GTV = dout[r].transpose(1, 2).to(states.dtype).flatten(0, 1)
                w_GTL = _per_head(weights[r], H)
                dS_GLKV = torch.zeros_like(S_GLKV)
                for s, tokens in _segments(T, ctx.segment):
                    q_n1K, w_nsK = q_GTK[:, tokens, None], w_GTL[:, tokens, :s, None]
                    d = d_GTV[:, tokens]
                    gated = (w_nsK * q_n1K).flatten(2)
                    dS_GLKV[:, :s] += torch.bmm(gated.transpose(1, 2), d).unflatten(1, (s, K))
                    dgated = torch.bmm(d, S_GLKV[:, :s].flatten(1, 2).transpose(1, 2)).unflatten(2, (s, K))
                    dw = (dgated * q_n1K).sum(3)
                    dw_RnsH = dw.unflatten(0, (-1, H)).permute(0, 2, 3, 1)
                    shared = weights.shape[3] == 1
                    dweights[r, tokens, :s] = dw_RnsH.sum(3, keepdim=True) if shared else dw_RnsH
                    dq_GnK = dgated.mul_(w_nsK).sum(2)
                    dq[r, tokens] = dq_GnK.unflatten(0, (-1, H)).transpose(1, 2).to(q.dtype)
                dstates[r] = dS_GLKV.unflatten(0, (-1, H)).transpose(1, 2)
        return dq, dstates, dweights, None


def _per_head(weights_RTLx: Tensor, H: int) -> Tensor:
    """[R, T, L, 1 or H] -> [R*H, T, L]."""
    R, T, L, _ = weights_RTLx.shape
    return weights_RTLx.expand(R, T, L, H).permute(0, 3, 1, 2).reshape(R * H, T, L)
