"""What a preflight tests: an operator at the shape and dtype that training will use, with draws of its inputs.

Shapes: B batch, T time; gated delta rule: h query/key heads, H value heads, K, V head widths; selective scan: D
channels, N states a channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops._delta_rule_chunked import chunked_gated_delta
from models.ops._mamba1_chunked import ChunkedScan

Candidate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One draw of inputs; `hard`: of the kind that strains the operator most."""

    name: str
    seed: int
    hard: bool = False


@dataclass(frozen=True, kw_only=True)
class KernelCase(ABC):
    """An operator at one shape and dtype on one device.

    Class attributes: the operator in words, the fused kernel "module:function", the trials, the names of the results
    (output, final state, gradients of the inputs) and the largest relative RMS error of each.
    """

    operator: ClassVar[str]
    fused: ClassVar[str]
    trials: ClassVar[tuple[Trial, ...]]
    results: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float]

    B: int
    T: int
    dtype: str
    device: str

    @abstractmethod
    def draw(self, trial: Trial) -> list[Tensor]:
        """The operator's inputs as the kernel gets them, and weights of the loss on its output."""

    @abstractmethod
    def call(self, function: Candidate, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Output and final state of a kernel with the fused one's signature."""

    @abstractmethod
    def reference(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Output and final state in the inputs' precision, float64."""

    @abstractmethod
    def shape_constants(self) -> dict[str, object]:
        """Sizes that a kernel is compiled for; lengths and batches aside."""


@dataclass(frozen=True, kw_only=True)
class Case(KernelCase):
    """The gated delta rule; a candidate takes (q, k, v, g, beta, initial_state, scale).

    Correlated keys with beta near 2 are the hardest system that the kernel must solve.
    """

    operator: ClassVar[str] = "gated delta rule"
    fused: ClassVar[str] = "models.ops.delta_rule:fused_gated_delta"
    trials: ClassVar[tuple[Trial, ...]] = (
        Trial(name="seed 0", seed=0),
        Trial(name="seed 1", seed=1),
        Trial(name="correlated keys, beta near 2", seed=2, hard=True),
    )
    results: ClassVar[tuple[str, ...]] = ("o", "final_state", "dq", "dk", "dv", "dg", "dbeta")
    tolerance: ClassVar[float] = 2e-2

    h: int
    H: int
    K: int
    V: int

    def draw(self, trial: Trial) -> list[Tensor]:
        """q, k, v in the case's dtype, g and beta in float32 (as the kernel gets them), and weights of the loss.

        The correlation is chosen so that rounding alone stays well inside the tolerance: a right kernel with float16
        inputs is off by at most 1.3e-3 there, so about 1e-2 with the 8 times coarser bfloat16.
        """
        gen = torch.Generator().manual_seed(trial.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen)

        B, T, h, H, K, V = self.B, self.T, self.h, self.H, self.K, self.V
        q, k, v, loss_weights = randn(B, T, h, K), randn(B, T, h, K), randn(B, T, H, V), randn(B, T, H, V)
        beta = 2 * torch.sigmoid(1.5 * randn(B, T, H) + (3.0 if trial.hard else 0.0))
        rate = 16 * torch.rand(H, generator=gen)
        g = -rate * F.softplus(randn(B, T, H) - 4)
        if trial.hard:
            k = k + randn(B, 1, h, K)
        dtype = getattr(torch, self.dtype)
        low = [x.to(self.device, dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
        return [*low, g.to(self.device), beta.to(self.device), loss_weights.to(self.device, dtype)]

    def call(self, function: Candidate, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return function(*inputs, None, self.K**-0.5)

    def reference(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.call(chunked_gated_delta, inputs)

    def shape_constants(self) -> dict[str, object]:
        return {"heads": (self.h, self.H), "widths": (self.K, self.V)}


@dataclass(frozen=True, kw_only=True)
class ScanCase(KernelCase):
    """The selective scan of Mamba-1; a candidate takes (x, dt, A, B, C) and begins with a state of zeros.

    Small steps make a state remember the whole sequence, so that the error of every token is still there at the end.
    """

    operator: ClassVar[str] = "selective scan"
    fused: ClassVar[str] = "models.ops._mamba1_fused:fused_scan"
    trials: ClassVar[tuple[Trial, ...]] = (
        Trial(name="seed 0", seed=0),
        Trial(name="seed 1", seed=1),
        Trial(name="long memory", seed=2, hard=True),
    )
    results: ClassVar[tuple[str, ...]] = ("y", "final_state", "dx", "ddt", "dA", "dB", "dC")
    tolerance: ClassVar[float] = 1e-3  # float32 whatever the model computes in

    D: int
    N: int

    def draw(self, trial: Trial) -> list[Tensor]:
        """x, dt, A, B, C and weights of the loss, with steps and rates as the mixer's initial weights give them."""
        gen = torch.Generator().manual_seed(trial.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen)

        B, T, D, N = self.B, self.T, self.D, self.N
        dt = F.softplus(randn(B, T, D) - (9.0 if trial.hard else 3.0))
        A = -torch.arange(1.0, N + 1) * (0.5 + torch.rand(D, N, generator=gen))
        inputs = [randn(B, T, D), dt, A, randn(B, T, N), randn(B, T, N), randn(B, T, D)]
        return [x.to(self.device, getattr(torch, self.dtype)) for x in inputs]

    def call(self, function: Candidate, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return function(*inputs)

    def reference(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        y, final_BND = ChunkedScan.apply(*inputs, inputs[0].new_zeros(self.B, self.N, self.D))
        return y, final_BND.transpose(1, 2)

    def shape_constants(self) -> dict[str, object]:
        return {"channels": self.D, "states": self.N}


CASES: dict[str, type[KernelCase]] = {case.operator: case for case in (Case, ScanCase)}
