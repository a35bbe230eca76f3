"""Selective scan of Mamba (Gu, Dao 2023, arXiv 2312.00752, eqs. 2-4 with zero-order hold on A, Euler on B).

    h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t      y_t = C_t . h_t + D x_t

Shapes: B batch, R rows, T time, D channels, N states a channel, C chunk length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import check_impl, check_rank, check_shape, compute_dtype, no_autocast, row_groups
from models.ops._mamba1_cpu import CpuScan

CHUNK = 16


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
            or "auto" (= chunked).

    Returns:
        y [B, T, D] in x's dtype and the final state [B, D, N] in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that disagree, an empty sequence or an unknown impl.
    """
    check_impl(impl)
    _check(x, dt, A, B, C, D, initial_state)
    dtype = compute_dtype(x, dt, A)
    state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if impl == "recurrent":
        outputs = []
        for t in range(x.shape[1]):
            y_t, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D=D)
            outputs.append(y_t)
        return torch.stack(outputs, 1), state
    scan = CpuScan if x.device.type == "cpu" and dtype == torch.float32 else _ChunkedScan
    y, final_BND = scan.apply(x, dt, A, B, C, state.transpose(1, 2))
    if D is not None:
        y = y + D.to(dtype) * x.to(dtype)
    return y.to(x.dtype), final_BND.transpose(1, 2)


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


def _scan_chunk(h_RND: Tensor, x_RCD: Tensor, dt_RCD: Tensor, A_ND: Tensor, B_RCN: Tensor) -> tuple[Tensor, Tensor]:
    """States after every token of a chunk and the decays that led to them, both [R, C, N, D].

    Channels come last: they are many and contiguous, so that one step of the recurrence is one long vector
    operation.
    """
    decay = (dt_RCD.unsqueeze(2) * A_ND).exp_()
    states = (dt_RCD * x_RCD).unsqueeze(2) * B_RCN.unsqueeze(3)
    for i in range(states.shape[1]):
        h_RND = states[:, i].addcmul_(decay[:, i], h_RND)
    return states, decay


class _ChunkedScan(torch.autograd.Function):
    """For any device and type: saves the inputs and the state that enters each chunk.

    The other states exist for one chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, T, width = x.shape
        dtype = initial_BND.dtype
        A_ND = A.to(dtype).t().contiguous()
        y = torch.empty(batch, T, width, dtype=dtype, device=x.device)
        entering = torch.empty(batch, -(-T // CHUNK), *A_ND.shape, dtype=dtype, device=x.device)
        final = torch.empty_like(initial_BND, memory_format=torch.contiguous_format)
        with no_autocast(x):
            for r in row_groups(batch, x.device, CHUNK * A.numel()):
                h = initial_BND[r].contiguous()
                for n, tokens in enumerate(_chunks(T)):
                    entering[r, n] = h
                    x_c, dt_c, B_c, C_c = (z[r, tokens].to(dtype) for z in (x, dt, B, C))
                    states, _ = _scan_chunk(h, x_c, dt_c, A_ND, B_c)
                    y[r, tokens] = torch.matmul(C_c.unsqueeze(2), states).squeeze(2)
                    h = states[:, -1]
                final[r] = h
        ctx.save_for_backward(x, dt, A, B, C, entering)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor, ...]:
        x, dt, A, B, C, entering = ctx.saved_tensors
        batch, T, _ = x.shape
        dtype = entering.dtype
        A_ND = A.to(dtype).t().contiguous()
        dx, ddt, dB, dC = (torch.empty_like(z, memory_format=torch.contiguous_format) for z in (x, dt, B, C))
        dA_RND = torch.zeros(batch, *A_ND.shape, dtype=dtype, device=x.device)
        dinitial = torch.empty_like(entering[:, 0])
        with no_autocast(x):
            for r in row_groups(batch, x.device, CHUNK * A.numel()):
                dh = torch.zeros_like(entering[r, 0]) if dfinal is None else dfinal[r].contiguous()
                for n, tokens in reversed(list(enumerate(_chunks(T)))):
                    h = entering[r, n]
                    x_c, dt_c, B_c, C_c = (z[r, tokens].to(dtype) for z in (x, dt, B, C))
                    dy_c = torch.zeros_like(x_c) if dy is None else dy[r, tokens]
                    states, decay = _scan_chunk(h, x_c, dt_c, A_ND, B_c)
                    dC[r, tokens] = torch.matmul(states, dy_c.unsqueeze(3)).squeeze(3).to(C.dtype)
                    grad = torch.empty_like(states)
                    # all work of a step at once, while its [N, D] slices are in cache: gradient of h_t, then of
                    # h_{t-1} (over the decay), of the exponent dt A (over h_t, read for the last time) and of A
                    for i in range(states.shape[1] - 1, -1, -1):
                        before = states[:, i - 1] if i else h
                        torch.addcmul(dh, C_c[:, i, :, None], dy_c[:, i, None], out=grad[:, i])
                        dh = decay[:, i].mul_(grad[:, i])
                        dexponent = torch.mul(dh, before, out=states[:, i])
                        dA_RND[r].addcmul_(dexponent, dt_c[:, i, None])
                        dexponent.mul_(A_ND)
                    dB[r, tokens] = torch.matmul(grad, (dt_c * x_c).unsqueeze(3)).squeeze(3).to(B.dtype)
                    dinput = torch.matmul(B_c.unsqueeze(2), grad).squeeze(2)
                    ddt[r, tokens] = (states.sum(2) + dinput * x_c).to(dt.dtype)
                    dx[r, tokens] = (dinput * dt_c).to(x.dtype)
                dinitial[r] = dh
        return dx, ddt, dA_RND.sum(0).t().to(A.dtype), dB, dC, dinitial


def _chunks(T: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]
