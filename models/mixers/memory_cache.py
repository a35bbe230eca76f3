"""Memory caching with gated residual memory around linear attention and around any other mixer.

Source: Behrouz et al. 2026, "Memory Caching: RNNs with Growing Memory", arXiv 2602.24281. A sequence is cut into
segments of S tokens; the memory after each complete segment i is kept. Token t of segment s weighs them with

    gamma_t = softmax over [<u_t, m_0>, ..., <u_t, m_{s-1}>, <u_t, running mean of segment s up to t>],   u_t = W_u x_t

where m_i is the mean input of segment i (x is the normed input of the layer), and reads

    mixed_t = gamma_cur x_out_t + sum_i gamma_i phi(q_t) S_i.

With a gate bias b the layer returns x_out + sigmoid(b) (mixed - x_out): shut (b -> -inf) it is the mixer without
caches, open (b -> +inf) the paper's. Without one it is the paper's.

Shapes: B batch, T time, D model width, H heads, E head width, L complete segments, R rank of W_u.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.cpu.bfloat16 import Linear
from models.mixers.base import Mixer, widen
from models.mixers.linear_attention import LinearAttention, LinearInputs, LinearState
from models.ops import memory_cache_retrieval, memory_cache_retrieval_step, segment_gate_logits
from models.ops._layout import no_autocast


@dataclass(frozen=True, kw_only=True)
class MemoryCacheConfig:
    """Options of memory caching, each one variable of the ablation.

    segment: tokens per segment. start_layer: first layer with caches, counted from 1. rank: of W_u = W_2 W_1, None
    for a full D x D matrix. gate_bias_init: initial scalar b, None for no bias. normalized_retrieval: divide each
    read by phi(q) . z_i, as the current read is. cumulative: keep the running memory rather than what each segment
    alone wrote.
    """

    segment: int = 256
    start_layer: int = 1
    rank: int | None = None
    gate_bias_init: float | None = -2.0
    normalized_retrieval: bool = False
    cumulative: bool = True

    def __post_init__(self) -> None:
        if self.segment < 1:
            raise ValueError(f"segment={self.segment} tokens; choose segment >= 1")
        if self.start_layer < 1:
            raise ValueError(f"start_layer={self.start_layer}, but layers count from 1; choose start_layer >= 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} of W_u; choose rank >= 1, or None for the full matrix")


class SegmentMeans:
    """Means of the segments so far: complete ones [B, L, D] with room for all, and the running sum of the last."""

    def __init__(self, x_BTD: Tensor, segment: int, max_steps: int) -> None:
        B, T, D = x_BTD.shape
        self.segment, self.length = segment, T
        done = T // segment
        self.means = x_BTD.new_zeros(B, max(max_steps, T) // segment, D)
        if done:
            self.means[:, :done] = x_BTD[:, : done * segment].unflatten(1, (done, segment)).mean(2)
        self.running = x_BTD[:, done * segment :].sum(1)

    def add(self, x_BD: Tensor) -> Tensor:
        """Add a token: [B, s + 1, D], the means of the s complete segments it sees and of its own so far."""
        seen, within = divmod(self.length, self.segment)
        self.running = self.running + x_BD
        means = torch.cat([self.means[:, :seen], (self.running / (within + 1))[:, None]], dim=1)
        self.length += 1
        return means

    def close_segment(self) -> int | None:
        """After a token that completes a segment: keep its mean and return its index; None otherwise."""
        if self.length % self.segment:
            return None
        index = self.length // self.segment - 1
        self.means[:, index] = self.running / self.segment
        self.running = torch.zeros_like(self.running)
        return index


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in at least float32; inside autocast widened operands alone would be narrowed again."""
    with no_autocast(a):
        return widen(a) @ widen(b)


class SegmentGate(nn.Module):
    """gamma = softmax of <W_u x_t, segment means>, and the scalar openness sigmoid(b)."""

    def __init__(self, d_model: int, config: MemoryCacheConfig) -> None:
        super().__init__()
        self.d_model, self.segment, self.bias_init = d_model, config.segment, config.gate_bias_init
        self.u: nn.Module = (
            Linear(d_model, d_model, bias=False)
            if config.rank is None
            else nn.Sequential(Linear(d_model, config.rank, bias=False), Linear(config.rank, d_model, bias=False))
        )
        self.bias = None if config.gate_bias_init is None else nn.Parameter(torch.empty(()))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Gates [B, T, L + 1], L = T // segment; 0 for caches a token does not see; the current segment is last."""
        return segment_gate_logits(self.u(x_BTD), x_BTD, segment=self.segment).softmax(-1)

    def step(self, x_BD: Tensor, means: SegmentMeans) -> Tensor:
        """Gates [B, s + 1] of the next token over the s caches it sees and its own segment."""
        seen_BLD = means.add(x_BD)
        return _wide_product(seen_BLD, self.u(x_BD)[..., None]).squeeze(-1).softmax(-1)

    def open(self, current: Tensor, mixed: Tensor) -> Tensor:
        """What the layer returns between the read without caches and the paper's mixture."""
        return mixed if self.bias is None else current + self.bias.sigmoid() * (mixed - current)


