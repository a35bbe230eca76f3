"""State-space duality, the Mamba-2 mixer (Dao, Gu 2024, arXiv 2405.21060).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T      y_t = S_t C_t + D x_t

Shapes: B batch, T time, H heads, P head width, G groups of heads that share B and C, N state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.ops._layout import check_impl, check_rank, check_shape, compute_dtype, no_autocast
from models.ops._mamba2_chunked import chunked_ssd


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mamba-2 state space over a sequence, differentiable in every tensor argument.

    Args:
        x: [B, T, H, P] inputs.
        dt: [B, T, H] positive time steps, after their softplus.
        A: [H] negative rates.
        B, C: [B, T, G, N] writing and reading vectors; head i uses group i // (H // G).
        D: [H] skip weights.
        initial_state: [B, H, P, N]; zeros when None.
        impl: "recurrent" (reference), "chunked", or "auto" (= chunked).

    Returns:
        y [B, T, H, P] in x's dtype and the final state [B, H, P, N] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that disagree, an empty sequence or an unknown impl.
    """
    check_impl(impl)
    _check(x, dt, A, B, C, D, initial_state)
    dtype = compute_dtype(x, dt, A)
    batch, T, H, P = x.shape
    start = torch.zeros(batch, H, P, B.shape[3]) if initial_state is None else initial_state
    state = start.to(x.device, dtype)
    if impl == "recurrent":
        outputs = []
        for t in range(T):
            y_t, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D)
            outputs.append(y_t)
        return torch.stack(outputs, 1), state
    y, final = chunked_ssd(x, dt, A, B, C, state)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(1) * x.to(dtype)
    return y.to(x.dtype), final


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: x [B, H, P], dt [B, H], A [H], B, C [B, G, N], state [B, H, P, N] -> (y [B, H, P], new state)."""
    dtype = compute_dtype(x, dt, A, state)
    group = x.shape[1] // B.shape[1]
    u, dt = x.to(dtype), dt.to(dtype)
    with no_autocast(x):
        B_BHN = B.to(dtype).repeat_interleave(group, 1)
        C_BHN = C.to(dtype).repeat_interleave(group, 1)
        decay = torch.exp(dt * A.to(dtype))[..., None, None]
        state = decay * state + (dt.unsqueeze(2) * u).unsqueeze(3) * B_BHN.unsqueeze(2)
        y = (state @ C_BHN.unsqueeze(3)).squeeze(3)
        if D is not None:
            y = y + D.to(dtype).unsqueeze(1) * u
    return y.to(x.dtype), state


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    check_rank("x", x, "[B, T, H, P]")
    check_rank("B", B, "[B, T, G, N]")
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    check_shape("dt", dt, (batch, T, H), "[B, T, H]")
    check_shape("A", A, (H,), "[H]")
    check_shape("B", B, (batch, T, G, N), "[B, T, G, N]")
    check_shape("C", C, (batch, T, G, N), "[B, T, G, N]")
    if T == 0:
        raise ValueError("sequence of 0 tokens; pass at least one token")
    if H % G:
        raise ValueError(f"{H} heads are not a multiple of {G} groups; choose H a multiple of G")
    if D is not None:
        check_shape("D", D, (H,), "[H]")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, H, P, N), "[B, H, P, N]")
