"""Distances between two sets of audio in an embedding: Fréchet and kernel, with a jackknife over clips.

A clip of a set is what is independent in it: one sample of a model, or all clips cut from one recording.

Both need many independent clips and depend on the embedder, so every result carries N, the sets' names and the
embedder's. The offline embedder is log-mel statistics: it hears timbre and level, and neither words nor melody.

Shape suffixes: N vectors, M vectors of the other set, D embedding, C clips, E clips of the other set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from analysis.bootstrap import Interval
from analysis.crossed import banerjee

Floats = npt.NDArray[np.float64]
Kernel = Literal["polynomial", "rbf"]
_NO_KERNEL_INTERVAL = "no interval: none that was tried covers where the sets differ in spread"
LEAST_CLIPS = 12  # of each set for an interval; simulated down to there (docs/calibration.md)


@dataclass(frozen=True)
class Embeddings:
    """x_ND of one set of audio, the clip each vector came from (0..C-1), and what they are called."""

    name: str
    embedder: str
    x_ND: Floats
    clip_N: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.x_ND.ndim != 2 or len(self.x_ND) != len(self.clip_N):
            raise ValueError(f"{self.name}: x {self.x_ND.shape} and clip {self.clip_N.shape} are not [N, D] and [N]")
        if not np.isfinite(self.x_ND).all():
            raise ValueError(f"{self.name}: embeddings hold NaN or infinite values; drop those clips")
        if self.n_clips < 2:
            raise ValueError(f"{self.name}: {self.n_clips} clip cannot be resampled; give at least 2")

    @property
    def n_clips(self) -> int:
        return len(np.unique(self.clip_N))


class Embedder(Protocol):
    """Turns a mono wave at ``sample_rate`` Hz into x_ND, one vector per window of ``window_s`` that fits."""

    @property
    def name(self) -> str: ...

    @property
    def sample_rate(self) -> int: ...

    @property
    def window_s(self) -> float: ...

    def embed(self, wave_N: npt.ArrayLike) -> Floats: ...


@dataclass(frozen=True)
class LogMelStatistics:
    """Offline embedder: mean and standard deviation over each window of the log-mel spectrum, D = 2 * n_mels.

    Waves in [-1, 1]; amplitudes below ``floor_db`` under full scale count as silence. 32 ms frames, half overlapped.
    """

    sample_rate: int
    n_mels: int = 32
    window_s: float = 1.0
    hop_s: float = 0.5
    floor_db: float = -70.0

    @property
    def name(self) -> str:
        return f"log-mel statistics ({self.n_mels} bands, mean and sd over {self.window_s:g} s, {self.sample_rate} Hz)"

    def embed(self, wave_N: npt.ArrayLike) -> Floats:
        """x_ND, one vector per window that fits (D = 2 * n_mels; empty when none does)."""
        from torchaudio.transforms import MelSpectrogram

        wave = torch.as_tensor(np.asarray(wave_N), dtype=torch.float32)
        if wave.dim() != 1:
            raise ValueError(f"wave has shape {tuple(wave.shape)}, expected [N] of one mono clip")
        n_fft = 2 ** round(math.log2(0.032 * self.sample_rate))
        if len(wave) < round(self.window_s * self.sample_rate):
            return np.zeros((0, 2 * self.n_mels))
        mel = MelSpectrogram(self.sample_rate, n_fft=n_fft, hop_length=n_fft // 2, n_mels=self.n_mels, power=2.0)
        floor = (n_fft / 4) ** 2 * 10 ** (self.floor_db / 10)
        decibels_MT = 10 * torch.log10(mel(wave).clamp_min(floor)).double()
        rate = self.sample_rate / (n_fft // 2)
        width, hop = max(2, int(self.window_s * rate)), max(1, int(self.hop_s * rate))
        windows = decibels_MT.unfold(1, width, hop)
        return torch.cat([windows.mean(2), windows.std(2)]).T.numpy()


def embed_set(
    waves: Iterable[npt.ArrayLike], embedder: Embedder, name: str, recordings: Sequence[str] | None = None
) -> Embeddings:
    """Embeddings of a set of mono clips at the embedder's sample rate; clips shorter than a window are left out.

    recordings: which recording each clip was cut from. Those of one recording count as one clip of the set.
    """
    parts = [embedder.embed(wave) for wave in waves]
    whose = list(range(len(parts))) if recordings is None else np.unique(recordings, return_inverse=True)[1].tolist()
    kept = [(p, r) for p, r in zip(parts, whose, strict=True) if len(p)]
    if not kept:
        raise ValueError(f"{name}: none of {len(parts)} clips lasts {embedder.window_s} s, the embedder's window")
    of_part = np.unique([r for _, r in kept], return_inverse=True)[1]
    clip_N = np.repeat(of_part, [len(p) for p, _ in kept])
    return Embeddings(name, embedder.name, np.concatenate([p for p, _ in kept]), clip_N)


@dataclass(frozen=True)
class SetDistance:
    """A distance between two sets with all that is needed to read it.

    ``extrapolated`` is the Fréchet distance without the bias of a finite sample (None for kernel distances, which have
    none); the 95% ``interval`` is for that one, NaN where there is none; ``caveat`` says what makes the number doubtful
    or why there is no interval, or is empty.
    """

    metric: str
    value: float
    interval: Interval
    extrapolated: float | None
    reference: str
    generated: str
    embedder: str
    n_reference: int
    n_generated: int
    clips_reference: int
    clips_generated: int
    caveat: str

    def __str__(self) -> str:
        ends = f"[{self.interval.lo:.4g}, {self.interval.hi:.4g}]" if math.isfinite(self.interval.lo) else "[–]"
        limit = "" if self.extrapolated is None else f"; at infinite N {self.extrapolated:.4g}"
        return (
            f"{self.metric} {self.value:.4g}{limit} {ends}: {self.generated} (N={self.n_generated}, "
            f"{self.clips_generated} clips) against {self.reference} (N={self.n_reference}, {self.clips_reference} "
            f"clips), {self.embedder}{'; ' + self.caveat if self.caveat else ''}"
        )


def frechet_of_gaussians(mean1_D: Floats, cov1_DD: Floats, mean2_D: Floats, cov2_DD: Floats) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^{1/2} C2 C1^{1/2})^{1/2}), Dowson & Landau (1982), by symmetric eigenvalues.

    Unlike a general matrix square root this stays real and non-negative for singular covariances.
    """
    values, vectors = np.linalg.eigh(cov1_DD)
    root_DD = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root_DD @ cov2_DD @ root_DD)
    cross = np.sqrt(np.clip(inner, 0, None)).sum()
    return float(max(0.0, ((mean1_D - mean2_D) ** 2).sum() + np.trace(cov1_DD) + np.trace(cov2_DD) - 2 * cross))


