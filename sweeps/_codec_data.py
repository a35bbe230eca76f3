"""Where the audio tokens of a cell come from: the corpus, the codec, and the token set made once a machine."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from data.split import side_of
from sweeps._sweep import UserError, digest
from sweeps._where import user_cache

if TYPE_CHECKING:
    from data.audio_io import AudioSet
    from data.codec import Codec, CodecSpec
    from data.codec_shards import Tokens
    from data.synthetic_speech import SpeechSpec
    from sweeps.codec_lm import LMCell, Study

SYNTHETIC = "synthetic_speech"
STAND_IN_AUDIO = (
    "the audio is SYNTHETIC: an invented language spoken by a formant synthesiser, made by this program; "
    "nothing here says anything about real speech or music"
)
STAND_IN_CODEC = "the codec is melvq, a stand-in (log-mel residual k-means, Griffin-Lim), not EnCodec or DAC"


@dataclass(frozen=True)
class TokenSource:
    """A cell's finished tokens and the codec that turns samples back into audio."""

    tokens: Tokens
    codec: Codec


def banner(study: Study) -> list[str]:
    """What the numbers stand on."""
    lines = [f"audio: {study.corpus}" + (f" at {study.audio_path}" if study.audio_path else "")]
    if study.corpus == SYNTHETIC:
        lines = [STAND_IN_AUDIO]
    if study.codec == "melvq":
        lines.append(STAND_IN_CODEC)
    elif study.codec_weights == "random":
        lines.append(f"{study.codec} has RANDOM weights: its tokens carry no audio, only the path is tried")
    if study.needs_gpu:
        lines.append("this preset is sized for a GPU and was not run where it was written")
    return lines


def check(study: Study) -> None:
    """Raise UserError when the audio or the codec's weights are out of reach."""
    if study.corpus != SYNTHETIC:
        _audio(study)
        _codec_facts(study.codec, study.codec_weights, study.corpus, study.audio_path)


def fingerprint(cell: LMCell, study: Study) -> str:
    """Digest of the cell and of all that makes its tokens."""
    return digest([cell.identity(), _origin(study)])


def _origin(study: Study) -> list[str]:
    if study.corpus == SYNTHETIC:
        return [repr(_speech(study)), repr(study.melvq()), str(study.corpus_clips)]
    audio = _audio(study)
    listed = digest([[r.recording_id, r.name] for r in audio.recordings])
    return [listed, _codec_facts(study.codec, study.codec_weights, study.corpus, study.audio_path)]


def open_source(study: Study, device: str, say: Callable[[str], None]) -> TokenSource:
    """The tokens of a study, made on first use in the user's cache; other processes of the machine wait for them.

    Raises UserError for audio or codec weights that are out of reach.
    """
    from data.codec_shards import tokenise

    folder = user_cache() / "codec_tokens" / digest(_origin(study))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    say("waiting for the tokens")
    with FileLock(folder / ".lock"):
        if study.corpus == SYNTHETIC:
            audio, spec = _synthetic(study, folder, say)
        else:
            audio, spec = _audio(study), _codec_spec(study.codec, study.codec_weights, device)
        say(f"coding {len(audio.recordings)} recordings with {study.codec}")
        try:
            tokens = tokenise(
                audio,
                spec,
                str(folder / "tokens"),
                chunk_s=study.chunk_s,
                min_s=study.min_s,
                use_ray=False,
            )
            return TokenSource(tokens, spec.load())
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from error


def _speech(study: Study) -> SpeechSpec:
    from data.synthetic_speech import SpeechSpec

    return SpeechSpec(min_s=study.min_s, max_s=study.chunk_s)


