"""The selective scan in torch operations, a chunk of time after another, for any device and type.

Within a chunk the recurrence h_t = a_t h_{t-1} + b_t is solved by pairing neighbours (Blelloch 1990, "Prefix sums and
their applications"): two steps make one, h_{t+1} = (a_{t+1} a_t) h_{t-1} + (a_{t+1} b_t + b_{t+1}), which leaves half
as many. So C tokens take 3 log2 C operations, instead of C that are each too small for a GPU. Decays are multiplied,
never divided: nothing grows that the recurrence itself would not let grow.

Shapes: B batch, R rows, T time, D channels, N states a channel, C chunk length, L chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.ops._layout import no_autocast, row_groups

CHUNK = 16  # tokens: the least
CHUNK_BYTES = 2**28  # of the states of a chunk on a GPU; the backward pass holds about five tensors of this size


def chunk_length(batch: int, cells: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per chunk, a power of two.

    A CPU gets few, whose states stay in cache, a GPU as many as CHUNK_BYTES hold for all rows, so that few operations
    of many numbers are left. cells: D · N of a row's state.
    """
    if device.type == "cpu":
        return CHUNK
    tokens = CHUNK_BYTES // (max(batch, 1) * cells * dtype.itemsize)
    return max(CHUNK, 1 << max(tokens.bit_length() - 1, 0))


def solve_(decay_RCND: Tensor, h_RCND: Tensor, *, backwards: bool = False) -> None:
    """h_t += decay_t h_{t-1} for t = 1, 2, … in this order, in place; backwards: h_t += decay_t h_{t+1} from the end.

    The decay of the token that begins is not used.
    """
    C = h_RCND.shape[1]
    if C == 1:
        return
    start = (C - 1) % 2 if backwards else 0
    h1, h2 = h_RCND[:, start::2], h_RCND[:, 1 - start :: 2]
    decay1, decay2 = decay_RCND[:, start::2], decay_RCND[:, 1 - start :: 2]
    pairs, rest = h2.shape[1], h1.shape[1] - 1
    first = slice(h1.shape[1] - pairs, None) if backwards else slice(pairs)
    h2.addcmul_(decay2, h1[:, first])
    solve_(decay2 * decay1[:, first], h2, backwards=backwards)
    if rest:
        left, near = (slice(rest), slice(pairs - rest, None)) if backwards else (slice(1, None), slice(rest))
        h1[:, left].addcmul_(decay1[:, left], h2[:, near])


def _states(h_RND: Tensor, x_RCD: Tensor, dt_RCD: Tensor, A_ND: Tensor, B_RCN: Tensor) -> tuple[Tensor, Tensor]:
    """States after every token of a chunk and the decays that led to them, both [R, C, N, D].

    Channels come last: they are many and contiguous, so that each operation runs along them.
    """
    decay = (dt_RCD.unsqueeze(2) * A_ND).exp_()
    states = (dt_RCD * x_RCD).unsqueeze(2) * B_RCN.unsqueeze(3)
    states[:, 0].addcmul_(decay[:, 0], h_RND)
    solve_(decay, states)
    return states, decay


class ChunkedScan(torch.autograd.Function):
    """x, dt [B, T, D], A [D, N], B, C [B, T, N], initial [B, N, D] -> y [B, T, D], final [B, N, D] in initial's type.

    Saves the inputs and the state that enters each chunk. The other states exist for one chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, T, width = x.shape
        dtype = initial_BND.dtype
        A_ND = A.to(dtype).t().contiguous()
        size = chunk_length(batch, A.numel(), dtype, x.device)
        y = torch.empty(batch, T, width, dtype=dtype, device=x.device)
        entering = torch.empty(batch, -(-T // size), *A_ND.shape, dtype=dtype, device=x.device)
        final = torch.empty_like(initial_BND, memory_format=torch.contiguous_format)
        with no_autocast(x):
            for r in row_groups(batch, x.device, size * A.numel()):
                h = initial_BND[r].contiguous()
                for n, tokens in enumerate(_chunks(T, size)):
                    entering[r, n] = h
                    x_c, dt_c, B_c, C_c = (z[r, tokens].to(dtype) for z in (x, dt, B, C))
                    states, _ = _states(h, x_c, dt_c, A_ND, B_c)
                    y[r, tokens] = torch.matmul(C_c.unsqueeze(2), states).squeeze(2)
                    h = states[:, -1]
                final[r] = h
        ctx.save_for_backward(x, dt, A, B, C, entering)
        ctx.size = size
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
            for r in row_groups(batch, x.device, ctx.size * A.numel()):
                dh = torch.zeros_like(entering[r, 0]) if dfinal is None else dfinal[r].contiguous()
                for n, tokens in reversed(list(enumerate(_chunks(T, ctx.size)))):
                    h = entering[r, n]
                    x_c, dt_c, B_c, C_c = (z[r, tokens].to(dtype) for z in (x, dt, B, C))
                    dy_c = torch.zeros_like(x_c) if dy is None else dy[r, tokens]
                    states, decay = _states(h, x_c, dt_c, A_ND, B_c)
                    dC[r, tokens] = torch.matmul(states, dy_c.unsqueeze(3)).squeeze(3).to(C.dtype)
                    grad = C_c.unsqueeze(3) * dy_c.unsqueeze(2)  # of the states
                    grad[:, -1] += dh
                    solve_(decay.roll(-1, 1), grad, backwards=True)
                    over_decay = decay.mul_(grad)  # the gradient that each state hands to the one before it
                    dh = over_decay[:, 0].clone()
                    dB[r, tokens] = torch.matmul(grad, (dt_c * x_c).unsqueeze(3)).squeeze(3).to(B.dtype)
                    dinput = torch.matmul(B_c.unsqueeze(2), grad).squeeze(2)
                    dexponent = over_decay  # of dt A: times the state before, in place
                    dexponent[:, 1:].mul_(states[:, :-1])
                    dexponent[:, 0].mul_(h)
                    dA_RND[r] += torch.mul(dexponent, dt_c.unsqueeze(2), out=grad).sum(1)
                    ddt[r, tokens] = dexponent.mul_(A_ND).sum(2).addcmul_(dinput, x_c).to(dt.dtype)
                    dx[r, tokens] = (dinput * dt_c).to(x.dtype)
                dinitial[r] = dh
        return dx, ddt, dA_RND.sum(0).t().to(A.dtype), dB, dC, dinitial


def _chunks(T: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]
