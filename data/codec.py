"""Waveform to tokens and back: EnCodec, DAC and the stand-in melvq with one interface.

A codec maps one channel at its own sample rate to K parallel streams of integers (residual vector quantisation),
one column every ``hop`` samples. The real codecs are the packages' own models with the packages' own weights, a
given file, or random weights, which exercise the path and are named as random everywhere.

Shape suffixes: B clips, N samples, K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.melvq import MelVQ

RANDOM = "random"

Codes = npt.NDArray[np.uint16]
Waves = npt.NDArray[np.float32]


class MissingCodecWeights(RuntimeError):
    """A codec's weights are neither on this machine nor can they be downloaded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"no weights for {name} ({reason}); give --codec-weights FILE, or --codec-weights random to try the path "
            "(its tokens carry no audio), or --codec melvq, a small stand-in trained on your own audio in minutes"
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 of every tensor's name, type, shape and bytes, in order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]


class Codec(ABC):
    """One codec with its weights; ``encode`` and ``decode`` take and return NumPy arrays."""

    name: str
    sample_rate: int
    """Hz of the waves that it takes and returns."""
    hop: int
    """Samples per frame."""
    n_codebooks: int
    codebook_size: int
    weights: str
    """Where the weights came from: ``package``, ``random`` or ``file``."""
    weights_hash: str

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate / self.hop

    @property
    def bits_per_second(self) -> float:
        """Of the codes without any entropy coding: frame rate * K * log2(codebook size)."""
        return self.frame_rate_hz * self.n_codebooks * math.log2(self.codebook_size)

    @property
    def caveat(self) -> str:
        """What a reader of results made with this codec must know; empty when there is nothing."""
        if self.weights == RANDOM:
            return f"{self.name} with RANDOM weights: its tokens carry no audio, only the path is tried"
        return ""

    def describe(self) -> dict[str, Any]:
        """Everything that identifies the tokens, for manifests: no paths in it."""
        return {
            "name": self.name,
            "sample_rate": self.sample_rate,
            "hop": self.hop,
            "frame_rate_hz": self.frame_rate_hz,
            "n_codebooks": self.n_codebooks,
            "codebook_size": self.codebook_size,
            "bits_per_second": self.bits_per_second,
            "weights": self.weights,
            "weights_hash": self.weights_hash,
            "caveat": self.caveat,
        }

    def n_frames(self, n_samples: int) -> int:
        """T of a clip of n samples: ceil(n / hop)."""
        return -(-n_samples // self.hop)

    def encode(self, wave_BN: Waves | Tensor, sample_rate: int) -> Codes:
        """codes_BKT uint16 of mono clips, T = ceil(N / hop); the last frame is completed with silence.

        Args:
            wave_BN: float samples in [-1, 1].
            sample_rate: Hz of the wave; must be the codec's own.
        Raises:
            ValueError: another rank or sample rate, a clip shorter than a frame, or samples that are not finite.
        """
        wave = torch.as_tensor(wave_BN, dtype=torch.float32)
        if wave.dim() != 2 or len(wave) == 0:
            raise ValueError(f"wave has shape {tuple(wave.shape)}, expected [B, N] with B >= 1 mono clips")
        if sample_rate != self.sample_rate:
            raise ValueError(
                f"wave at {sample_rate} Hz, but {self.name} codes {self.sample_rate} Hz; "
                "resample it first (data.audio_io.resample)"
            )
        n = wave.shape[1]
        if n < self.hop:
            raise ValueError(
                f"clip of {n} samples is shorter than one frame of {self.name} ({self.hop} samples, "
                f"{1000 * self.hop / self.sample_rate:.1f} ms); drop it or join it to its neighbour"
            )
        if not bool(torch.isfinite(wave).all()):
            raise ValueError("the wave holds NaN or infinite samples; data.audio_io skips and lists such files")
        n_frames = self.n_frames(n)
        with torch.inference_mode():
            codes_BKT = self._encode(torch.nn.functional.pad(wave, (0, n_frames * self.hop - n)))
        if codes_BKT.shape != (len(wave), self.n_codebooks, n_frames):
            raise RuntimeError(
                f"{self.name} gave codes of shape {tuple(codes_BKT.shape)}, "
                f"expected {(len(wave), self.n_codebooks, n_frames)}; its package has changed"
            )
        return codes_BKT.cpu().numpy().astype(np.uint16)

    def decode(self, codes_BKT: npt.NDArray[np.integer] | Tensor) -> Waves:
        """wave_BN float32, N = T * hop, of codes [B, K, T].

        Raises ValueError for another shape, or a code outside the codebook (special tokens must be taken off first).
        """
        codes = torch.as_tensor(np.asarray(codes_BKT).astype(np.int64))
        if codes.dim() != 3 or codes.shape[1] != self.n_codebooks or codes.numel() == 0:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [B, {self.n_codebooks}, T >= 1]")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"code {high if high >= self.codebook_size else low} is outside {self.name}'s codebooks of "
                f"{self.codebook_size}; undo the delay pattern and remove PAD, BOS and EOS before decoding"
            )
        with torch.inference_mode():
            wave_BN = self._decode(codes)[:, : codes.shape[2] * self.hop]
        return wave_BN.float().cpu().numpy()

    @abstractmethod
    def _encode(self, wave_BN: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, codes_BKT: Tensor) -> Tensor: ...