def _synthetic(study: Study, folder: Path, say: Callable[[str], None]) -> tuple[AudioSet, CodecSpec]:
    """The invented corpus in LJ Speech's layout and a melvq trained on its training side."""
    from data.codec import CodecSpec
    from data.ljspeech import open_ljspeech
    from data.melvq import train
    from data.synthetic_speech import utterance, write_ljspeech

    speech = _speech(study)
    say(f"synthesising {study.corpus_clips} clips")
    root = write_ljspeech(speech, study.corpus_clips, folder / "audio")
    audio = open_ljspeech(root, nominal_rate=speech.sample_rate, name=SYNTHETIC)
    weights = folder / "melvq.npz"
    if not weights.is_file():
        say("training the stand-in codec")
        sides = [side_of(r.recording_id, holdout=study.holdout) for r in audio.recordings]
        waves = (utterance(speech, i)[0] for i, side in enumerate(sides) if side == "train")
        try:
            codec, _ = train(waves, study.melvq(), epochs=2)
        except ValueError as error:
            raise UserError(f"corpus_clips={study.corpus_clips} cannot train melvq: {error}") from error
        codec.save(weights)
    return audio, CodecSpec(name="melvq", weights=str(weights))


def _audio(study: Study) -> AudioSet:
    from data.fma import open_fma
    from data.ljspeech import open_ljspeech

    what = {"ljspeech": "LJ Speech (a folder or archive)", "fma": "FMA (fma_metadata and fma_large)"}[study.corpus]
    if not study.audio_path:
        raise UserError(f"this preset reads {what}; say where it is with --set audio_path=PATH")
    return _listed(study.corpus, study.audio_path, open_ljspeech if study.corpus == "ljspeech" else open_fma)


@functools.cache
def _listed(corpus: str, path: str, reader: Callable[[str], AudioSet]) -> AudioSet:
    try:
        audio = reader(path)
    except (OSError, ValueError) as error:
        raise UserError(f"audio_path={path}: {error}") from error
    if not audio.recordings:
        raise UserError(f"audio_path={path} lists no recording of {corpus}; point it at the data set's own layout")
    return audio


def _codec_spec(codec: str, weights: str, device: str) -> CodecSpec:
    from data.codec import CodecSpec

    return CodecSpec(name=codec, weights=weights or None, device=device)


@functools.cache
def _codec_facts(codec: str, weights: str, corpus: str, audio_path: str) -> str:
    """Identity of the codec's weights: the bytes of a file, else their hash after loading."""
    if weights not in ("", "random"):
        try:
            with open(weights, "rb") as f:
                return f"{codec} {hashlib.file_digest(f, 'sha256').hexdigest()}"
        except OSError as error:
            raise UserError(f"codec_weights={weights}: {error.strerror}; give a file, random, or nothing") from error
    return str(digest(open_weights(codec, weights).describe()))


def open_weights(codec: str, weights: str) -> Codec:
    """A codec with its package's weights, those of a file, or `random` ones; raises UserError without them."""
    try:
        return _codec_spec(codec, weights, "cpu").load()
    except (RuntimeError, ValueError) as error:
        text = str(error).replace("--codec-weights ", "--set codec_weights=").replace("--codec ", "--set codec=")
        raise UserError(text) from error


def unigram_nll(source: TokenSource, holdout: float) -> float:
    """Nats a token of held-out codes under each codebook's training frequencies (add-one): what an LM must beat."""
    from data.pack import TokenClips

    train, held = (TokenClips(source.tokens, side, holdout=holdout) for side in ("train", "validation"))
    size = train.special.codebook_size
    counts_KV = np.ones((train.n_codebooks, size))
    offsets = np.arange(train.n_codebooks)[:, None] * size
    for clip in range(len(train)):
        codes = train.codes(clip).astype(np.int64)
        counts_KV += np.bincount((codes + offsets).ravel(), minlength=counts_KV.size).reshape(counts_KV.shape)
    log_p = np.log(counts_KV / counts_KV.sum(1, keepdims=True)).ravel()
    parts = [log_p[(held.codes(c).astype(np.int64) + offsets).ravel()] for c in range(len(held))]
    return float(-np.concatenate(parts).mean())
