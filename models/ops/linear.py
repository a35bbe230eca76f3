"""Causal linear attention with the normaliser (Katharopoulos et al. 2020, arXiv 2006.16236, eqs. 16-20).

    S_t = S_{t-1} + k_t v_t^T      z_t = z_{t-1} + k_t      o_t = q_t^T S_t / (q_t^T z_t + eps)

with q scaled and both q and k already passed through the feature map.

Shapes: B batch, R rows, T time, H heads, K feature width, V value width, X = V + 1 (the normaliser is the state's
last column), N chunks, C chunk length, G = R*H, M = G*N, L complete segments.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import (
    check_impl,
    check_rank,
    check_shape,
    compute_dtype,
    from_chunks,
    no_autocast,
    row_groups,
    to_chunks,
)

CHUNK = 64
LONGEST_CHUNK = 128
SHORTEST_CHUNK = 16

State = tuple[Tensor, Tensor]


class Reading(TypedDict, total=False):
    """How the state is read: see `linear_attention`, whose defaults these options have."""

    scale: float
    normalize: bool
    eps: float


def elu_feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, the feature map of Katharopoulos et al. 2020, eq. 7."""
    return F.elu(x) + 1


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: State | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, State]:
    """Causal linear attention, differentiable in every tensor argument.

    Args:
        q, k: [B, T, H, K] feature-mapped queries and keys; positive when `normalize`.
        v: [B, T, H, V] values.
        initial_state: (S [B, H, K, V], z [B, H, K]); zeros when None.
        scale: factor on the queries.
        normalize: divide by q.z + eps.
        impl: "recurrent" (reference), "chunked", or "auto" (= chunked).

    Returns:
        o [B, T, H, V] in v's dtype and the final (S, z) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that disagree, an empty sequence or an unknown impl.
    """
    _check(q, k, v, initial_state, impl)
    if impl == "recurrent":
        o, final, _ = _recurrent(q, k, v, initial_state, scale=scale, normalize=normalize, eps=eps)
        return o, final
    S, z = _start(q, k, v, initial_state)
    o, S, z, _, _ = _ChunkedLinearAttention.apply(q, k, v, S, z, scale, normalize, eps, CHUNK, None, True)
    return o, (S, z)


def linear_attention_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment: int,
    cumulative: bool = True,
    initial_state: State | None = None,
    impl: str = "auto",
    **reading: Unpack[Reading],
) -> tuple[Tensor, State, State]:
    """`linear_attention` that also returns the states that memory caching keeps.

    Args:
        segment: tokens per segment; at most 128, or with a divisor between 16 and 128.
        cumulative: return the state after each segment; False: what each segment alone added to it.
        reading: scale, normalize and eps, as in `linear_attention`.

    Returns:
        o, the final (S, z) and the cached (S [B, L, H, K, V], z [B, L, H, K]) of the L = T // segment complete
        segments.

    Raises:
        ValueError: as `linear_attention`, or a segment length that cannot be cut into chunks.
    """
    _check(q, k, v, initial_state, impl)
    chunk = _segment_chunk(segment)
    if impl == "recurrent":
        return _recurrent(q, k, v, initial_state, segment, cumulative, **reading)
    S, z = _start(q, k, v, initial_state)
    options = *_with_defaults(**reading), chunk, segment, cumulative
    o, S, z, S_cached, z_cached = _ChunkedLinearAttention.apply(q, k, v, S, z, *options)
    return o, (S, z), (S_cached, z_cached)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V], state (S [B, H, K, V], z [B, H, K]) -> (o [B, H, V], new state)."""
    S, z = state
    dtype = compute_dtype(q, k, v, S)
    with no_autocast(v):
        S = S + k.to(dtype).unsqueeze(3) * v.to(dtype).unsqueeze(2)
        z = z + k.to(dtype)
        q_BH1K = (scale * q.to(dtype)).unsqueeze(2)
        o = (q_BH1K @ S).squeeze(2)
        if normalize:
            o = o / ((q_BH1K.squeeze(2) * z).sum(-1, keepdim=True) + eps)
    return o.to(v.dtype), (S, z)


def _with_defaults(*, scale: float = 1.0, normalize: bool = True, eps: float = 1e-6) -> tuple[float, bool, float]:
    return scale, normalize, eps


def _segment_chunk(segment: int) -> int:
    """The divisor of the segment nearest below `CHUNK`, or else nearest above it."""
    if segment < 1:
        raise ValueError(f"segment={segment} tokens; choose segment >= 1")
    if segment <= CHUNK:
        return segment
    for chunk in (*range(CHUNK, SHORTEST_CHUNK - 1, -1), *range(CHUNK + 1, LONGEST_CHUNK + 1)):
        if segment % chunk == 0:
            return chunk
    raise ValueError(
        f"segment={segment} has no divisor in {SHORTEST_CHUNK}..{LONGEST_CHUNK} to cut it into chunks; "
        f"choose a multiple of {SHORTEST_CHUNK}"
    )


def _check(q: Tensor, k: Tensor, v: Tensor, initial_state: State | None, impl: str) -> None:
    check_impl(impl)
    check_rank("k", k, "[B, T, H, K]")
    check_rank("v", v, "[B, T, H, V]")
    B, T, H, K = k.shape
    check_shape("q", q, (B, T, H, K), "[B, T, H, K] of k")
    check_shape("v", v, (B, T, H, v.shape[3]), "[B, T, H, V]")
    if T == 0:
        raise ValueError("sequence of 0 tokens; pass at least one token")
    if initial_state is not None:
        check_shape("initial_state[0]", initial_state[0], (B, H, K, v.shape[3]), "[B, H, K, V]")
        check_shape("initial_state[1]", initial_state[1], (B, H, K), "[B, H, K]")


def _start(q: Tensor, k: Tensor, v: Tensor, initial_state: State | None) -> State:
    dtype = compute_dtype(q, k, v)
    if initial_state is not None:
        return initial_state[0].to(dtype), initial_state[1].to(dtype)
    B, _, H, K = k.shape
    return v.new_zeros(B, H, K, v.shape[3], dtype=dtype), v.new_zeros(B, H, K, dtype=dtype)


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None,
    segment: int | None = None,
    cumulative: bool = True,
    **reading: Unpack[Reading],
) -> tuple[Tensor, State, State]:
    """The defining recurrence, token by token."""
    state = last_boundary = _start(q, k, v, initial_state)
    outputs: list[Tensor] = []
    S_cached, z_cached = [state[0][:, None][:, :0]], [state[1][:, None][:, :0]]
    for t in range(k.shape[1]):
        o_t, state = linear_attention_step(q[:, t], k[:, t], v[:, t], state, **reading)
        outputs.append(o_t)
        if segment is not None and (t + 1) % segment == 0:
            S, z = state if cumulative else (state[0] - last_boundary[0], state[1] - last_boundary[1])
            S_cached.append(S.unsqueeze(1))
            z_cached.append(z.unsqueeze(1))
            last_boundary = state
    return torch.stack(outputs, 1), state, (torch.cat(S_cached, 1), torch.cat(z_cached, 1))


def _with_ones(v_RTHV: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Values in chunks with a column of ones, which turns the normaliser into one more output column."""
    v_MCX = to_chunks(v_RTHV, chunk, dtype, extra=1)
    v_MCX[..., -1] = 1
    return v_MCX


