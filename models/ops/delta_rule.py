"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464), token mixing only.

    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale * q_t^T S_t

Shapes: B batch, T time, h query/key heads, H value heads (H a multiple of h), K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.ops._delta_rule_chunked import chunked_gated_delta
from models.ops._layout import check_impl, check_rank, check_shape, compute_dtype, no_autocast

GATED_DELTA_IMPLS = ("auto", "recurrent", "chunked", "fused")


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over a sequence, differentiable in every tensor argument.

    Args:
        q, k: [B, T, h, K] queries and keys, normalised by the caller if they should be.
        v: [B, T, H, V] values; value head i reads query/key head i // (H // h).
        g: [B, T, H] log decay, finite and <= 0.
        beta: [B, T, H] writing strength, usually in [0, 1], or [0, 2] where negative eigenvalues are allowed.
        initial_state: [B, H, K, V] state before the first token; zeros when None.
        scale: factor on the queries; K ** -0.5 when None.
        impl: "recurrent" (token by token, the reference), "chunked" (pure PyTorch), "fused"
            (flash-linear-attention, CUDA only, taken as it is) or "auto": on CUDA fused if its preflight
            passes at this shape, otherwise chunked.

    Returns:
        o [B, T, H, V] in v's dtype and the final state [B, H, K, V] in float32 (float64 for float64 inputs).
        "recurrent" and "chunked" compute in that precision whatever the dtype of the inputs.

    Raises:
        ValueError: shapes that disagree, an empty sequence, an unknown impl, or "fused" off CUDA.
    """
    check_impl(impl, GATED_DELTA_IMPLS)
    _check(q, k, v, g, beta, initial_state)
    if scale is None:
        scale = k.shape[-1] ** -0.5
    if impl == "auto":
        impl = _auto(k, v)
    if impl == "recurrent":
        return recurrent_gated_delta(q, k, v, g, beta, initial_state, scale)
    if impl == "chunked":
        return chunked_gated_delta(q, k, v, g, beta, initial_state, scale)
    if v.device.type != "cuda":
        raise ValueError(f"impl='fused' needs CUDA tensors, got device={v.device}; choose impl='chunked'")
    return fused_gated_delta(q, k, v, g, beta, initial_state, scale)


def _auto(k: Tensor, v: Tensor) -> str:
    if v.device.type != "cuda" or v.dtype == torch.float64:
        return "chunked"
    from models.ops.preflight import fused_is_trusted

    return "fused" if fused_is_trusted(k.shape, v.shape, v.dtype, v.device) else "chunked"


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    check_rank("k", k, "[B, T, h, K]")
    check_rank("v", v, "[B, T, H, V]")
    B, T, h, K = k.shape
    H, V = v.shape[2:]
    check_shape("q", q, (B, T, h, K), "[B, T, h, K] of k")
    check_shape("v", v, (B, T, H, V), "[B, T, H, V]")
    check_shape("g", g, (B, T, H), "[B, T, H]")
    check_shape("beta", beta, (B, T, H), "[B, T, H]")
    if T == 0:
        raise ValueError("sequence of 0 tokens; pass at least one token")
    if H % h:
        raise ValueError(f"{H} value heads are not a multiple of {h} query/key heads; choose H a multiple of h")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (B, H, K, V), "[B, H, K, V]")


def recurrent_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The defining recurrence, one token at a time; exact in float64, slow."""
    dtype = compute_dtype(q, k, v)
    B, T, _, K = k.shape
    H, V = v.shape[2:]
    state = v.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        o_t, state = gated_delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale=scale)
        outputs.append(o_t)
    return torch.stack(outputs, 1), state


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token: q, k [B, h, K], v [B, H, V], g, beta [B, H], state [B, H, K, V] -> (o [B, H, V], new state)."""
    dtype = compute_dtype(q, k, v, state)
    H, K = v.shape[1], k.shape[2]
    if scale is None:
        scale = K**-0.5
    with no_autocast(v):
        if k.shape[1] < H:
            group = H // k.shape[1]
            q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
        k_BH1K = k.to(dtype).unsqueeze(2)
        decayed = state * g.to(dtype).exp()[..., None, None]
        error_BH1V = v.to(dtype).unsqueeze(2) - k_BH1K @ decayed
        state = decayed + k_BH1K.transpose(2, 3) * (beta.to(dtype)[..., None, None] * error_BH1V)
        o = (scale * q.to(dtype)).unsqueeze(2) @ state
    return o.squeeze(2).to(v.dtype), state


def fused_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernels, with the arguments of `gated_delta`, unchecked and untested.

    Queries and keys go in as v's dtype, the only one the preflight tests: mixers hand over normalised float32 beside
    bfloat16 values, and a Triton product of two types does not compile. Log decay and writing strength go in as
    float32: in bfloat16 the decay alone would be wrong by 0.4%.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if initial_state is not None:
        initial_state = initial_state.float()
    return chunk_gated_delta_rule(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=g.float(),
        beta=beta.float(),
        scale=scale,
        initial_state=initial_state,
        output_final_state=True,
    )
