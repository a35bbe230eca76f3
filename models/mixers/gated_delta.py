"""Gated DeltaNet layers: the full mixer of OLMo-hybrid, and the earlier, simpler one of the music study.

Shapes: B batch, T time, D model width, H heads, K key width, V value width, C convolved channels, W filter width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.bfloat16 import Linear
from models.cpu.heads import CpuUnitHeads
from models.mixers.base import (
    FusedLinear,
    GatedHeadNorm,
    Mixer,
    RMSNorm,
    conv_weight_,
    log_uniform_dt_bias_,
    trains_on_cpu,
    widen,
)
from models.ops import gated_delta, gated_delta_step, short_conv, short_conv_step


@dataclass
class GatedDeltaState:
    """The associative memory S [B, H, K, V] and, where there is a convolution, its last W - 1 inputs [B, W-1, C]."""

    memory: Tensor
    conv: Tensor | None = None


class GatedDeltaNet(Mixer):
    """Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464) with negative eigenvalues allowed.

    q, k, v pass a causal depthwise convolution and SiLU; q and k are L2-normalised a head;
    beta = 2 sigmoid(W_b x), g = -exp(A_log) softplus(W_a x + dt_bias);
    output W_o (RMSNorm_V(o) * silu(W_g x)).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        head_k: int,
        head_v: int,
        *,
        conv_width: int,
        norm_eps: float,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.n_heads, self.head_k, self.head_v, self.impl = n_heads, head_k, head_v, impl
        keys, values = n_heads * head_k, n_heads * head_v
        self.qkv_sizes = (keys, keys, values)
        self.in_proj = FusedLinear(d_model, (2 * keys + values, values, n_heads, n_heads))
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, conv_width))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.norm = GatedHeadNorm(head_v, norm_eps)
        self.out = Linear(values, d_model, bias=False)

    def init_own_parameters(self, generator: torch.Generator) -> None:
        conv_weight_(self.conv_weight, generator)
        with torch.no_grad():
            # the floor keeps the logarithm finite; below it a head forgets nothing in any context used here
            self.A_log.uniform_(0.0, 16.0, generator=generator).clamp_(min=1e-6).log_()
        log_uniform_dt_bias_(self.dt_bias, generator)
        keys, _, values = self.qkv_sizes
        for part in self.in_proj.weight[: 2 * keys + values].split(self.qkv_sizes):
            nn.init.xavier_uniform_(part, generator=generator)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if trains_on_cpu(qkv):
            return CpuUnitHeads.apply(qkv, self.n_heads, self.head_k)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in qkv.split(self.qkv_sizes, dim=-1))
        return F.normalize(widen(q), dim=-1), F.normalize(widen(k), dim=-1), v

    def _decay(self, a: Tensor) -> Tensor:
        return -self.A_log.exp() * F.softplus(widen(a) + self.dt_bias)

    def _output(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.out(self.norm(o, gate.unflatten(-1, (self.n_heads, -1))).flatten(-2))

    def _run(self, x_BTD: Tensor) -> tuple[Tensor, GatedDeltaState]:
        qkv, gate, a, b = self.in_proj(x_BTD)
        qkv, conv = short_conv(qkv, self.conv_weight)
        q, k, v = self._heads(qkv)
        o, memory = gated_delta(q, k, v, self._decay(a), 2 * widen(b).sigmoid(), impl=self.impl)
        return self._output(o, gate), GatedDeltaState(memory, conv)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._run(x_BTD)[0]

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, GatedDeltaState]:
        return self._run(x_BTD)

    def step(self, x_BD: Tensor, state: GatedDeltaState) -> tuple[Tensor, GatedDeltaState]:
        qkv, gate, a, b = self.in_proj(x_BD)
        assert state.conv is not None
        qkv, conv = short_conv_step(qkv, self.conv_weight, state.conv)
        q, k, v = self._heads(qkv)
        o, memory = gated_delta_step(q, k, v, self._decay(a), 2 * widen(b).sigmoid(), state.memory)
        return self._output(o, gate), GatedDeltaState(memory, conv)

    def sequence_flops_per_token(self, context: int) -> float:
        return 2.0 * self.conv_weight.numel() + 7 * self.n_heads * self.head_k * self.head_v


class SimpleDeltaNet(Mixer):
    """The music study's earlier mixer: square q, k, v, out; biased gates from D to H; normed q, k; no conv, no gate.

    beta = 2 sigmoid(W_b x + b_b) and g = logsigmoid(W_a x + b_a): the source gives the shapes of the two gates,
    not their non-linearities, and these are the ones that keep the rule stable. q and k pass an RMS norm with a
    weight [E] and are then L2-normalised.
    """

    def __init__(self, d_model: int, n_heads: int, *, norm_eps: float, impl: str = "auto") -> None:
        super().__init__()
        self.n_heads, self.impl = n_heads, impl
        self.width = d_model // n_heads
        self.qkv = FusedLinear(d_model, (d_model, d_model, d_model))
        self.decay_gate = Linear(d_model, n_heads)
        self.write_gate = Linear(d_model, n_heads)
        self.q_norm = RMSNorm(self.width, eps=norm_eps)
        self.k_norm = RMSNorm(self.width, eps=norm_eps)
        self.out = Linear(d_model, d_model, bias=False)

    def init_own_parameters(self, generator: torch.Generator) -> None:
        # logsigmoid(5) = -0.0067 a step: at first a memory of about 150 steps, two seconds of audio
        nn.init.constant_(self.decay_gate.bias, 5.0)
        nn.init.zeros_(self.write_gate.bias)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)) for part in self.qkv(x))
        q, k = (F.normalize(widen(norm(y)), dim=-1) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v, F.logsigmoid(widen(self.decay_gate(x))), 2 * widen(self.write_gate(x)).sigmoid()

    def _run(self, x_BTD: Tensor) -> tuple[Tensor, GatedDeltaState]:
        o, memory = gated_delta(*self._inputs(x_BTD), impl=self.impl)
        return self.out(o.flatten(-2)), GatedDeltaState(memory)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._run(x_BTD)[0]

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, GatedDeltaState]:
        return self._run(x_BTD)

    def step(self, x_BD: Tensor, state: GatedDeltaState) -> tuple[Tensor, GatedDeltaState]:
        o, memory = gated_delta_step(*self._inputs(x_BD), state.memory)
        return self.out(o.flatten(-2)), GatedDeltaState(memory)

    def sequence_flops_per_token(self, context: int) -> float:
        return 7.0 * self.n_heads * self.width**2
