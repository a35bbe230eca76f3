"""Pieces that every block of the codec language models shares.

Shapes: B batch, T time, D model width, F hidden width of the MLP, H heads, V value width of a head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.bfloat16 import Linear, linear
from models.cpu.heads import CpuGatedNorm
from models.cpu.norm import CpuRMSNorm
from models.cpu.swiglu import CpuSwiGLU


class FusedLinear(Linear):
    """Several bias-free projections of one input as one matrix product, returned separately.

    Each part is initialised as if it stood alone (Glorot, by its own fan-out).
    """

    def __init__(self, d_in: int, sizes: Sequence[int]) -> None:
        super().__init__(d_in, sum(sizes), bias=False)
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).split(self.sizes, dim=-1)

    def init_weights(self, generator: torch.Generator) -> None:
        for part in self.weight.split(self.sizes):
            nn.init.xavier_uniform_(part, generator=generator)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in at least float32 inside an autocast region too."""

    def forward(self, x: Tensor) -> Tensor:
        x = widen(x)
        if trains_on_cpu(x) and x.dtype == self.weight.dtype:
            return CpuRMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class Mixer(nn.Module, ABC):
    """A layer that mixes over time, in three forms that compute the same function.

    `forward` reads a whole sequence, `prefill` does the same and returns what decoding needs, `step` reads one
    token. `step` may reuse the memory of the state it is given.
    """

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; output t depends on inputs 0..t."""

    @abstractmethod
    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, Any]:
        """`forward` from an empty past, and the state after T tokens with room for `max_steps` tokens in all."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token [B, D] -> [B, D] and the next state."""

    @abstractmethod
    def sequence_flops_per_token(self, context: int) -> float:
        """Forward floating-point operations a token, beyond two for each weight of a projection.

        Averaged over the positions of a sequence of `context` tokens; one multiply-add counts two.
        """

    def init_own_parameters(self, generator: torch.Generator) -> None:
        """Initialise the parameters that are not inside a projection or a norm."""


class ResidualDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) of what a part of a block adds, during training only.

    streams: one generator per clip, drawn from in turn by all blocks, so that a clip's mask does not depend on which
    clips share its batch, micro-batch or process. Without any, the masks come from the global random state.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.streams: list[torch.Generator] = []

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each number 0 with probability p, else divided by 1 - p; raises ValueError for another number of clips."""
        if not self.training or not self.p:
            return x_BTD
        if not self.streams:
            return F.dropout(x_BTD, self.p)
        if len(self.streams) != len(x_BTD):
            raise ValueError(f"{len(self.streams)} random streams for {len(x_BTD)} clips; seed one per clip")
        shape, device = x_BTD.shape[1:], x_BTD.device
        keep_BTD = torch.stack([torch.rand(shape, generator=g, device=device) >= self.p for g in self.streams])
        return x_BTD * keep_BTD / (1 - self.p)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = FusedLinear(d_model, (d_ff, d_ff))
        self.down = Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        joint = linear(x, self.gate_up.weight)
        if trains_on_cpu(joint):
            return self.down(CpuSwiGLU.apply(joint))
        gate, up = joint.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GatedHeadNorm(nn.Module):
    """Root-mean-square norm over each head's V values, times silu of a gate; one weight [V] for all heads."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps=eps)

    def forward(self, x_HV: Tensor, gate_HV: Tensor) -> Tensor:
        if trains_on_cpu(x_HV, gate_HV) and self.norm.weight.dtype == torch.float32:
            return CpuGatedNorm.apply(x_HV, gate_HV, self.norm.weight, self.norm.eps)
        return self.norm(x_HV) * F.silu(gate_HV)


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Whether the compiled passes are for these: they save the many passes of a backward, and take two types."""
    kernel_types = (torch.float32, torch.bfloat16)
    return torch.is_grad_enabled() and all(x.device.type == "cpu" and x.dtype in kernel_types for x in tensors)


def widen(x: Tensor) -> Tensor:
    """At least float32: what must not be computed in the narrow type of an autocast region."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0; accurate for small x."""
    return x + torch.log(-torch.expm1(-x))


def log_uniform_dt_bias_(bias: Tensor, generator: torch.Generator, low: float = 1e-3, high: float = 0.1) -> None:
    """Fill with inverse_softplus(dt), log dt uniform: step sizes from 1/1000 to 1/10 (Mamba, arXiv 2312.00752)."""
    with torch.no_grad():
        bias.uniform_(math.log(low), math.log(high), generator=generator)
        bias.copy_(inverse_softplus(bias.exp()))


def conv_weight_(weight_DW: Tensor, generator: torch.Generator) -> None:
    """Uniform within 1/sqrt(W): PyTorch's own default for a depthwise convolution of width W."""
    bound = weight_DW.shape[-1] ** -0.5
    nn.init.uniform_(weight_DW, -bound, bound, generator=generator)