class CachedMixer(Mixer):
    """A mixer with memory caching."""

    gate: SegmentGate

    @abstractmethod
    def reads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gates [B, T, L + 1], the read without caches, the paper's mixture), both reads [B, T, ...]."""

    def init_own_parameters(self, generator: torch.Generator) -> None:
        if self.gate.bias is not None and self.gate.bias_init is not None:
            nn.init.constant_(self.gate.bias, self.gate.bias_init)

    def _caches_seen(self, context: int) -> float:
        """Caches a token sees, averaged over the positions of a sequence."""
        return sum(t // self.gate.segment for t in range(context)) / context

    def _gate_flops_per_token(self, context: int) -> float:
        return 2.0 * (self._caches_seen(context) + 1) * self.gate.d_model


@dataclass
class CachedLinearState:
    """Running memory, the kept memories [B, L, H, E, E] and normalisers [B, L, H, E], and the segment means.

    alone: what the current segment alone has written, where that is what will be kept.
    """

    running: LinearState
    memories: Tensor
    normalizers: Tensor | None
    means: SegmentMeans
    alone: LinearState | None


class _LinearRun(NamedTuple):
    """What a whole sequence leaves behind: its inputs, its memory at the end, and those at segment ends."""

    inputs: LinearInputs
    running: LinearState
    memories: Tensor
    normalizers: Tensor | None


class CachedLinearAttention(CachedMixer):
    """Linear attention that also reads its own memories at the ends of earlier segments."""

    def __init__(self, inner: LinearAttention, d_model: int, config: MemoryCacheConfig) -> None:
        super().__init__()
        if inner.delta_rule and config.normalized_retrieval:
            raise ValueError(
                "normalized_retrieval=True needs the normaliser z, which the delta rule does not have; "
                "choose delta_rule=False or normalized_retrieval=False"
            )
        self.inner, self.config, self.gate = inner, config, SegmentGate(d_model, config)

    def _mix(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor, _LinearRun]:
        i = self.inner.inputs(x_BTD)
        current, running, memories, normalizers = self.inner.read_write_segments(
            i, self.config.segment, self.config.cumulative
        )
        gates_BTL = self.gate(x_BTD)
        read = memory_cache_retrieval(
            i.q,
            memories,
            gates_BTL[..., :-1],
            segment=self.config.segment,
            normalizers=normalizers if self.config.normalized_retrieval else None,
            impl=self.inner.impl,
        )
        mixed = gates_BTL[..., -1, None, None] * current + read
        return gates_BTL, current, mixed, _LinearRun(i, running, memories, normalizers)

    def reads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._mix(x_BTD)[:3]

    def forward(self, x_BTD: Tensor) -> Tensor:
        _, current, mixed = self.reads(x_BTD)
        return self.inner.out(self.gate.open(current, mixed).flatten(-2))

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, CachedLinearState]:
        _, current, mixed, run = self._mix(x_BTD)
        y = self.inner.out(self.gate.open(current, mixed).flatten(-2))
        i, running, memories, normalizers = run
        means = SegmentMeans(x_BTD, self.config.segment, max_steps)
        B, L = memories.shape[:2]
        room = means.means.shape[1] - L
        memories = torch.cat([memories, memories.new_zeros(B, room, *memories.shape[2:])], 1)
        if normalizers is not None:
            normalizers = torch.cat([normalizers, normalizers.new_zeros(B, room, *normalizers.shape[2:])], 1)
        alone = None
        if not self.config.cumulative:
            tail = i.tokens(slice(L * self.config.segment, None))
            alone = self.inner.read_write(tail)[1] if tail.q.shape[1] else _emptied(running)
        return y, CachedLinearState(running, memories, normalizers, means, alone)

    def step(self, x_BD: Tensor, state: CachedLinearState) -> tuple[Tensor, CachedLinearState]:
        i = self.inner.inputs(x_BD)
        gates_BL = self.gate.step(x_BD, state.means)
        seen = gates_BL.shape[1] - 1
        current, state.running = self.inner.read_write_step(i, state.running)
        mixed = gates_BL[:, -1, None, None] * current
        if seen:
            z = state.normalizers if self.config.normalized_retrieval else None
            mixed = mixed + memory_cache_retrieval_step(
                i.q, state.memories[:, :seen], gates_BL[:, :-1], normalizers=None if z is None else z[:, :seen]
            )
        if state.alone is not None:
            state.alone = self.inner.read_write_step(i, state.alone)[1]
        done = state.means.close_segment()
        if done is not None:
            kept = state.running if state.alone is None else state.alone
            state.memories[:, done] = kept.memory
            if state.normalizers is not None and kept.normalizer is not None:
                state.normalizers[:, done] = kept.normalizer
            state.alone = None if state.alone is None else _emptied(state.alone)
        return self.inner.out(self.gate.open(current, mixed).flatten(-2)), state

    def sequence_flops_per_token(self, context: int) -> float:
        per_cache = 2.0 * self.inner.n_heads * self.inner.width * (self.inner.width + 1)
        inner = self.inner.sequence_flops_per_token(context)
        return inner + self._gate_flops_per_token(context) + self._caches_seen(context) * per_cache


