"""Distances between two sets of audio in an embedding: Fréchet and kernel, with uncertainty by clip.

Both need many independent clips and depend on the embedder, so every result carries N, the sets' names and the
embedder's. The offline embedder is log-mel statistics: it hears timbre and level, and neither words nor melody.

Shape suffixes: N vectors, M vectors of the other set, D embedding, C clips, E clips of the other set, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from analysis.bootstrap import Interval, count_blocks, percentile_interval

Floats = npt.NDArray[np.float64]
Kernel = Literal["polynomial", "rbf"]


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
    """Turns a mono wave at ``sample_rate`` Hz into x_ND, one vector a window of ``window_s`` that fits."""

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
        """x_ND, one vector a window that fits (D = 2 * n_mels; empty when none does)."""
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


def embed_set(waves: Iterable[npt.ArrayLike], embedder: Embedder, name: str) -> Embeddings:
    """Embeddings of a set of mono clips at the embedder's sample rate; clips shorter than a window are left out."""
    parts = [embedder.embed(wave) for wave in waves]
    kept = [p for p in parts if len(p)]
    if not kept:
        raise ValueError(f"{name}: none of {len(parts)} clips lasts {embedder.window_s} s, the embedder's window")
    clip_N = np.repeat(np.arange(len(kept)), [len(p) for p in kept])
    return Embeddings(name, embedder.name, np.concatenate(kept), clip_N)


