"""A planted task that only memory of a segment long past can solve: what did the clip begin with?

A clip is `n_segments` segments. Each holds one random symbol in each of K streams, repeated; then comes one query
frame, and one frame that repeats the symbols of the first segment. All else a model can learn is that symbols repeat,
so models differ in the last frame. Linear attention has no positions, and to it all segments look alike but
for their order.

Shapes: K streams, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from data.codec import Codec
from data.codec_shards import Tokens, save_codes


@dataclass(frozen=True, kw_only=True)
class RecallSpec:
    """What a clip is. The symbol `n_symbols` is the query; clip i of a seed is a function of (spec, i)."""

    n_symbols: int = 16
    n_streams: int = 2
    segment: int = 8
    n_segments: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_symbols < 2 or self.n_streams < 1 or self.segment < 1:
            raise ValueError(f"{self}: two symbols, one stream and one frame a segment at least")
        if self.n_segments < 2:
            raise ValueError(f"n_segments={self.n_segments}: the answer would not lie a segment back; choose 2 or more")

    @property
    def n_frames(self) -> int:
        return self.segment * self.n_segments + 2


class Symbols(Codec):
    """The identity as a codec: symbols stand for themselves, one frame a second, and there is no audio."""

    name = "symbols"
    sample_rate = 1
    hop = 1
    weights = "none"
    weights_hash = ""

    def __init__(self, spec: RecallSpec) -> None:
        self.n_codebooks, self.codebook_size = spec.n_streams, spec.n_symbols + 1

    @property
    def caveat(self) -> str:
        return "a planted task of random symbols, made to check the instrument: there is no audio in it"

    def _encode(self, wave_BN: Tensor) -> Tensor:
        raise ValueError("symbols stand for no audio: there is nothing to encode; choose another codec")

    def _decode(self, codes_BKT: Tensor) -> Tensor:
        raise ValueError("symbols stand for no audio: there is nothing to decode; choose sample_s=0")


def recall_clip(spec: RecallSpec, index: int) -> npt.NDArray[np.uint16]:
    """codes_KT of clip `index`."""
    rng = np.random.default_rng([spec.seed, index])
    symbols = rng.integers(spec.n_symbols, size=(spec.n_streams, spec.n_segments))
    query = np.full((spec.n_streams, 1), spec.n_symbols)
    return np.concatenate([symbols.repeat(spec.segment, axis=1), query, symbols[:, :1]], axis=1).astype(np.uint16)


def recall_tokens(spec: RecallSpec, n_clips: int, out: str) -> Tokens:
    """Clips 0..n_clips-1 as a token set in the folder `out`."""
    clips = {f"RECALL{spec.seed:03d}-{i:06d}": recall_clip(spec, i) for i in range(n_clips)}
    return save_codes("recall", Symbols(spec), clips, out)
