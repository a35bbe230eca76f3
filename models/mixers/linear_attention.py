"""Linear attention with feature map elu + 1, plain or with the delta rule.

Shapes: B batch, T time, D model width, H heads, E width of a head (keys and values), L complete segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cpu.bfloat16 import Linear
from models.mixers.base import FusedLinear, Mixer, widen
from models.ops import (
    elu_feature_map,
    gated_delta,
    gated_delta_step,
    linear_attention,
    linear_attention_segments,
    linear_attention_step,
)


@dataclass
class LinearState:
    """Memory S [B, H, E, E] and normaliser z [B, H, E]; z is None with the delta rule, which needs no normaliser."""

    memory: Tensor
    normalizer: Tensor | None


@dataclass
class LinearInputs:
    """Feature-mapped q, k and plain v, each [..., H, E]; beta [..., H] only with the delta rule."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None

    def tokens(self, chosen: slice) -> LinearInputs:
        """The chosen tokens of [B, T, ...] inputs."""
        beta = None if self.beta is None else self.beta[:, chosen]
        return LinearInputs(self.q[:, chosen], self.k[:, chosen], self.v[:, chosen], beta)


class LinearAttention(Mixer):
    """o_t = phi(q_t) S_t / (phi(q_t) . z_t), S_t = sum phi(k) v^T (Katharopoulos et al. 2020, arXiv 2006.16236).

    With `delta_rule`, S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T with k = phi(k) / |phi(k)|, q likewise,
    beta = sigmoid(W_b x), and o_t = q_t S_t (Yang et al. 2024, arXiv 2406.06484).
    """

    def __init__(self, d_model: int, n_heads: int, *, delta_rule: bool = False, impl: str = "auto") -> None:
        super().__init__()
        self.n_heads, self.width, self.delta_rule, self.impl = n_heads, d_model // n_heads, delta_rule, impl
        self.in_proj = FusedLinear(d_model, (d_model,) * 3 + ((n_heads,) if delta_rule else ()))
        self.out = Linear(d_model, d_model, bias=False)

    def inputs(self, x: Tensor) -> LinearInputs:
        """Projected and feature-mapped [..., D]."""
        q, k, v, *b = self.in_proj(x)
        q, k, v = (part.unflatten(-1, (self.n_heads, self.width)) for part in (q, k, v))
        q, k = elu_feature_map(widen(q)), elu_feature_map(widen(k))
        if not self.delta_rule:
            return LinearInputs(q, k, v, None)
        return LinearInputs(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, widen(b[0]).sigmoid())

    def read_write(self, i: LinearInputs, state: LinearState | None = None) -> tuple[Tensor, LinearState]:
        """Mix a sequence from `state` (an empty memory when None): o [B, T, H, E] and the state after it."""
        if i.beta is not None:
            initial = None if state is None else state.memory
            no_decay = torch.zeros_like(i.beta)
            o, memory = gated_delta(i.q, i.k, i.v, no_decay, i.beta, initial_state=initial, scale=1.0, impl=self.impl)
            return o, LinearState(memory, None)
        past = None if state is None or state.normalizer is None else (state.memory, state.normalizer)
        o, (memory, z) = linear_attention(i.q, i.k, i.v, initial_state=past, impl=self.impl)
        return o, LinearState(memory, z)

    def read_write_segments(
        self, i: LinearInputs, segment: int, cumulative: bool
    ) -> tuple[Tensor, LinearState, Tensor, Tensor | None]:
        """Mix from an empty memory and keep the states of the L = T // segment complete segments.

        Returns o [B, T, H, E], the final state, memories [B, L, H, E, E] and normalisers [B, L, H, E]. With
        `cumulative` a kept state is the memory after its segment, otherwise what the segment alone writes into
        an empty memory.
        """
        if i.beta is None:
            o, (memory, z), (kept_S, kept_z) = linear_attention_segments(
                i.q, i.k, i.v, segment=segment, cumulative=cumulative, impl=self.impl
            )
            return o, LinearState(memory, z), kept_S, kept_z
        B, T = i.q.shape[:2]
        outputs, kept, state = [], [], None
        for start in range(0, T, segment):
            part = i.tokens(slice(start, start + segment))
            o, state = self.read_write(part, state)
            outputs.append(o)
            if start + segment <= T:
                kept.append(state.memory if cumulative or start == 0 else self.read_write(part)[1].memory)
        assert state is not None
        empty = state.memory.new_zeros(B, 0, self.n_heads, self.width, self.width)
        return torch.cat(outputs, 1), state, torch.stack(kept, 1) if kept else empty, None

    def read_write_step(self, i: LinearInputs, state: LinearState) -> tuple[Tensor, LinearState]:
        """One token: o [B, H, E] and the new state."""
        if i.beta is not None:
            o, memory = gated_delta_step(i.q, i.k, i.v, torch.zeros_like(i.beta), i.beta, state.memory, scale=1.0)
            return o, LinearState(memory, None)
        assert state.normalizer is not None
        o, (memory, z) = linear_attention_step(i.q, i.k, i.v, (state.memory, state.normalizer))
        return o, LinearState(memory, z)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(self.read_write(self.inputs(x_BTD))[0].flatten(-2))

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, LinearState]:
        o, state = self.read_write(self.inputs(x_BTD))
        return self.out(o.flatten(-2)), state

    def step(self, x_BD: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        o, state = self.read_write_step(self.inputs(x_BD), state)
        return self.out(o.flatten(-2)), state

    def sequence_flops_per_token(self, context: int) -> float:
        per_cell = 6.0 if self.delta_rule else 4.0
        return per_cell * self.n_heads * self.width**2 + (0 if self.delta_rule else 4.0 * self.n_heads * self.width)