class _ClipMoments:
    """Sums by clip, so that the mean and covariance of any resample of clips is one weighted sum."""

    def __init__(self, embeddings: Embeddings) -> None:
        x_ND, (_, clip_N) = embeddings.x_ND, np.unique(embeddings.clip_N, return_inverse=True)
        self.shift_D = x_ND.mean(0)
        centred = x_ND - self.shift_D
        n_clips, d = embeddings.n_clips, x_ND.shape[1]
        self.n_C = np.bincount(clip_N, minlength=n_clips).astype(np.float64)
        self.sum_CD = np.zeros((n_clips, d))
        np.add.at(self.sum_CD, clip_N, centred)
        self.outer_CDD = np.zeros((n_clips, d, d))
        for clip in range(n_clips):
            rows = centred[clip_N == clip]
            self.outer_CDD[clip] = rows.T @ rows

    def gaussian(self, weight_C: Floats) -> tuple[Floats, Floats]:
        """Mean and unbiased covariance of the vectors, each clip counted ``weight_C`` times."""
        n = float(weight_C @ self.n_C)
        mean_D = weight_C @ self.sum_CD / n
        outer_DD = np.tensordot(weight_C, self.outer_CDD, axes=1)
        cov_DD = (outer_DD - n * np.outer(mean_D, mean_D)) / max(n - 1, 1)
        return mean_D + self.shift_D, (cov_DD + cov_DD.T) / 2


