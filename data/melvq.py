"""melvq: a small codec trained on the user's own audio in minutes. A stand-in, not a peer of EnCodec or DAC.

A frame is the log-mel spectrum of a Hann window of four hops; its code is a chain of K nearest centroids, each of
what the ones before left over (residual vector quantisation, Juang & Gray 1982), the centroids found by mini-batch
k-means. Decoding sums the centroids, spreads the mel bands over the linear spectrum by multiplicative non-negative
least squares (Lee & Seung 2001) and finds a phase by fast Griffin-Lim (Perraudin, Balazs & Sondergaard 2013). The
phase of the original is discarded, so a waveform signal-to-noise ratio is meaningless here: compare spectra.

Shape suffixes: B clips, N samples, T frames, M mel bands, F linear bins, K codebooks, V centroids of a codebook.
"""

from __future__ import annotations

import math
import time
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.split import identity_hash

_INVERSION_STEPS = 30
_GRIFFIN_LIM_STEPS = 32
_MOMENTUM = 0.99
_ENCODE_ROWS = 8192
# what numpy and zipfile raise for a damaged or foreign file, besides OSError
_NPZ_ERRORS = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class MelVQSpec:
    """What a melvq is, before training. Frame rate = sample_rate / hop; bits per second = frame rate * K * log2 V.

    Args:
        sample_rate: Hz.
        hop: samples a frame; the window has 4 hops.
        n_mels: M, mel bands between ``f_min`` Hz and the Nyquist frequency.
        n_codebooks, codebook_size: K and V.
        floor_db: level below full scale under which a band counts as silent.
    """

    sample_rate: int = 16_000
    hop: int = 256
    n_mels: int = 80
    f_min: float = 40.0
    n_codebooks: int = 8
    codebook_size: int = 1024
    floor_db: float = -70.0

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.hop, self.n_mels, self.n_codebooks) < 1:
            raise ValueError(f"{self}: sample_rate, hop, n_mels and n_codebooks must be positive")
        if not 2 <= self.codebook_size <= 65_536:
            raise ValueError(f"codebook_size={self.codebook_size} must lie in 2..65536 to fit uint16 codes")
        if self.n_mels > 2 * self.hop:
            raise ValueError(f"n_mels={self.n_mels} exceeds the {2 * self.hop} bins of a window of 4 * hop={self.hop}")

    @property
    def n_fft(self) -> int:
        return 4 * self.hop