@dataclass(frozen=True)
class SetDistance:
    """A distance between two sets with all that is needed to read it.

    ``extrapolated`` is the Fréchet distance at infinite sample size (None for kernel distances); ``caveat`` says
    what makes the number doubtful, or is empty.
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
        limit = "" if self.extrapolated is None else f", at infinite N {self.extrapolated:.4g}"
        return (
            f"{self.metric} {self.value:.4g} [{self.interval.lo:.4g}, {self.interval.hi:.4g}]{limit}: {self.generated} "
            f"(N={self.n_generated}, {self.clips_generated} clips) against {self.reference} (N={self.n_reference}, "
            f"{self.clips_reference} clips), {self.embedder}{'; ' + self.caveat if self.caveat else ''}"
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


def _extrapolate(reference: _ClipMoments, generated: _ClipMoments, rng: np.random.Generator, draws: int) -> float:
    """Intercept at 1/N = 0 of the Fréchet distance of random halves, quarters, ... of both sets of clips.

    Its bias falls as 1/N (Chong & Forsyth 2020, arXiv 1911.07023; Gui et al. 2024, arXiv 2311.01616). Both sets are
    thinned by the same share, so that both their biases are removed.
    """
    shares, values = [], []
    for share in np.linspace(0.35, 1.0, 8):
        n1, n2 = (max(2, round(share * len(m.n_C))) for m in (reference, generated))
        for _ in range(draws if share < 1 else 1):
            weights = []
            for moments, n in ((reference, n1), (generated, n2)):
                weight_C = np.zeros(len(moments.n_C))
                weight_C[rng.choice(len(weight_C), n, replace=False)] = 1
                weights.append(weight_C)
            values.append(frechet_of_gaussians(*reference.gaussian(weights[0]), *generated.gaussian(weights[1])))
            shares.append(share)
    slope_and_limit = np.polyfit(1 / np.array(shares), np.array(values), 1)
    return float(slope_and_limit[1])


def frechet_distance(
    reference: Embeddings,
    generated: Embeddings,
    *,
    n_resamples: int = 300,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 8,
) -> SetDistance:
    """Fréchet (audio) distance with a bootstrap interval by clip and the extrapolation to infinite sample size.

    The estimate at finite N is biased upwards, and a resample is biased once more; the interval is therefore the
    reverse percentile one, [2 d - q_hi, 2 d - q_lo] cut at 0 (Efron & Tibshirani 1993, ch. 13), which takes that
    bias off. ``draws`` subsets of each size serve the extrapolation, whose value may be slightly negative.
    Raises ValueError when the embedders differ.
    """
    _check_pair(reference, generated)
    moments = _ClipMoments(reference), _ClipMoments(generated)
    whole = [m.gaussian(np.ones(len(m.n_C))) for m in moments]
    value = frechet_of_gaussians(*whole[0], *whole[1])
    streams = [
        np.concatenate(list(count_blocks(len(m.n_C), n_resamples, seed=2 * seed + i))) for i, m in enumerate(moments)
    ]
    values_R = np.array(
        [
            frechet_of_gaussians(*moments[0].gaussian(a_C), *moments[1].gaussian(b_C))
            for a_C, b_C in zip(*streams, strict=True)
        ]
    )
    low, high = percentile_interval(values_R, level)
    interval = Interval(max(0.0, 2 * value - high), max(0.0, 2 * value - low))
    limit = _extrapolate(*moments, np.random.default_rng(seed), draws)
    d = reference.x_ND.shape[1]
    fewest = min(len(reference.x_ND), len(generated.x_ND))
    caveat = f"N={fewest} <= D={d}: a covariance is singular, do not compare across N" if fewest <= d else ""
    return _result("Fréchet distance", value, interval, limit, reference, generated, caveat)


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
    n_resamples: int = 2_000,
    level: float = 0.95,
    seed: int = 0,
) -> SetDistance:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3): 0 in expectation for equal laws.

    ``polynomial`` is the kernel inception distance's (x.y/D + 1)^3 (Bińkowski et al. 2018), ``rbf`` a Gaussian of
    the reference's median distance (as in the kernel audio distance, Chung et al. 2025), both on embeddings
    standardised by the reference. Pairs of vectors from the same clip are left out, clips being the independent
    units, and the interval resamples clips. The value may be negative.
    Raises ValueError when the embedders differ or the kernel has another name.
    """
    _check_pair(reference, generated)
    if kernel not in ("polynomial", "rbf"):
        raise ValueError(f"kernel={kernel!r} is neither 'polynomial' nor 'rbf'")
    a, b = _standardised(reference, generated)
    scale = _median_distance(a.x_ND)
    sums = [_kernel_sums(p, q, kernel, scale) for p, q in ((a, a), (b, b), (a, b))]
    sizes = [np.unique(e.clip_N, return_counts=True)[1].astype(np.float64) for e in (a, b)]

    def within(sum_CC: Floats, n_C: Floats, w_RC: Floats) -> Floats:
        off_CC = sum_CC - np.diag(np.diag(sum_CC))  # copies of a clip in a resample are not pairs either
        pairs_CC = np.outer(n_C, n_C) - np.diag(n_C**2)
        return np.einsum("rc,cd,rd->r", w_RC, off_CC, w_RC, optimize=True) / np.einsum(
            "rc,cd,rd->r", w_RC, pairs_CC, w_RC, optimize=True
        )

    def mmd(w_RC: Floats, w_RE: Floats) -> Floats:
        between = np.einsum("rc,ce,re->r", w_RC, sums[2], w_RE, optimize=True) / ((w_RC @ sizes[0]) * (w_RE @ sizes[1]))
        return within(sums[0], sizes[0], w_RC) + within(sums[1], sizes[1], w_RE) - 2 * between

    value = float(mmd(np.ones((1, a.n_clips)), np.ones((1, b.n_clips)))[0])
    streams = [
        np.concatenate(list(count_blocks(e.n_clips, n_resamples, seed=2 * seed + i))) for i, e in enumerate((a, b))
    ]
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of one clip alone has no pair, and no value
        values_R = mmd(streams[0], streams[1])
    caveat = "fewer than 20 clips: the interval is rough" if min(a.n_clips, b.n_clips) < 20 else ""
    metric = f"kernel distance ({kernel})"
    return _result(metric, value, percentile_interval(values_R, level), None, reference, generated, caveat)