def _check_pair(reference: Embeddings, generated: Embeddings) -> None:
    if reference.embedder != generated.embedder or reference.x_ND.shape[1] != generated.x_ND.shape[1]:
        raise ValueError(
            f"{reference.name} is embedded by {reference.embedder} (D={reference.x_ND.shape[1]}), {generated.name} by "
            f"{generated.embedder} (D={generated.x_ND.shape[1]}); use one embedder for both"
        )


def _result(
    metric: str, value: float, interval: Interval, extrapolated: float | None, a: Embeddings, b: Embeddings, caveat: str
) -> SetDistance:
    return SetDistance(
        metric, value, interval, extrapolated, a.name, b.name, a.embedder,
        len(a.x_ND), len(b.x_ND), a.n_clips, b.n_clips, caveat,
    )  # fmt: skip


def _jackknife(value: float, without: Sequence[Floats]) -> tuple[float, Interval]:
    """(value without its bias, 95% interval around it) from the values without each clip of each of the two sets.

    The jackknife takes off the bias of order 1/N (Quenouille 1956; Efron & Tibshirani 1993, ch. 11). The variances of
    the two sets add up, each with its own t quantile (`analysis.crossed.banerjee`). No interval for fewer than
    LEAST_CLIPS clips of a set.
    """
    corrected, variance, df = value, [], []
    for without_C in without:
        n = len(without_C)
        corrected += (n - 1) * (value - float(without_C.mean()))
        variance.append((n - 1) / n * float(((without_C - without_C.mean()) ** 2).sum()))
        df.append(n - 1)
    half = float(banerjee([corrected], [variance], [df])[0][0])
    if min(df) + 1 < LEAST_CLIPS:
        half = math.nan
    return corrected, Interval(corrected - half, corrected + half)


def frechet_distance(reference: Embeddings, generated: Embeddings) -> SetDistance:
    """Fréchet (audio) distance, the same without the bias of a finite sample, and the latter's interval (cut at 0).

    The estimate at finite N is biased upwards, by about 1/N (Chong & Forsyth 2020, arXiv 1911.07023); the jackknife
    over the clips of both sets takes that off, so that the corrected value may be slightly negative. No interval where
    the sets have no more vectors than dimensions, or fewer than LEAST_CLIPS clips.
    Raises ValueError when the embedders differ.
    """
    _check_pair(reference, generated)
    moments = _ClipMoments(reference), _ClipMoments(generated)
    whole = [m.gaussian(np.ones(len(m.n_C))) for m in moments]
    value = frechet_of_gaussians(*whole[0], *whole[1])
    without = []
    for side, m in enumerate(moments):
        weight_CC = 1 - np.eye(len(m.n_C))
        sets = [(m.gaussian(w), whole[1]) if side == 0 else (whole[0], m.gaussian(w)) for w in weight_CC]
        without.append(np.array([frechet_of_gaussians(*a, *b) for a, b in sets]))
    corrected, interval = _jackknife(value, without)
    d, fewest = reference.x_ND.shape[1], min(len(reference.x_ND), len(generated.x_ND))
    clips = min(reference.n_clips, generated.n_clips)
    caveat = f"{clips} clips: no interval for fewer than {LEAST_CLIPS}" if clips < LEAST_CLIPS else ""
    if fewest <= d:
        caveat = f"N={fewest} <= D={d}: a covariance is singular, no interval, do not compare across N"
        interval = Interval(math.nan, math.nan)
    interval = Interval(*(max(0.0, end) if math.isfinite(end) else end for end in interval))
    return _result("Fréchet distance", value, interval, corrected, reference, generated, caveat)


