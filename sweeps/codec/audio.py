"""Generated audio of a trained model and the real audio it is compared with, as embeddings and coherences.

Both have been through the codec, so that a distance describes the language model and not the codec. Real audio is
cut to the length of a sample.

Shapes: N samples or clips, K codebooks, T frames, D embedding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soundfile
from filelock import FileLock

from analysis.codec.audio_distance import Embedder, LogMelStatistics, embed_set
from analysis.codec.scores import coherence
from data._atomic import write_whole
from data.codec import RANDOM, Codec, EncodecCodec
from data.token_batches import TokenClips, evaluation_batches
from models.codec.model import CodecLM
from models.codec.sampling import generate
from sweeps.codec.audio_sets import SAMPLING
from sweeps.codec.corpora import TokenSource
from sweeps.codec.loop import autocast
from sweeps.codec.texts import arm_name, given_texts
from sweeps.core.cells import digest

if TYPE_CHECKING:
    from sweeps.codec.cells import LMCell, Study
_N_MELS = 16  # 32 numbers per window: a few dozen clips suffice for their covariance
_REAL_CLIPS = 256
_WAVS = 4
_AT_ONCE = 32
_COHERENCE_WINDOW_S = 4.0

Waves = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EncodecLatents:
    """Mean over each second of EnCodec's encoder output (D = 128), with the package's or a file's weights."""

    codec: EncodecCodec
    window_s: float = 1.0

    @property
    def sample_rate(self) -> int:
        return self.codec.sample_rate

    @property
    def name(self) -> str:
        return f"EnCodec latents (mean over {self.window_s:g} s, weights {self.codec.weights_hash})"

    def embed(self, wave_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
        width = round(self.window_s * self.codec.frame_rate_hz)
        latent_TD = self.codec.latents(wave_N)
        whole = len(latent_TD) // width
        return latent_TD[: whole * width].reshape(whole, width, latent_TD.shape[1]).mean(1)


def embedders(codec: Codec) -> list[Embedder]:
    """Log-mel statistics at the codec's rate, and EnCodec's own latents where its real weights are available."""
    found: list[Embedder] = [LogMelStatistics(codec.sample_rate, n_mels=_N_MELS)]
    if isinstance(codec, EncodecCodec) and codec.weights != RANDOM:
        found.append(EncodecLatents(codec))
    return found


def sample_frames(codec: Codec, model: CodecLM, seconds: float) -> int:
    """Frames of a sample of `seconds`, at most what the context holds."""
    return min(max(1, round(seconds * codec.frame_rate_hz)), model.config.max_frames)


def coherence_window(frames: int, frame_rate_hz: float) -> dict[str, float]:
    """window_s and hop_s of the coherence: 4 s and 2 s, or what lets two windows fit a sample shorter than 8 s."""
    hop = max(1, min(round(_COHERENCE_WINDOW_S / 2 * frame_rate_hz), frames // 4))
    return {"window_s": 2 * hop / frame_rate_hz, "hop_s": hop / frame_rate_hz}


def cell_audio(
    model: CodecLM, cell: LMCell, study: Study, source: TokenSource, held_out: TokenClips, training: TokenClips
) -> dict[str, bytes]:
    """Files of a cell: WAVs, a spectrogram, the samples' codes, and audio.npz (see `AudioSets`).

    The model's samples start from nothing; they are drawn with the cell's seed. With text conditioning they are given
    texts of held-out clips, and samples.txt holds those of the WAVs, one per line.
    """
    from analysis.codec.plots import spectrogram_png  # here: matplotlib takes seconds that a worker without sound saves

    codec = source.codec
    frames = sample_frames(codec, model, study.sample_s)
    spoken = held_out.take(min(study.sample_n, len(held_out))).texts
    codes_NKT = draw(model, frames, study.sample_n, cell.seed, cell.precision, spoken)
    waves = list(_decoded(codec, codes_NKT))
    longest = int(np.argmax(held_out.n_frames_C))
    reference_N = codec.decode(held_out.codes(longest)[None, :, :frames])[0]
    files = {"sample.wav": wav(waves[0], codec.sample_rate), "reference.wav": wav(reference_N, codec.sample_rate)}
    files |= {f"samples/{i:02d}.wav": wav(wave, codec.sample_rate) for i, wave in enumerate(waves[1:_WAVS], start=1)}
    titles = {
        f"{arm_name(cell.identity())}: a sample": waves[0],
        f"{arm_name(cell.identity())}: another": waves[1],
        f"held-out audio through {codec.name}": reference_N,
    }
    files["spectrogram.png"] = spectrogram_png(titles, codec.sample_rate)
    if model.config.text is not None:
        files["samples.txt"] = "\n".join(spoken[i % len(spoken)] for i in range(_WAVS)).encode()
    files["samples.npz"] = _npz({"codes_NKT": codes_NKT})
    arrays = dict(_real_arrays(source, study, held_out, training, frames))
    arrays |= _embedded("samples", waves, embedders(codec))
    arrays["coherence_samples"] = _coherences(codes_NKT, codec, frames)
    files["audio.npz"] = _npz(arrays)
    return files


def draw(
    model: CodecLM, frames: int, n: int, seed: int, precision: str, spoken: Sequence[str] = ("",)
) -> npt.NDArray[np.uint16]:
    """codes_NKT of `n` samples from nothing, in blocks of 32; whole blocks do not depend on n.

    spoken: texts that a model with text conditioning is given in turn.
    """
    model.eval()
    parts = []
    with autocast(model.heads.device, precision):
        for block, start in enumerate(range(0, n, _AT_ONCE)):
            batch = min(_AT_ONCE, n - start)
            texts = given_texts(
                model.config, [spoken[i % len(spoken)] for i in range(start, start + batch)], model.heads.device
            )
            made = generate(model, frames, batch=batch, sampling=SAMPLING, seed=seed + 7919 * block, texts=texts)
            parts.append(made.codes.cpu().numpy().astype(np.uint16))
    return np.concatenate(parts)


def wav(wave_N: Waves, sample_rate: int) -> bytes:
    """A 16-bit WAV file of a mono wave; samples outside [-1, 1] are clipped."""
    sink = io.BytesIO()
    soundfile.write(sink, np.clip(wave_N, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
    return sink.getvalue()


def _decoded(codec: Codec, clips: Sequence[npt.NDArray[np.uint16]] | npt.NDArray[np.uint16]) -> Iterator[Waves]:
    for codes_KT in clips:
        yield codec.decode(codes_KT[None])[0]


def _coherences(clips: Any, codec: Codec, frames: int) -> npt.NDArray[np.float64]:
    window = coherence_window(frames, codec.frame_rate_hz)
    values = [coherence(c, codec.frame_rate_hz, codec.codebook_size, **window) for c in clips if c.shape[1] >= frames]
    return np.array(values, dtype=np.float64)


def _embedded(
    kind: str, waves: Sequence[Waves], with_these: Sequence[Embedder], recordings: Sequence[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Arrays `KIND_J_x` and `KIND_J_clip` of each embedder J that finds two recordings long enough."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for j, embedder in enumerate(with_these):
        try:
            e = embed_set(waves, embedder, kind, recordings)
        except ValueError:
            continue
        arrays |= {f"{kind}_{j}_x": e.x_ND, f"{kind}_{j}_clip": e.clip_N}
    return arrays


def _real_arrays(
    source: TokenSource, study: Study, held_out: TokenClips, training: TokenClips, frames: int
) -> Mapping[str, npt.NDArray[Any]]:
    """Embeddings of held-out and of as many training clips, and coherences of all long ones.

    Made once per token set and kept next to it; the file's name is a digest of all that decides them.
    """
    codec, with_these = source.codec, embedders(source.codec)
    n = min(_REAL_CLIPS, study.eval_clips, len(held_out), len(training))
    window = coherence_window(frames, codec.frame_rate_hz)
    names = [e.name for e in with_these]
    facts = [study.holdout, n, frames, *window.values(), codec.weights_hash, names, len(training), "by recording"]
    facts += ["clips with a text of their own"] if study.text else []
    place = Path(source.tokens.folder).parent / f"real-{digest(facts)[:16]}.npz"
    with FileLock(f"{place}.lock"):
        if place.is_file():
            with np.load(place, allow_pickle=False) as stored:
                return dict(stored)
        arrays: dict[str, npt.NDArray[Any]] = {
            "embedders": np.array(names),
            "sample_s": np.array(frames / codec.frame_rate_hz),
            "coherence_window_s": np.array(window["window_s"]),
        }
        for kind, clips in (("held_out", held_out), ("training", training)):
            codes, recordings = _openings(clips, frames, n)
            arrays |= _embedded(kind, list(_decoded(codec, codes)), with_these, recordings)
        long, whose = _long_clips((held_out, training), frames)
        arrays["coherence_real"] = _coherences(long, codec, frames)
        arrays["coherence_real_recording"] = np.unique(whose, return_inverse=True)[1].astype(np.int64)
        write_whole(place, _npz(arrays))
    return arrays


def _openings(clips: TokenClips, frames: int, n: int) -> tuple[list[npt.NDArray[np.uint16]], list[str]]:
    """(the first `frames` frames of n clips as codes_KT, the recording of each)."""
    recordings = dict(zip(clips.clip_ids, clips.recording_ids, strict=True))
    batches = list(evaluation_batches(clips, 1, max_frames=frames, n_clips=n))
    codes = [
        codes_KT[:, : int(length)].numpy().astype(np.uint16)
        for batch in batches
        for codes_KT, length in zip(batch.codes_BKT, batch.length_B, strict=True)
    ]
    return codes, [recordings[name] for batch in batches for name in batch.clip_ids]


def _long_clips(sides: Sequence[TokenClips], frames: int) -> tuple[list[npt.NDArray[np.uint16]], list[str]]:
    """(clips of each side that are at least `frames` long, cut to that, 256 per side at most; their recordings)."""
    long = [(clips, c) for clips in sides for c in np.flatnonzero(clips.n_frames_C >= frames)[:_REAL_CLIPS]]
    return [clips.codes(c)[:, :frames] for clips, c in long], [clips.recording_ids[c] for clips, c in long]


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()