def _emptied(state: LinearState) -> LinearState:
    z = state.normalizer
    return LinearState(torch.zeros_like(state.memory), None if z is None else torch.zeros_like(z))


@dataclass
class CachedOutputState:
    """The wrapped mixer's state, its kept outputs [B, L, D] and the segment means."""

    inner: Any
    outputs: Tensor
    means: SegmentMeans


class CachedOutput(CachedMixer):
    """The source study's proxy for mixers whose state is large: caches the outputs at the segments' last tokens.

    A cached output was read by another query than the token's own; it approximates what the state held.
    """

    def __init__(self, inner: Mixer, d_model: int, config: MemoryCacheConfig) -> None:
        super().__init__()
        if config.normalized_retrieval or not config.cumulative:
            raise ValueError(
                f"normalized_retrieval={config.normalized_retrieval}, cumulative={config.cumulative}: cached outputs "
                "have no normaliser and no per-segment form; use linear attention for these options"
            )
        self.inner, self.config, self.gate = inner, config, SegmentGate(d_model, config)

    def _mix(self, x_BTD: Tensor, current_BTD: Tensor) -> tuple[Tensor, Tensor]:
        gates_BTL = self.gate(x_BTD)
        read = _wide_product(gates_BTL[..., :-1], self._kept(current_BTD))
        return gates_BTL, gates_BTL[..., -1:] * current_BTD + read

    def _kept(self, current_BTD: Tensor) -> Tensor:
        return current_BTD[:, self.config.segment - 1 :: self.config.segment]

    def reads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        current = self.inner(x_BTD)
        gates, mixed = self._mix(x_BTD, current)
        return gates, current, mixed

    def forward(self, x_BTD: Tensor) -> Tensor:
        _, current, mixed = self.reads(x_BTD)
        return self.gate.open(current, mixed)

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, CachedOutputState]:
        current, inner = self.inner.prefill(x_BTD, max_steps)
        y, outputs = self.gate.open(current, self._mix(x_BTD, current)[1]), self._kept(current)
        means = SegmentMeans(x_BTD, self.config.segment, max_steps)
        room = outputs.new_zeros(outputs.shape[0], means.means.shape[1] - outputs.shape[1], outputs.shape[2])
        return y, CachedOutputState(inner, torch.cat([outputs, room], 1), means)

    def step(self, x_BD: Tensor, state: CachedOutputState) -> tuple[Tensor, CachedOutputState]:
        current, state.inner = self.inner.step(x_BD, state.inner)
        gates_BL = self.gate.step(x_BD, state.means)
        seen = gates_BL.shape[1] - 1
        read = _wide_product(gates_BL[:, None, :-1], state.outputs[:, :seen]).squeeze(1)
        done = state.means.close_segment()
        if done is not None:
            state.outputs[:, done] = current
        return self.gate.open(current, gates_BL[:, -1:] * current + read), state

    def sequence_flops_per_token(self, context: int) -> float:
        read = 2.0 * self._caches_seen(context) * self.gate.d_model
        return self.inner.sequence_flops_per_token(context) + self._gate_flops_per_token(context) + read