def _kernel_sums(a: Embeddings, b: Embeddings, kernel: Kernel, scale: float) -> Floats:
    """Kernel summed over the vectors of each pair of clips, [C, E]."""
    d = a.x_ND.shape[1]
    _, clip_a = np.unique(a.clip_N, return_inverse=True)
    _, clip_b = np.unique(b.clip_N, return_inverse=True)
    if kernel == "polynomial":
        k_NM = (a.x_ND @ b.x_ND.T / d + 1.0) ** 3
    else:
        square_NM = (a.x_ND**2).sum(1)[:, None] + (b.x_ND**2).sum(1) - 2 * a.x_ND @ b.x_ND.T
        k_NM = np.exp(-np.clip(square_NM, 0, None) / (2 * scale**2))
    rows_CM = np.zeros((a.n_clips, k_NM.shape[1]))
    np.add.at(rows_CM, clip_a, k_NM)
    sums_EC = np.zeros((b.n_clips, a.n_clips))
    np.add.at(sums_EC, clip_b, rows_CM.T)
    return sums_EC.T


def _standardised(reference: Embeddings, generated: Embeddings) -> tuple[Embeddings, Embeddings]:
    """Both sets in units of the reference's mean and standard deviation, so that the kernel has a scale."""
    mean_D, sd_D = reference.x_ND.mean(0), reference.x_ND.std(0)
    sd_D = np.where(sd_D > 1e-9, sd_D, 1.0)
    pair = [Embeddings(e.name, e.embedder, (e.x_ND - mean_D) / sd_D, e.clip_N) for e in (reference, generated)]
    return pair[0], pair[1]


def _median_distance(x_ND: Floats, limit: int = 1_000) -> float:
    some = x_ND[np.linspace(0, len(x_ND) - 1, min(limit, len(x_ND))).astype(int)]
    square = (some**2).sum(1)[:, None] + (some**2).sum(1) - 2 * some @ some.T
    upper = np.sqrt(np.clip(square[np.triu_indices(len(some), k=1)], 0, None))
    return float(np.median(upper)) or 1.0


def kernel_distance(
    reference: Embeddings,
    generated: Embeddings,
    *,
    kernel: Kernel = "polynomial",
) -> SetDistance:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3): 0 in expectation for equal laws.

    ``polynomial`` is the kernel inception distance's (x.y/D + 1)^3 (Bińkowski et al. 2018), ``rbf`` a Gaussian of
    the reference's median distance (as in the kernel audio distance, Chung et al. 2025), both on embeddings
    standardised by the reference. Pairs of vectors from the same clip are left out, clips being the independent
    units. The value may be negative. It has no interval: the scale is that of this reference, and neither
    resampling nor leaving out clips knows the error of that (simulated: 95% intervals cover 85 to 90%).
    Raises ValueError when the embedders differ or the kernel has another name.
    """
    _check_pair(reference, generated)
    if kernel not in ("polynomial", "rbf"):
        raise ValueError(f"kernel={kernel!r} is neither 'polynomial' nor 'rbf'")
    a, b = _standardised(reference, generated)
    scale = _median_distance(a.x_ND)
    sums = [_kernel_sums(p, q, kernel, scale) for p, q in ((a, a), (b, b), (a, b))]
    sizes = [np.unique(e.clip_N, return_counts=True)[1].astype(np.float64) for e in (a, b)]

    within = [
        float((some.sum() - np.trace(some)) / (n_C.sum() ** 2 - (n_C**2).sum()))
        for some, n_C in zip(sums[:2], sizes, strict=True)
    ]
    value = sum(within) - 2 * float(sums[2].sum() / (sizes[0].sum() * sizes[1].sum()))
    nothing = Interval(math.nan, math.nan)
    return _result(f"kernel distance ({kernel})", value, nothing, None, reference, generated, _NO_KERNEL_INTERVAL)