def _entering_states(kv_GNKX: Tensor, initial_GKX: Tensor) -> Tensor:
    """States [G, N + 1, K, X] before each chunk and after the last."""
    G, N, K, X = kv_GNKX.shape
    states = torch.empty(G, N + 1, K, X, dtype=kv_GNKX.dtype, device=kv_GNKX.device)
    states[:, 0] = initial_GKX
    for n in range(N):
        torch.add(states[:, n], kv_GNKX[:, n], out=states[:, n + 1])
    return states


class _ChunkedLinearAttention(torch.autograd.Function):
    """Saves its inputs only: states and outputs of the chunks are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, S0: Tensor, z0: Tensor, scale: float, normalize: bool, eps: float,
        chunk: int, segment: int | None, cumulative: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        B, T, H, V = v.shape
        K, dtype = k.shape[3], S0.dtype
        L, per_segment = (T // segment, segment // chunk) if segment else (0, 0)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        final = torch.empty(B, H, K, V + 1, dtype=dtype, device=v.device)
        S_cached = torch.empty(B, L, H, K, V, dtype=dtype, device=v.device)
        z_cached = torch.empty(B, L, H, K, dtype=dtype, device=v.device)
        initial = torch.cat([S0, z0.unsqueeze(3)], 3)
        with no_autocast(v):
            for r in row_groups(B, v.device, T * H * (2 * K + V)):
                q_MCK = to_chunks(q[r], chunk, dtype).mul_(scale)
                k_MCK, v_MCX = to_chunks(k[r], chunk, dtype), _with_ones(v[r], chunk, dtype)
                start = initial[r].flatten(0, 1)
                kv = torch.bmm(k_MCK.transpose(1, 2), v_MCX).unflatten(0, (start.shape[0], -1))
                states = _entering_states(kv, start)
                scores = torch.bmm(q_MCK, k_MCK.transpose(1, 2)).tril_()
                y = torch.bmm(q_MCK, states[:, :-1].flatten(0, 1)).baddbmm_(scores, v_MCX)
                if normalize:
                    y[..., :V].div_(y[..., V:].add_(eps))
                from_chunks(y[..., :V], o[r])
                final[r] = states[:, -1].view_as(final[r])
                if L:
                    if cumulative:
                        cached = states[:, per_segment::per_segment][:, :L]
                    else:
                        cached = kv[:, : L * per_segment].unflatten(1, (L, per_segment)).sum(2)
                    cached = cached.unflatten(0, (-1, H)).transpose(1, 2)
                    S_cached[r], z_cached[r] = cached[..., :V], cached[..., V]
        ctx.save_for_backward(q, k, v, initial)
        ctx.options = (scale, normalize, eps, chunk, per_segment, cumulative)
        ctx.set_materialize_grads(False)
        return o, final[..., :V].contiguous(), final[..., V].contiguous(), S_cached, z_cached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, *dstates: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, initial = ctx.saved_tensors
        scale, normalize, eps, chunk, per_segment, cumulative = ctx.options
        dS_final, dz_final, dS_cached, dz_cached = dstates
        B, H, K, X = initial.shape
        T = v.shape[1]
        V, dtype = X - 1, initial.dtype
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dinitial = torch.empty_like(initial)
        with no_autocast(v):
            for r in row_groups(B, v.device, T * H * (2 * K + V)):
                q_MCK = to_chunks(q[r], chunk, dtype).mul_(scale)
                k_MCK, v_MCX = to_chunks(k[r], chunk, dtype), _with_ones(v[r], chunk, dtype)
                start = initial[r].flatten(0, 1)
                G = start.shape[0]
                kv = torch.bmm(k_MCK.transpose(1, 2), v_MCX).unflatten(0, (G, -1))
                states_MKX = _entering_states(kv, start)[:, :-1].flatten(0, 1)
                scores = torch.bmm(q_MCK, k_MCK.transpose(1, 2)).tril_()
                dy = torch.zeros_like(v_MCX) if do is None else to_chunks(do[r], chunk, dtype, extra=1)
                dy[..., V] = 0
                if normalize and do is not None:
                    y = torch.bmm(q_MCK, states_MKX).baddbmm_(scores, v_MCX)
                    denominator = y[..., V:].add_(eps)
                    dy[..., :V].div_(denominator)
                    y[..., :V].div_(denominator).mul_(dy[..., :V])
                    dy[..., V] = -y[..., :V].sum(2)

                # gradient of the state that enters chunk n, plus (index N) of the final state
                N = kv.shape[1]
                dstate = torch.zeros(G, N + 1, K, X, dtype=dtype, device=v.device)
                dstate[:, :N] = torch.bmm(q_MCK.transpose(1, 2), dy).view(G, N, K, X)
                if dS_final is not None:
                    dstate[:, N, :, :V] += dS_final[r].flatten(0, 1)
                if dz_final is not None:
                    dstate[:, N, :, V] += dz_final[r].flatten(0, 1)
                dcached = _cached_gradient(dS_cached, dz_cached, r, G, per_segment, (K, X), dtype)
                if dcached is not None and cumulative:
                    dstate[:, per_segment::per_segment][:, : dcached.shape[1]] += dcached
                for n in range(N - 1, -1, -1):
                    dstate[:, n] += dstate[:, n + 1]
                dinitial[r] = dstate[:, 0].view_as(dinitial[r])
                dkv = dstate[:, 1:]
                if dcached is not None and not cumulative:
                    L = dcached.shape[1]
                    dkv[:, : L * per_segment].unflatten(1, (L, per_segment)).add_(dcached.unsqueeze(2))
                dkv_MKX = dkv.flatten(0, 1)

                dscores = torch.bmm(dy, v_MCX.transpose(1, 2)).tril_()
                dq_MCK = torch.bmm(dscores, k_MCK).baddbmm_(dy, states_MKX.transpose(1, 2)).mul_(scale)
                dk_MCK = torch.bmm(dscores.transpose(1, 2), q_MCK).baddbmm_(v_MCX, dkv_MKX.transpose(1, 2))
                dv_MCX = torch.bmm(scores.transpose(1, 2), dy).baddbmm_(k_MCK, dkv_MKX)
                from_chunks(dq_MCK, dq[r])
                from_chunks(dk_MCK, dk[r])
                from_chunks(dv_MCX[..., :V], dv[r])
        return dq, dk, dv, dinitial[..., :V], dinitial[..., V], None, None, None, None, None, None


def _cached_gradient(
    dS: Tensor | None,
    dz: Tensor | None,
    rows: slice,
    G: int,
    per_segment: int,
    width: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """Gradients of the cached (S, z) as one [G, L, K, X], or None where nothing was cached or used."""
    given = dS if dS is not None else dz
    if given is None or not per_segment:
        return None
    L = given.shape[1]
    joined = torch.zeros(G, L, *width, dtype=dtype, device=given.device)
    if dS is not None:
        joined[..., :-1] = dS[rows].transpose(1, 2).flatten(0, 1)
    if dz is not None:
        joined[..., -1] = dz[rows].transpose(1, 2).flatten(0, 1)
    return joined
