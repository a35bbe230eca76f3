"""Selective scan of Mamba (Gu, Dao 2023, arXiv 2312.00752, eqs. 2-4 with zero-order hold on A, Euler on B).

    h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t      y_t = C_t . h_t + D x_t

Shapes: B batch, R rows, T time, D channels, N states a channel, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.ops._layout import check_impl, check_rank, check_shape, compute_dtype, no_autocast
from models.ops._mamba1_chunked import ChunkedScan
from models.ops._mamba1_cpu import CpuScan
from models.ops._mamba1_fused import fused_scan, serves

SELECTIVE_SCAN_IMPLS = ("auto", "recurrent", "chunked", "fused")


def selective_scan(
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
    """Mamba-1 state space over a sequence, differentiable in every tensor argument.

    Args:
        x: [B, T, D] inputs.
        dt: [B, T, D] positive time steps, after their softplus.
        A: [D, N] negative rates.
        B, C: [B, T, N] writing and reading vectors.
        D: [D] skip weights.
        initial_state: [B, D, N]; zeros when None.
        impl: "recurrent" (reference), "chunked" (memory of one state per chunk; compiled kernels for float32 on a CPU),
            "fused" (mamba-ssm's CUDA kernels, in float32; no initial state and no gradient of the final one) or "auto":
            on CUDA fused if it can be and its preflight passes at this shape, otherwise chunked.

    Returns:
        y [B, T, D] in x's dtype and the final state [B, D, N] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that disagree, an empty sequence, an unknown impl, "fused" off CUDA or with an initial state.
    """
    check_impl(impl, SELECTIVE_SCAN_IMPLS)
    _check(x, dt, A, B, C, D, initial_state)
    dtype = compute_dtype(x, dt, A)
    state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if impl == "recurrent":
        outputs = []
        for t in range(x.shape[1]):
            y_t, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D)
            outputs.append(y_t)
        return torch.stack(outputs, 1), state
    if impl == "auto":
        impl = _auto(x, dt, A, initial_state)
    if impl == "fused":
        _check_fused(x, initial_state)
        y, final = fused_scan(x, dt, A, B, C)
    else:
        scan = CpuScan if x.device.type == "cpu" and dtype == torch.float32 else ChunkedScan
        y, final_BND = scan.apply(x, dt, A, B, C, state.transpose(1, 2))
        final = final_BND.transpose(1, 2)
    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    return y.to(x.dtype), final


def _auto(x: Tensor, dt: Tensor, A: Tensor, initial_state: Tensor | None) -> str:
    """fused where it gives what is asked for; its gradients of B, C and A are sums in no fixed order."""
    exact = torch.are_deterministic_algorithms_enabled() or compute_dtype(x, dt, A) == torch.float64
    if x.device.type != "cuda" or exact or initial_state is not None or not serves(A.shape[1]):
        return "chunked"
    from models.ops.preflight import scan_is_trusted

    return "fused" if scan_is_trusted(x.shape, A.shape[1], x.device) else "chunked"


def _check_fused(x: Tensor, initial_state: Tensor | None) -> None:
    if x.device.type != "cuda":
        raise ValueError(f"impl='fused' needs CUDA tensors, got device={x.device}; choose impl='chunked'")
    if initial_state is not None:
        raise ValueError("impl='fused' begins with a state of zeros; choose impl='chunked' for an initial_state")


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: x, dt [B, D], A [D, N], B, C [B, N], state [B, D, N] -> (y [B, D], new state)."""
    dtype = compute_dtype(x, dt, A, state)
    u, dt = x.to(dtype), dt.to(dtype)
    with no_autocast(x):
        decay_BDN = torch.exp(dt.unsqueeze(2) * A.to(dtype))
        state = decay_BDN * state + (dt * u).unsqueeze(2) * B.to(dtype).unsqueeze(1)
        y = (state @ C.to(dtype).unsqueeze(2)).squeeze(2)
        if D is not None:
            y = y + D.to(dtype) * u
    return y.to(x.dtype), state


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    check_rank("x", x, "[B, T, D]")
    check_rank("A", A, "[D, N]")
    batch, T, width = x.shape
    N = A.shape[1]
    check_shape("dt", dt, (batch, T, width), "[B, T, D] of x")
    check_shape("A", A, (width, N), "[D, N]")
    check_shape("B", B, (batch, T, N), "[B, T, N]")
    check_shape("C", C, (batch, T, N), "[B, T, N]")
    if T == 0:
        raise ValueError("sequence of 0 tokens; pass at least one token")
    if D is not None:
        check_shape("D", D, (width,), "[D]")
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, width, N), "[B, D, N]")
