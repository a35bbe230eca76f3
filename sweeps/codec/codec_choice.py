"""The codec of a study: with its package's weights, those of a file, random ones, or a stand-in trained here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from data import melvq
from data._content import file_sha256
from data.audio_io import AudioSet, Oddity, first_of_each, read_clips, sample_rates
from data.codec import Codec, CodecSpec
from data.melvq import MelVQ, MelVQSpec
from data.split import identity_hash, side_of
from sweeps.codec.cells import Study
from sweeps.core.cells import UserError, digest

STAND_IN_CODEC = "the codec is melvq, a stand-in (log-mel residual k-means, Griffin-Lim), not EnCodec or DAC"
EPOCHS = 2  # of training a stand-in codec
_CODEC_SECONDS = 3600.0  # of audio that it is trained on, where there is as much


def trains_own(study: Study) -> bool:
    """Whether the codec is a stand-in that is trained here, on the training side of the same audio."""
    return study.codec == "melvq" and not study.codec_weights


def codec_lines(study: Study) -> list[str]:
    """What a reader must know about the codec; nothing for a real codec with its own weights."""
    if study.codec == "melvq":
        return [STAND_IN_CODEC + (", trained here on the training side of the same audio" if trains_own(study) else "")]
    if study.codec_weights == "random":
        return [f"{study.codec} has RANDOM weights: its tokens carry no audio, only the path is tried"]
    return []


def codec_origin(study: Study, audio: AudioSet) -> str:
    """What decides the codec: its weights, or how they are trained."""
    if trains_own(study):
        return f"{melvq_spec(study, audio)!r} holdout {study.holdout} chunk_s {study.chunk_s} min_s {study.min_s}"
    return weights_identity(study.codec, study.codec_weights)


def melvq_spec(study: Study, audio: AudioSet) -> MelVQSpec:
    """The preset's stand-in codec at the audio's own sample rate where that is lower, frames per second unchanged.

    Audio is never raised to a higher rate: bands above its Nyquist frequency would hold nothing.
    """
    spec, rates = study.melvq(), sample_rates(audio)
    native = next(iter(rates), spec.sample_rate)
    if native >= spec.sample_rate:
        return spec
    return replace(spec, sample_rate=native, hop=max(1, round(spec.hop * native / spec.sample_rate)))


def train_on_recordings(study: Study, audio: AudioSet, source: str, say: Callable[[str], None]) -> MelVQ:
    """A melvq trained on the training side of the user's own audio, on one hour of it where there is more.

    source: what the audio is called where training fails, which raises UserError.
    """
    say("training the stand-in codec on the training side")
    spec, skipped = melvq_spec(study, audio), list[Oddity]()
    side = [r for r in audio.recordings if side_of(r.unit, holdout=study.holdout) == "train"]

    def waves() -> Iterator[npt.NDArray[np.float32]]:
        left = _CODEC_SECONDS
        for recording in sorted(side, key=lambda r: identity_hash(r.recording_id, salt="melvq")):
            clips, odd = read_clips(
                audio, recording, sample_rate=spec.sample_rate, chunk_s=study.chunk_s, min_s=study.min_s
            )
            skipped.extend(o for o in odd if o.skipped)
            yield from (clip.wave_N for clip in clips)
            left -= sum(clip.duration_s for clip in clips)
            if left <= 0:
                return

    try:
        return melvq.train(waves(), spec, epochs=EPOCHS)[0]
    except ValueError as error:
        why = f"; of the recordings: {first_of_each(skipped)}" if skipped else ""
        raise UserError(f"{source} cannot train melvq: {error}{why}") from error


def codec_spec(codec: str, weights: str, device: str) -> CodecSpec:
    """A codec by the preset's spelling of its weights: a file, `random`, or nothing for the package's own."""
    return CodecSpec(name=codec, weights=weights or None, device=device)


@functools.cache
def weights_identity(codec: str, weights: str) -> str:
    """Identity of the codec's weights: the bytes of a file, else their hash after loading."""
    if weights not in ("", "random"):
        try:
            return f"{codec} {file_sha256(weights)}"
        except OSError as error:
            raise UserError(f"codec_weights={weights}: {error.strerror}; give a file, random, or nothing") from error
    return str(digest(open_weights(codec, weights).describe()))


def open_weights(codec: str, weights: str) -> Codec:
    """A codec with its package's weights, those of a file, or `random` ones; raises UserError without them."""
    try:
        return codec_spec(codec, weights, "cpu").load()
    except (RuntimeError, ValueError) as error:
        raise UserError(re.sub(r"--codec (\w)", r"--set codec=\1", str(error))) from error
