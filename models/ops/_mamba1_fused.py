"""mamba-ssm's CUDA kernels for the selective scan, where that package is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from models.ops._layout import no_autocast

MOST_STATES = 256  # per channel: what the kernels are compiled for


@functools.cache
def serves(states: int) -> bool:
    """Whether mamba-ssm is installed and takes so many states per channel."""
    return states <= MOST_STATES and importlib.util.find_spec("mamba_ssm") is not None


def fused_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """x, dt [B, T, D], A [D, N], B, C [B, T, N] -> y [B, T, D], final state [B, D, N], float32; no skip, from zeros.

    Unchecked and untested. All goes in as float32: the kernels want x and dt in one type, and in bfloat16 each decay
    would be wrong by up to 0.4% of its exponent. Their backward pass leaves out the final state, so a gradient of it
    raises RuntimeError.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B_BNT, C_BNT = (z.float().transpose(1, 2).contiguous() for z in (x, dt, B, C))
    with no_autocast(x):
        y_BDT, final = selective_scan_fn(u, delta, A.float().contiguous(), B_BNT, C_BNT, return_last_state=True)
    return y_BDT.transpose(1, 2), _NoGradient.apply(final)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("mamba-ssm's kernels give no gradient of the final state; choose impl='chunked'")
