"""Mamba-1 and Mamba-2 layers.

Shapes: B batch, T time, D model width, I inner width, N state width, R rank of the step-size projection, H heads,
P head width, C convolved channels, W filter width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.bfloat16 import Linear
from models.mixers.base import FusedLinear, Mixer, RMSNorm, conv_weight_, log_uniform_dt_bias_, widen
from models.ops import selective_scan, selective_scan_step, short_conv, short_conv_step, ssd, ssd_step


@dataclass
class MambaState:
    """State space [B, I, N] (Mamba-1) or [B, H, P, N] (Mamba-2), and the convolution's last inputs [B, W-1, C]."""

    memory: Tensor
    conv: Tensor


class Mamba(Mixer):
    """Selective state space, Mamba-1 (Gu, Dao 2023, arXiv 2312.00752): I = expand D, R = ceil(D / 16)."""

    def __init__(self, d_model: int, *, d_state: int, expand: int, conv_width: int, impl: str = "auto") -> None:
        super().__init__()
        inner, rank = expand * d_model, math.ceil(d_model / 16)
        self.inner, self.d_state, self.impl = inner, d_state, impl
        self.in_proj = FusedLinear(d_model, (inner, inner))
        self.conv_weight = nn.Parameter(torch.empty(inner, conv_width))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.x_proj = FusedLinear(inner, (rank, d_state, d_state))
        self.dt_proj = Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out = Linear(inner, d_model, bias=False)

    def init_own_parameters(self, generator: torch.Generator) -> None:
        conv_weight_(self.conv_weight, generator)
        nn.init.zeros_(self.conv_bias)
        log_uniform_dt_bias_(self.dt_proj.bias, generator)
        nn.init.ones_(self.D)
        with torch.no_grad():
            # S4D-real: rates -1, -2, ..., -N in every channel
            self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log().expand_as(self.A_log))

    def _scan_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dt, B, C = self.x_proj(x)
        return x, F.softplus(widen(self.dt_proj(dt))), -self.A_log.exp(), B, C

    def _run(self, x_BTD: Tensor) -> tuple[Tensor, MambaState]:
        x, z = self.in_proj(x_BTD)
        x, conv = short_conv(x, self.conv_weight, bias=self.conv_bias)
        y, memory = selective_scan(*self._scan_inputs(x), D=self.D, impl=self.impl)
        return self.out(y * F.silu(z)), MambaState(memory, conv)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._run(x_BTD)[0]

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, MambaState]:
        return self._run(x_BTD)

    def step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        x, z = self.in_proj(x_BD)
        x, conv = short_conv_step(x, self.conv_weight, state.conv, bias=self.conv_bias)
        y, memory = selective_scan_step(*self._scan_inputs(x), state.memory, D=self.D)
        return self.out(y * F.silu(z)), MambaState(memory, conv)

    def sequence_flops_per_token(self, context: int) -> float:
        # exp(dt A), dt x B, decay and add, read with C: six operations a cell of the state
        return 2.0 * self.conv_weight.numel() + 6.0 * self.inner * self.d_state


class Mamba2(Mixer):
    """State-space duality, Mamba-2 (Dao, Gu 2024, arXiv 2405.21060): one scalar rate a head, B and C shared by all.

    Output W_o RMSNorm_I(y * silu(z)).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int,
        expand: int,
        head_width: int,
        conv_width: int,
        norm_eps: float,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        inner = expand * d_model
        self.inner, self.d_state, self.head_width, self.impl = inner, d_state, head_width, impl
        self.n_heads = inner // head_width
        channels = inner + 2 * d_state
        self.in_proj = FusedLinear(d_model, (inner, channels, self.n_heads))
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_width))
        self.conv_bias = nn.Parameter(torch.empty(channels))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.out = Linear(inner, d_model, bias=False)

    def init_own_parameters(self, generator: torch.Generator) -> None:
        conv_weight_(self.conv_weight, generator)
        nn.init.zeros_(self.conv_bias)
        log_uniform_dt_bias_(self.dt_bias, generator)
        nn.init.ones_(self.D)
        with torch.no_grad():
            self.A_log.uniform_(1.0, 16.0, generator=generator).log_()

    def _scan_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, B, C = xBC.split((self.inner, self.d_state, self.d_state), dim=-1)
        x = x.unflatten(-1, (self.n_heads, self.head_width))
        dt = F.softplus(widen(dt) + self.dt_bias)
        return x, dt, -self.A_log.exp(), B.unsqueeze(-2), C.unsqueeze(-2)

    def _output(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out(self.norm(y.flatten(-2) * F.silu(z)))

    def _run(self, x_BTD: Tensor) -> tuple[Tensor, MambaState]:
        z, xBC, dt = self.in_proj(x_BTD)
        xBC, conv = short_conv(xBC, self.conv_weight, bias=self.conv_bias)
        y, memory = ssd(*self._scan_inputs(xBC, dt), D=self.D, impl=self.impl)
        return self._output(y, z), MambaState(memory, conv)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._run(x_BTD)[0]

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, MambaState]:
        return self._run(x_BTD)

    def step(self, x_BD: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        z, xBC, dt = self.in_proj(x_BD)
        xBC, conv = short_conv_step(xBC, self.conv_weight, state.conv, bias=self.conv_bias)
        y, memory = ssd_step(*self._scan_inputs(xBC, dt), state.memory, D=self.D)
        return self._output(y, z), MambaState(memory, conv)

    def sequence_flops_per_token(self, context: int) -> float:
        # decay, rank-one write (2), read (2) of each cell
        return 2.0 * self.conv_weight.numel() + 5.0 * self.inner * self.d_state
