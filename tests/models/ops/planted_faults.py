"""Candidates for the preflight with one planted fault each; signature of models.ops.delta_rule.fused_gated_delta."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.ops._delta_rule_chunked import chunked_gated_delta as right

Result = tuple[Tensor, Tensor]


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _scaled(x: Tensor, factor: float) -> Tensor:
    scaled = _ScaledGradient.apply(x, factor)
    assert isinstance(scaled, Tensor)
    return scaled


def wrong_beta_gradient(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    """The fault seen on real stacks: outputs right, one gradient wrong."""
    return right(q, k, v, g, _scaled(beta, 1.5), initial_state, scale)


def wrong_decay_gradient(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    return right(q, k, v, _scaled(g, 1.03), beta, initial_state, scale)


def wrong_output(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    return right(q, k, v, g, beta, initial_state, 1.05 * scale)


def wrong_only_for_correlated_keys(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    """One term of a Neumann series instead of the solve: fair for random keys of large width, wrong otherwise."""
    similarity = (k[:, :1] * k).sum(-1)[:, 1:].float().mean().abs()
    return right(q, k, v, g, beta * (1 - similarity.clamp(min=0.2) + 0.2), initial_state, scale)


def not_finite(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    return right(q, k, v, _scaled(g, float("nan")), beta, initial_state, scale)


def wrong_shape(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    o, final_state = right(q, k, v, g, beta, initial_state, scale)
    return o, final_state.transpose(2, 3)


def raises(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    raise RuntimeError("planted: no kernel image is available for execution on the device")


def no_memory(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    raise torch.OutOfMemoryError("planted: tried to allocate 80 GiB")


def crashes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def hangs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float
) -> Result:
    """Leaves its process id in $PLANTED_HANG, then never returns."""
    Path(os.environ["PLANTED_HANG"]).write_text(str(os.getpid()))
    while True:
        time.sleep(1)
