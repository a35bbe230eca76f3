"""What a codec language model knows: likelihood and accuracy by codebook, bits per second, long-range coherence.

Shape suffixes: B clips added at once, K codebooks, T frames, C clips in all, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.bootstrap import Interval
from analysis.crossed import ratio_influence, units_mean

Floats = npt.NDArray[np.float64]
_SUMS = ("nll", "uniform", "count", "top1", "top5")


@dataclass
class CodebookScores:
    """Streaming scores of a model on held-out clips; any batching of the same clips gives the same numbers.

    Per-clip sums are kept: frames of one clip are not independent, nor are clips of one recording.
    """

    n_codebooks: int
    _rows: list[dict[str, Floats]] = field(default_factory=list)
    _recordings: list[str] = field(default_factory=list)

    def add(self, sums: Mapping[str, npt.ArrayLike], recordings: Sequence[str] = ()) -> None:
        """Add sums [B, K] over each clip's tokens, named nll, uniform, count, top1, top5; see `models.codec.loss`.

        recordings: which recording each clip was cut from; without them each clip counts as a recording of its own.
        Raises ValueError for another shape, or another number of recordings.
        """
        arrays = {name: np.atleast_2d(np.asarray(sums[name], dtype=np.float64)) for name in _SUMS}
        shapes = {a.shape for a in arrays.values()}
        if len(shapes) != 1 or next(iter(shapes))[1] != self.n_codebooks:
            raise ValueError(f"sums have shapes {sorted(shapes)}, expected [B, {self.n_codebooks}] for all of {_SUMS}")
        n_clips = next(iter(shapes))[0]
        if recordings and len(recordings) != n_clips:
            raise ValueError(f"{len(recordings)} recordings for {n_clips} clips; give one for each")
        seen = len(self._recordings)
        self._recordings += recordings or [f"clip {seen + i}" for i in range(n_clips)]
        self._rows.append(arrays)

    def _sums(self, name: str) -> Floats:
        if not self._rows:
            raise ValueError("no clip was added; add() its sums first")
        return np.concatenate([row[name] for row in self._rows])

    def val_nll(self) -> float:
        """True mean negative log-likelihood, nats per token."""
        return float(self._sums("nll").sum() / self._sums("count").sum())

    def val_loss_smoothed(self, label_smoothing: float = 0.1) -> float:
        """Label-smoothed loss, the published convention; its exponential is not a perplexity."""
        mixed = (1 - label_smoothing) * self._sums("nll").sum() + label_smoothing * self._sums("uniform").sum()
        return float(mixed / self._sums("count").sum())

    def perplexity(self) -> float:
        """exp(val_nll), a token."""
        return math.exp(self.val_nll())

    def bits_per_second(self, frame_rate_hz: float) -> float:
        """Code length of a second of audio: the sum over codebooks of bits per token, times the frame rate in Hz."""
        nats_K = self._sums("nll").sum(0) / self._sums("count").sum(0)
        return float(nats_K.sum() / math.log(2) * frame_rate_hz)

    def val_nll_ci(self) -> Interval:
        """95% limits of val_nll of this trained model for other recordings (t interval); NaN for one recording."""
        sums = pd.DataFrame({"nll": self._sums("nll").sum(1), "tokens": self._sums("count").sum(1)})
        sums = sums.groupby(self._recordings).sum()
        found = units_mean(ratio_influence(sums["nll"], sums["tokens"])[0])
        return Interval(found.lo, found.hi)

    def clips(self) -> pd.DataFrame:
        """One row per clip, in the order added: nll (sum over its tokens, nats) and tokens."""
        tokens = self._sums("count").sum(1).astype(np.int64)
        return pd.DataFrame({"nll": self._sums("nll").sum(1), "tokens": tokens})

    def table(self) -> pd.DataFrame:
        """One row per codebook (1 is the coarsest): tokens, nll (nats), perplexity, bits, top1, top5 (shares)."""
        count_K = self._sums("count").sum(0)
        nll_K = self._sums("nll").sum(0) / count_K
        return pd.DataFrame(
            {
                "codebook": np.arange(1, self.n_codebooks + 1),
                "tokens": count_K.astype(np.int64),
                "nll": nll_K,
                "perplexity": np.exp(nll_K),
                "bits": nll_K / math.log(2),
                "top1": self._sums("top1").sum(0) / count_K,
                "top5": self._sums("top5").sum(0) / count_K,
            }
        )


def code_histograms(
    codes_KT: npt.ArrayLike, frame_rate_hz: float, codebook_size: int, *, window_s: float = 4.0, hop_s: float = 2.0
) -> Floats:
    """histogram_WKV: how often each code of each codebook occurs in each window that fits the clip.

    Raises ValueError for codes outside the codebook or a window or hop shorter than a frame.
    """
    codes = np.asarray(codes_KT, dtype=np.int64)
    if codes.ndim != 2 or codes.size == 0:
        raise ValueError(f"codes have shape {codes.shape}, expected [K, T]")
    if codes.min() < 0 or codes.max() >= codebook_size:
        worst = codes.max() if codes.max() >= codebook_size else codes.min()
        raise ValueError(f"code {worst} is outside the codebook of {codebook_size}; remove special tokens first")
    width, hop = round(window_s * frame_rate_hz), round(hop_s * frame_rate_hz)
    if width < 1 or hop < 1:
        raise ValueError(f"window_s={window_s} and hop_s={hop_s} must hold a frame at {frame_rate_hz} Hz")
    K, T = codes.shape
    starts = range(0, T - width + 1, hop)
    shifted_KT = codes + np.arange(K)[:, None] * codebook_size
    counts = [np.bincount(shifted_KT[:, a : a + width].ravel(), minlength=K * codebook_size) for a in starts]
    return np.array(counts, dtype=np.float64).reshape(len(counts), K, codebook_size)


def coherence(
    codes_KT: npt.ArrayLike, frame_rate_hz: float, codebook_size: int, *, window_s: float = 4.0, hop_s: float = 2.0
) -> float:
    """Long-range coherence of one clip, in [0, 1]: do distant parts use the same codes as often?

    The mean, over codebooks and over pairs of windows that share no frame, of the cosine between their code
    histograms. High for one voice or one piece throughout; for stationary noise it only measures how peaked the
    code distribution is, so compare a model's samples with real audio of the same length and codec.
    NaN when the clip is too short for two windows without overlap (8 s at the defaults).
    """
    histogram_WKV = code_histograms(codes_KT, frame_rate_hz, codebook_size, window_s=window_s, hop_s=hop_s)
    apart = -(-round(window_s * frame_rate_hz) // round(hop_s * frame_rate_hz))
    first, second = np.triu_indices(len(histogram_WKV), k=apart)
    if len(first) == 0:
        return float("nan")
    unit_WKV = histogram_WKV / np.linalg.norm(histogram_WKV, axis=2, keepdims=True)
    return float((unit_WKV[first] * unit_WKV[second]).sum(2).mean())