def _mel_filters(spec: MelVQSpec) -> Tensor:
    import librosa

    filters = librosa.filters.mel(sr=spec.sample_rate, n_fft=spec.n_fft, n_mels=spec.n_mels, fmin=spec.f_min, norm=None)
    weights_MF = torch.from_numpy(np.asarray(filters, dtype=np.float32))
    empty = (weights_MF.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mel bands {empty} hold no bin at n_mels={spec.n_mels}, hop={spec.hop}; use fewer bands")
    return weights_MF


class MelVQ:
    """A trained melvq: analysis, codes and synthesis. Everything runs on the CPU in float32."""

    def __init__(self, spec: MelVQSpec, mean_M: Tensor, centroids_KVM: Tensor) -> None:
        expected = (spec.n_codebooks, spec.codebook_size, spec.n_mels)
        if tuple(centroids_KVM.shape) != expected or tuple(mean_M.shape) != (spec.n_mels,):
            raise ValueError(f"centroids {tuple(centroids_KVM.shape)} and mean {tuple(mean_M.shape)}, not {expected}")
        self.spec = spec
        self.mean_M = mean_M.float()
        self.centroids_KVM = centroids_KVM.float()
        self._filters_MF = _mel_filters(spec)
        self._window = torch.hann_window(spec.n_fft)

    def frames(self, n_samples: int) -> int:
        """T of a wave of n samples: ceil(n / hop)."""
        return -(-n_samples // self.spec.hop)

    def log_mel(self, wave_BN: Tensor) -> Tensor:
        """Log amplitude (nats) of each mel band: logmel_BTM, T = ceil(N / hop), frame t centred at sample t * hop."""
        spec = self.spec
        n = wave_BN.shape[-1]
        padded = torch.nn.functional.pad(wave_BN.float(), (spec.n_fft // 2, spec.n_fft // 2 + spec.hop))
        spectrum = torch.stft(padded, spec.n_fft, spec.hop, window=self._window, center=False, return_complex=True)
        power_BFT = spectrum.abs().square()[..., : self.frames(n)]
        full_scale = (spec.n_fft / 4) ** 2  # |STFT|^2 of a full-scale sine under a Hann window
        floor = full_scale * 10 ** (spec.floor_db / 10)
        return 0.5 * torch.log((self._filters_MF @ power_BFT).clamp_min(floor)).transpose(1, 2)

    def quantise(self, logmel_RM: Tensor) -> Tensor:
        """codes_RK int64 of frames: greedily the nearest centroid of each codebook's residual."""
        return torch.cat([self._quantise_block(rows) for rows in logmel_RM.split(_ENCODE_ROWS)])

    def _quantise_block(self, logmel_RM: Tensor) -> Tensor:
        residual_RM = logmel_RM - self.mean_M
        codes = []
        for centroids_VM in self.centroids_KVM:
            score_RV = residual_RM @ centroids_VM.T - 0.5 * centroids_VM.square().sum(1)
            code_R = score_RV.argmax(1)
            residual_RM = residual_RM - centroids_VM[code_R]
            codes.append(code_R)
        return torch.stack(codes, dim=1)

    def dequantise(self, codes_RK: Tensor, n_codebooks: int | None = None) -> Tensor:
        """logmel_RM of codes, from the first ``n_codebooks`` of them only when given."""
        logmel_RM = self.mean_M.expand(len(codes_RK), -1).clone()
        for k in range(n_codebooks or self.spec.n_codebooks):
            logmel_RM += self.centroids_KVM[k][codes_RK[:, k]]
        return logmel_RM

    def linear_power(self, logmel_TM: Tensor) -> Tensor:
        """power_FT >= 0 whose mel bands are close to exp(2 logmel)."""
        mel_MT = torch.exp(2 * logmel_TM).T
        filters_MF = self._filters_MF
        power_FT = filters_MF.T @ (mel_MT / filters_MF.sum(1, keepdim=True)) + 1e-12
        target_FT = filters_MF.T @ mel_MT
        for _ in range(_INVERSION_STEPS):
            power_FT = power_FT * target_FT / (filters_MF.T @ (filters_MF @ power_FT) + 1e-12)
        return power_FT

    def synthesise(self, logmel_TM: Tensor, seed: int = 0) -> Tensor:
        """wave_N with N = T * hop; ``seed`` draws Griffin-Lim's first phase, so that the result is repeatable."""
        from torchaudio.functional import griffinlim

        spec = self.spec
        n_frames = len(logmel_TM)
        padded = max(n_frames, 4) + 1  # each iteration analyses its own output, whose last frame is centred at its end
        power_FT = torch.nn.functional.pad(self.linear_power(logmel_TM), (0, padded - n_frames), mode="replicate")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wave_N = griffinlim(
                power_FT, self._window, spec.n_fft, spec.hop, spec.n_fft, 2.0, _GRIFFIN_LIM_STEPS, _MOMENTUM,
                (padded - 1) * spec.hop, True,
            )  # fmt: skip
        return wave_N[: n_frames * spec.hop]

    def save(self, path: str | Path) -> Path:
        """Write spec and centroids as .npz, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{identity_hash(str(time.time_ns())):x}.npz")
        try:
            np.savez(aside, mean=self.mean_M.numpy(), centroids=self.centroids_KVM.numpy(), **asdict(self.spec))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> MelVQ:
        """Read what `save` wrote; raises ValueError for another kind of file or a damaged one."""
        try:
            return cls._load(path)
        except (*_NPZ_ERRORS, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path} is not a melvq, or is damaged ({e}); make one with data.melvq.train") from e

    @classmethod
    def _load(cls, path: str | Path) -> MelVQ:
        with np.load(path, allow_pickle=False) as stored:
            names = set(MelVQSpec.__dataclass_fields__)
            if not names | {"mean", "centroids"} <= set(stored.files):
                raise ValueError(f"{path} holds {sorted(stored.files)}, not a melvq; make one with data.melvq.train")
            spec = MelVQSpec(**{n: stored[n].item() for n in names})
            return cls(spec, torch.from_numpy(stored["mean"]), torch.from_numpy(stored["centroids"]))


@dataclass(frozen=True)
class TrainReport:
    """How training went: frames seen and used, root-mean-square log-mel error in dB after 1..K codebooks, seconds."""

    n_frames: int
    n_used: int
    error_db_K: tuple[float, ...]
    wall_s: float


def train(
    waves: Iterable[npt.NDArray[np.float32]],
    spec: MelVQSpec,
    *,
    seed: int = 0,
    max_frames: int = 60_000,
    epochs: int = 4,
) -> tuple[MelVQ, TrainReport]:
    """Fit a melvq's centroids to mono waves at ``spec.sample_rate`` Hz.

    Args:
        waves: clips wave_N; pass training clips only.
        seed: of the frames drawn and of the initial centroids; the same seed and waves give the same codec.
        max_frames: frames drawn without replacement when there are more.
        epochs: passes of mini-batch k-means over the frames, for each codebook.
    Raises:
        ValueError: no more frames than centroids, or samples that are not finite.
    """
    started = time.perf_counter()
    all_frames_RM = _log_mel_frames(waves, spec)
    frames_RM = all_frames_RM
    if len(frames_RM) > max_frames:
        chosen = np.random.default_rng(seed).choice(len(frames_RM), max_frames, replace=False)
        frames_RM = frames_RM[np.sort(chosen)]
    mean_M = frames_RM.mean(0)
    centroids_KVM, errors = _residual_centroids((frames_RM - mean_M).numpy(), spec, epochs, seed)
    report = TrainReport(len(all_frames_RM), len(frames_RM), errors, time.perf_counter() - started)
    return MelVQ(spec, mean_M, centroids_KVM), report


def _log_mel_frames(waves: Iterable[npt.NDArray[np.float32]], spec: MelVQSpec) -> Tensor:
    """Every frame of the clips, [R, M]; raises ValueError where they cannot train the codebooks."""
    empty = MelVQ(spec, torch.zeros(spec.n_mels), torch.zeros(spec.n_codebooks, spec.codebook_size, spec.n_mels))
    parts = [empty.log_mel(torch.from_numpy(np.asarray(w, dtype=np.float32))[None])[0] for w in waves if len(w)]
    frames_RM = torch.cat(parts) if parts else torch.zeros(0, spec.n_mels)
    if len(frames_RM) <= spec.codebook_size:
        raise ValueError(
            f"{len(frames_RM)} frames cannot train codebook_size={spec.codebook_size} centroids; "
            "give more audio (minutes) or fewer centroids"
        )
    if not bool(torch.isfinite(frames_RM).all()):
        raise ValueError("a training wave holds NaN or infinite samples; read it with data.audio_io, which skips those")
    return frames_RM


def _residual_centroids(
    residual_RM: npt.NDArray[np.float32], spec: MelVQSpec, epochs: int, seed: int
) -> tuple[Tensor, tuple[float, ...]]:
    """Each codebook is fitted to what the ones before it leave over; ([K, V, M], RMS error in dB after each)."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    centroids: list[Tensor] = []
    errors: list[float] = []
    with threadpool_limits(limits=1):  # sums in another order would be another codec
        for k in range(spec.n_codebooks):
            means = MiniBatchKMeans(
                spec.codebook_size, init="random", n_init=1, batch_size=4096, max_iter=epochs, random_state=seed + k
            ).fit(residual_RM)
            found_VM = means.cluster_centers_.astype(np.float32)
            residual_RM = residual_RM - found_VM[means.predict(residual_RM)]
            centroids.append(torch.from_numpy(found_VM))
            errors.append(float(np.sqrt(np.mean(residual_RM**2))) * 20 / math.log(10))
    return torch.stack(centroids), tuple(errors)
