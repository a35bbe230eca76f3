"""Causal attention: rotary positions, normalised queries and keys, grouped keys and values.

Shapes: B batch, T time, D model width, H query heads, h key/value heads, G = H / h, E width of a head, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.cpu.bfloat16 import Linear, attention
from models.mixers.base import FusedLinear, Mixer, RMSNorm


def rope_angles(positions: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [P, E/2] of p * base^(-2i/E) (Su et al. 2021, arXiv 2104.09864).

    Computed in float64, given in the type of `like` but at least float32, on its device.
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    angles = torch.arange(positions, dtype=torch.float64, device=like.device)[:, None] * frequencies
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) of the last axis; cos and sin [..., E/2] broadcast from the left."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class KVCache:
    """Rotated keys and values [B, h, P, E] of which the first `length` positions are filled, and the angles."""

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    length: int


class Attention(Mixer):
    """softmax(q k^T / sqrt(E)) v over the past, with RMS-normalised q and k (one weight [E] each), no biases."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, *, rope_base: float, norm_eps: float) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.width = n_heads, n_kv_heads, d_model // n_heads
        self.rope_base = rope_base
        self.qkv = FusedLinear(d_model, (d_model, n_kv_heads * self.width, n_kv_heads * self.width))
        self.q_norm = RMSNorm(self.width, eps=norm_eps)
        self.k_norm = RMSNorm(self.width, eps=norm_eps)
        self.out = Linear(d_model, d_model, bias=False)

    def _qkv(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in self.qkv(x_BTD))
        return rotate(self.q_norm(q), cos, sin).to(v.dtype), rotate(self.k_norm(k), cos, sin).to(v.dtype), v

    def _attend(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = rope_angles(x_BTD.shape[1], self.width, self.rope_base, x_BTD)
        q, k, v = self._qkv(x_BTD, cos, sin)
        o = attention(q, k, v, is_causal=True, enable_gqa=self.n_heads != self.n_kv_heads)
        return self.out(o.transpose(1, 2).flatten(2)), k, v

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._attend(x_BTD)[0]

    def prefill(self, x_BTD: Tensor, max_steps: int) -> tuple[Tensor, KVCache]:
        y, k, v = self._attend(x_BTD)
        B, T, _ = x_BTD.shape
        shape = (B, self.n_kv_heads, max_steps, self.width)
        cache = KVCache(
            k.new_zeros(shape), v.new_zeros(shape), *rope_angles(max_steps, self.width, self.rope_base, x_BTD), T
        )
        cache.k[:, :, :T], cache.v[:, :, :T] = k, v
        return y, cache

    def step(self, x_BD: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        """Raises ValueError when the cache is full."""
        t = state.length
        if t >= state.k.shape[2]:
            raise ValueError(f"step {t + 1} exceeds the cache of {state.k.shape[2]} steps; prefill with more max_steps")
        q, k, v = self._qkv(x_BD[:, None], state.cos[t], state.sin[t])
        state.k[:, :, t], state.v[:, :, t] = k[:, :, 0], v[:, :, 0]
        # the G queries that share a key head stand where time would: no copy of the cache for each of them
        q_BhGE = q.reshape(-1, self.n_kv_heads, self.n_heads // self.n_kv_heads, self.width)
        o = attention(q_BhGE, state.k[:, :, : t + 1], state.v[:, :, : t + 1])
        state.length = t + 1
        return self.out(o.reshape(x_BD.shape)), state

    def sequence_flops_per_token(self, context: int) -> float:
        seen = (context + 1) / 2
        return 4 * seen * self.n_heads * self.width
