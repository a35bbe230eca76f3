"""Text conditioning of a decoder: a small encoder over bytes, and cross-attention to what it makes of them.

A text is one start symbol and its UTF-8 bytes. A clip without a text has the start symbol alone, so that it is never
a row without anything to attend to.

Shapes: B batch, S symbols of the longest text of a batch, T steps, W encoder width, D decoder width, H heads, E width
of a head.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cpu.bfloat16 import Linear, attention
from models.mixers.attention import rope_angles, rotate
from models.mixers.base import FusedLinear, RMSNorm, SwiGLU

START, PAD = 256, 257
SYMBOLS = 258


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of the text encoder, and the decoder's blocks (counted from 1, rising) that attend to it.

    max_bytes: longest text, as UTF-8 in Unicode's normal form C.
    """

    width: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_bytes: int
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("width", "n_layers", "n_heads", "d_ff", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"text {name}={getattr(self, name)}; choose {name} >= 1")
        if self.width % (2 * self.n_heads):
            raise ValueError(
                f"text width={self.width} does not split into {self.n_heads} heads of even width (rotary pairs); "
                f"choose a multiple of {2 * self.n_heads}"
            )
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"text blocks={self.blocks} must name one block or more, rising, each once")

    def check_blocks(self, n_layers: int) -> None:
        """Raise ValueError for a block that a decoder of `n_layers` does not have."""
        if self.blocks[0] < 1 or self.blocks[-1] > n_layers:
            raise ValueError(f"text blocks={self.blocks} must lie in 1..n_layers={n_layers}; choose among these")


class Texts(NamedTuple):
    """Texts of a batch: ids_BS (bytes, START, PAD after the end), and length_B in symbols with the start."""

    ids_BS: Tensor
    length_B: Tensor

    def to(self, device: torch.device | str) -> Texts:
        return Texts(self.ids_BS.to(device), self.length_B.to(device))

    def rows(self, chosen: slice) -> Texts:
        """Those of some clips."""
        return Texts(self.ids_BS[chosen], self.length_B[chosen])

    def repeated(self, times: int) -> Texts:
        """Each text `times` times, copies side by side."""
        return Texts(self.ids_BS.repeat_interleave(times, 0), self.length_B.repeat_interleave(times, 0))


def text_bytes(text: str) -> bytes:
    """A text as the encoder reads it: UTF-8 of its normal form C (one spelling of accented letters), case kept."""
    return unicodedata.normalize("NFC", text).encode()


def encode_texts(texts: Sequence[str], max_bytes: int) -> Texts:
    """On the CPU, int64. Raises ValueError for no text at all, or one longer than `max_bytes` bytes."""
    if not texts:
        raise ValueError("no texts were given; give one per clip, an empty one for a clip without")
    coded = [text_bytes(text) for text in texts]
    longest = max(coded, key=len)
    if len(longest) > max_bytes:
        raise ValueError(
            f"a text of {len(longest)} bytes (UTF-8) exceeds max_bytes={max_bytes} of the model; give a shorter one: "
            f"{longest[:40].decode(errors='ignore')!r}..."
        )
    ids_BS = torch.full((len(coded), 1 + len(longest)), PAD)
    ids_BS[:, 0] = START
    for row, data in zip(ids_BS, coded, strict=True):
        row[1 : 1 + len(data)] = torch.tensor(list(data), dtype=torch.int64)
    return Texts(ids_BS, torch.tensor([1 + len(data) for data in coded]))


def no_texts(batch: int, device: torch.device | str) -> Texts:
    """The texts of `batch` clips that have none."""
    return Texts(torch.full((batch, 1), START, device=device), torch.ones(batch, dtype=torch.int64, device=device))


class TextMemory(NamedTuple):
    """What the decoder attends to: encoded symbols hidden_BSW, and visible_B11S, True where a text has not ended."""

    hidden_BSW: Tensor
    visible_B11S: Tensor


class TextKeys(NamedTuple):
    """Keys and values [B, H, S, E] of one block's cross-attention, made once per text."""

    k_BHSE: Tensor
    v_BHSE: Tensor
    visible_B11S: Tensor


class TextAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v over the whole text in both directions, rotary positions, normalised q and k."""

    def __init__(self, width: int, n_heads: int, *, rope_base: float, norm_eps: float) -> None:
        super().__init__()
        self.head_width, self.rope_base = width // n_heads, rope_base
        self.qkv = FusedLinear(width, (width, width, width))
        self.q_norm = RMSNorm(self.head_width, eps=norm_eps)
        self.k_norm = RMSNorm(self.head_width, eps=norm_eps)
        self.out = Linear(width, width, bias=False)

    def forward(self, x_BSW: Tensor, visible_B11S: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in self.qkv(x_BSW))
        cos, sin = rope_angles(x_BSW.shape[1], self.head_width, self.rope_base, x_BSW)
        q, k = (rotate(x, cos, sin).to(v.dtype) for x in (self.q_norm(q), self.k_norm(k)))
        o = attention(q, k, v, attn_mask=visible_B11S)
        return self.out(o.transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: TextConfig, *, rope_base: float, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=norm_eps)
        self.attention = TextAttention(config.width, config.n_heads, rope_base=rope_base, norm_eps=norm_eps)
        self.mlp_norm = RMSNorm(config.width, eps=norm_eps)
        self.mlp = SwiGLU(config.width, config.d_ff)

    def forward(self, x_BSW: Tensor, visible_B11S: Tensor) -> Tensor:
        x_BSW = x_BSW + self.attention(self.attention_norm(x_BSW), visible_B11S)
        return x_BSW + self.mlp(self.mlp_norm(x_BSW))


class TextEncoder(nn.Module):
    """Bytes to a `TextMemory`: embedding, bidirectional blocks, final norm."""

    def __init__(self, config: TextConfig, *, rope_base: float, norm_eps: float) -> None:
        super().__init__()
        self.max_bytes = config.max_bytes
        self.embedding = nn.Parameter(torch.empty(SYMBOLS, config.width))
        self.blocks = nn.ModuleList(
            TextBlock(config, rope_base=rope_base, norm_eps=norm_eps) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.width, eps=norm_eps)

    def forward(self, texts: Texts) -> TextMemory:
        """Raises ValueError for texts longer than max_bytes."""
        S = texts.ids_BS.shape[1]
        if self.max_bytes < S - 1:
            raise ValueError(f"texts of {S - 1} bytes exceed max_bytes={self.max_bytes}; encode shorter ones")
        visible_B11S = (torch.arange(S, device=texts.ids_BS.device) < texts.length_B[:, None])[:, None, None]
        x_BSW = F.embedding(texts.ids_BS, self.embedding)
        for block in self.blocks:
            x_BSW = block(x_BSW, visible_B11S)
        return TextMemory(self.norm(x_BSW), visible_B11S)

    def flops_per_text(self, symbols: int) -> float:
        """Forward floating-point operations of a text of `symbols`, those of the projections included."""
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return symbols * (2 * projections + 4 * symbols * self.embedding.shape[1] * len(self.blocks))


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(E)) v: queries of the decoder, keys and values of the text, both RMS-normalised, no biases.

    It adds no positions: the encoder's are in what it gives.
    """

    def __init__(self, d_model: int, width: int, n_heads: int, *, norm_eps: float) -> None:
        super().__init__()
        self.head_width = d_model // n_heads
        self.q = Linear(d_model, d_model, bias=False)
        self.kv = FusedLinear(width, (d_model, d_model))
        self.q_norm = RMSNorm(self.head_width, eps=norm_eps)
        self.k_norm = RMSNorm(self.head_width, eps=norm_eps)
        self.out = Linear(d_model, d_model, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def keys(self, memory: TextMemory) -> TextKeys:
        """What `forward` needs of the texts."""
        k, v = (self._heads(part) for part in self.kv(memory.hidden_BSW))
        return TextKeys(self.k_norm(k).to(v.dtype), v, memory.visible_B11S)

    def forward(self, x_BTD: Tensor, keys: TextKeys) -> Tensor:
        """[B, T, D] -> [B, T, D]; every step sees the whole text and no other step."""
        q = self.q_norm(self._heads(self.q(x_BTD))).to(keys.v_BHSE.dtype)
        o = attention(q, keys.k_BHSE, keys.v_BHSE, attn_mask=keys.visible_B11S)
        return self.out(o.transpose(1, 2).flatten(2))

    def flops_per_text(self, symbols: int) -> float:
        """Forward floating-point operations of the keys and values of a text of `symbols`."""
        return 2.0 * symbols * self.kv.weight.numel()

    def flops_per_token(self, symbols: int) -> float:
        """Forward floating-point operations of a step that reads a text of `symbols`, projections included."""
        return 2.0 * (self.q.weight.numel() + self.out.weight.numel()) + 4.0 * symbols * self.q.weight.shape[0]