class EncodecCodec(Codec):
    """EnCodec (Défossez et al. 2022, arXiv 2210.13438), causal, 24 kHz, 75 Hz, 8 codebooks at 6 kbps."""

    name = "encodec"
    bandwidth_kbps = 6.0

    def __init__(self, model: Any, *, weights: str, device: str = "cpu") -> None:
        model.set_target_bandwidth(self.bandwidth_kbps)
        self.model = model.eval().to(device)
        self.device = device
        self.weights = weights
        self.weights_hash = hash_tensors(model.state_dict())
        self.sample_rate = int(model.sample_rate)
        self.hop = int(np.prod(model.encoder.ratios))
        self.codebook_size = int(model.quantizer.bins)
        self.n_codebooks = int(model.quantizer.get_num_quantizers_for_bandwidth(model.frame_rate, self.bandwidth_kbps))

    def _encode(self, wave_BN: Tensor) -> Tensor:
        ((codes_BKT, _scale),) = self.model.encode(wave_BN[:, None].to(self.device))
        return codes_BKT

    def latents(self, wave_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """latent_TD of one clip (float samples at the codec's rate): the encoder's output before quantisation."""
        wave = torch.as_tensor(np.asarray(wave_N), dtype=torch.float32, device=self.device)
        with torch.inference_mode():
            return self.model.encoder(wave[None, None])[0].T.double().cpu().numpy()

    def _decode(self, codes_BKT: Tensor) -> Tensor:
        return self.model.decode([(codes_BKT.to(self.device), None)])[:, 0]


class DACCodec(Codec):
    """Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546), 44.1 kHz, 86.13 Hz, 9 codebooks."""

    name = "dac"

    def __init__(self, model: Any, *, weights: str, device: str = "cpu") -> None:
        self.model = model.eval().to(device)
        self.device = device
        self.weights = weights
        self.weights_hash = hash_tensors(model.state_dict())
        self.sample_rate = int(model.sample_rate)
        self.hop = int(model.hop_length)
        self.codebook_size = int(model.codebook_size)
        self.n_codebooks = int(model.n_codebooks)

    def _encode(self, wave_BN: Tensor) -> Tensor:
        return self.model.encode(wave_BN[:, None].to(self.device))[1]

    def _decode(self, codes_BKT: Tensor) -> Tensor:
        return self.model.decode(self.model.quantizer.from_codes(codes_BKT.to(self.device))[0])[:, 0]


class MelVQCodec(Codec):
    """The stand-in of data.melvq with the interface of a codec."""

    name = "melvq"
    weights = "file"

    def __init__(self, model: MelVQ) -> None:
        self.model = model
        spec = model.spec
        self.sample_rate, self.hop = spec.sample_rate, spec.hop
        self.n_codebooks, self.codebook_size = spec.n_codebooks, spec.codebook_size
        self.weights_hash = hash_tensors({"mean": model.mean_M, "centroids": model.centroids_KVM})

    @property
    def caveat(self) -> str:
        return "melvq is a stand-in codec (log-mel residual k-means, Griffin-Lim): not comparable with EnCodec or DAC"

    def _encode(self, wave_BN: Tensor) -> Tensor:
        logmel_BTM = self.model.log_mel(wave_BN)
        codes_RK = self.model.quantise(logmel_BTM.flatten(0, 1))
        return codes_RK.view(*logmel_BTM.shape[:2], -1).transpose(1, 2)

    def _decode(self, codes_BKT: Tensor) -> Tensor:
        return torch.stack([self.model.synthesise(self.model.dequantise(codes_KT.T)) for codes_KT in codes_BKT])


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """Which codec to load, small enough to send to an actor.

    Args:
        name: a key of CODECS.
        weights: a file; ``"random"``; or None for the package's own download (and, for melvq, an error).
        seed: of random weights.
        device: torch device of the real codecs, in whichever process codes.
    """

    name: str
    weights: str | None = None
    seed: int = 0
    device: str = "cpu"

    def load(self) -> Codec:
        """The codec; raises ValueError for an unknown name or a file of something else, and MissingCodecWeights."""
        if self.name not in CODECS:
            raise ValueError(f"codec {self.name!r} is not one of {', '.join(sorted(CODECS))}")
        if self.weights not in (None, RANDOM) and not Path(str(self.weights)).is_file():
            raise MissingCodecWeights(self.name, f"{self.weights} does not exist")
        return CODECS[self.name](self)

    def on_driver(self, actors_code: bool) -> CodecSpec:
        """The same codec for the process that starts the coding: on its CPU where actors code, as GPUs are theirs."""
        return replace(self, device="cpu") if actors_code else self


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Random weights that are the same bits in every process: from the seed, whatever the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _load_encodec(spec: CodecSpec) -> Codec:
    from encodec import EncodecModel

    if spec.weights is None:
        try:
            return EncodecCodec(EncodecModel.encodec_model_24khz(), weights="package", device=spec.device)
        except OSError as error:  # URLError is one
            raise MissingCodecWeights("encodec", f"the package's download failed: {error}") from error
    with _drawing(spec.seed):
        model = EncodecModel.encodec_model_24khz(pretrained=False)
        if spec.weights == RANDOM:
            _draw_encodec_codebooks(model)
            return EncodecCodec(model, weights=RANDOM, device=spec.device)
    try:
        model.load_state_dict(torch.load(spec.weights, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{spec.weights} does not hold the weights of EnCodec 24 kHz: {error}") from error
    return EncodecCodec(model, weights="file", device=spec.device)


def _draw_encodec_codebooks(model: Any) -> None:
    """The untrained model's codebooks are all zero, which would code every wave as zeros: draw them in the spread
    that its encoder gives noise, halved from one codebook to the next as residuals shrink."""
    with torch.inference_mode():
        latent = model.encoder(0.1 * torch.randn(1, 1, 8_000))
        scale = float(latent.std())
        for k, layer in enumerate(model.quantizer.vq.layers):
            drawn = torch.randn_like(layer._codebook.embed) * scale * 0.5**k + (latent.mean() if k == 0 else 0.0)
            layer._codebook.embed.copy_(drawn)
            layer._codebook.embed_avg.copy_(drawn)
            layer._codebook.inited.fill_(1)


def _load_dac(spec: CodecSpec) -> Codec:
    from dac.model import DAC

    if spec.weights == RANDOM:
        with _drawing(spec.seed):
            return DACCodec(DAC(), weights=RANDOM, device=spec.device)
    if spec.weights is not None:
        try:
            return DACCodec(_read_dac(spec.weights), weights="file", device=spec.device)
        except Exception as error:
            raise ValueError(f"{spec.weights} does not hold the weights of a DAC: {error}") from error
    from dac.utils import download

    try:
        path = download(model_type="44khz", model_bitrate="8kbps")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a refused download is a ValueError
        raise MissingCodecWeights("dac", f"the package's download failed: {error}") from error
    return DACCodec(_read_dac(path), weights="package", device=spec.device)


def _read_dac(path: str | Path) -> Any:
    """A DAC from its published file of weights and settings, never from a pickled module.

    `DAC.load` tries the file as a torch package first, which unpickles whatever is in it.
    """
    from dac.model import DAC

    state = torch.load(path, map_location="cpu", weights_only=True)
    known = inspect.signature(DAC).parameters
    model = DAC(**{k: v for k, v in state["metadata"]["kwargs"].items() if k in known})
    missing, unexpected = model.load_state_dict(state["state_dict"], strict=False)
    if missing or unexpected:
        example = (missing or unexpected)[0]
        raise ValueError(
            f"it lacks {len(missing)} of the model's tensors and has {len(unexpected)} besides, {example} among them"
        )
    return model


def _load_melvq(spec: CodecSpec) -> Codec:
    if spec.weights is None or spec.weights == RANDOM:
        raise MissingCodecWeights("melvq", "it has none of its own; train it with data.melvq.train and save it")
    return MelVQCodec(MelVQ.load(spec.weights))


CODECS: dict[str, Callable[[CodecSpec], Codec]] = {
    "encodec": _load_encodec,
    "dac": _load_dac,
    "melvq": _load_melvq,
}
