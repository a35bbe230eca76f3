"""Where the audio tokens of a cell come from: the corpus, the codec, and the token set made once a machine."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from data._content import file_sha256
from data.split import identity_hash, side_of
from sweeps.codec.own_codec import codec_file
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache

if TYPE_CHECKING:
    from data.audio_io import AudioSet
    from data.codec import Codec, CodecSpec
    from data.codec_shards import Tokens
    from data.melvq import MelVQ, MelVQSpec
    from data.synthetic_speech import SpeechSpec
    from sweeps.codec.cells import LMCell, Study
    from sweeps.ledger.storage import Store
SYNTHETIC = "synthetic_speech"
RECALL = "recall"
ASTERISK = "asterisk"
ASTERISK_RATE = 8_000
_CODEC_SECONDS = 3600.0
_LOOKED_AT = 64  # recordings, to find out whether any can be read
STAND_IN_AUDIO = (
    "the audio is SYNTHETIC: an invented language spoken by a formant synthesiser, made by this program; "
    "nothing here says anything about real speech or music"
)
PLANTED = (
    "recall is a PLANTED task of random symbols, made by this program to check the instrument; it says nothing of audio"
)
PROMPTS = (
    "audio: REAL speech, the telephone prompts of one speaker (asterisk-core-sounds-en, as "
    "benchmarks/fetch_test_audio.py lays them out), 8 kHz"
)
_LAYOUTS = {
    ASTERISK: "recordings in LJ Speech's layout, of 8 kHz",
    "ljspeech": "recordings in LJ Speech's layout",
    "fma": "recordings in FMA's layout",
}
INVENTED_TEXTS = "the synthesiser's own spelling of its invented words"
STAND_IN_CODEC = "the codec is melvq, a stand-in (log-mel residual k-means, Griffin-Lim), not EnCodec or DAC"


@dataclass(frozen=True)
class TokenSource:
    """A cell's finished tokens and the codec that turns samples back into audio."""

    tokens: Tokens
    codec: Codec
    source_rates: Mapping[int, int] = field(default_factory=dict)
    """{sample rate in Hz: files} of some of the corpus's recordings, as they were before any resampling."""
    content: str = ""
    """Digest of the recordings' ids and bytes; nothing for audio that this program makes."""


def is_recorded(corpus: str) -> bool:
    """Whether the audio is files at hand, not something that this program makes."""
    return corpus not in (SYNTHETIC, RECALL)


def _source_line(study: Study) -> str:
    """Where the audio comes from. What lies at a path that the user gives is known by its layout alone."""
    if not is_recorded(study.corpus):
        return PLANTED if study.corpus == RECALL else STAND_IN_AUDIO
    if study.audio_path:
        return f"audio: {_LAYOUTS[study.corpus]} at {study.audio_path}"
    if study.corpus == ASTERISK:
        return PROMPTS
    return f"audio: {_LAYOUTS[study.corpus]}; --set audio_path=PATH says where"


def banner(study: Study) -> list[str]:
    """What the numbers stand on."""
    lines = [_source_line(study)]
    if study.codec == "melvq":
        trained = "" if study.codec_weights else ", trained here on the training side of the same audio"
        lines.append(STAND_IN_CODEC + trained)
    elif study.codec_weights == "random":
        lines.append(f"{study.codec} has RANDOM weights: its tokens carry no audio, only the path is tried")
    if study.text:
        own = "the transcripts that come with the audio"
        lines.append(f"texts: {INVENTED_TEXTS if study.corpus == SYNTHETIC else own}")
    if study.needs_gpu:
        lines.append("this preset is sized for a GPU and was not run where it was written")
    return lines


def check(study: Study) -> None:
    """Raise UserError when the audio, the texts of a text study or the codec's weights are out of reach."""
    if not is_recorded(study.corpus):
        return
    _codec_origin(study)
    audio, path = _audio(study), _audio_path(study)
    if study.text and not any(r.text.strip() for r in audio.recordings):
        raise UserError(
            f"none of {len(audio.recordings)} recordings at {path} has a text, and text="
            f"{','.join(study.text)} needs transcripts; add them to metadata.csv, or set text to nothing"
        )
    _check_readable(audio, path)


def _check_readable(audio: AudioSet, path: str) -> None:
    from data.audio_io import first_of_each, read_recording, sample_rates

    if sample_rates(audio):
        return
    odd = [o for r in audio.recordings[:_LOOKED_AT] for o in read_recording(audio, r, ASTERISK_RATE, 0.0)[1]]
    raise UserError(f"no recording at {path} can be read: {first_of_each(odd)}; fetch the audio again")


def fingerprint(cell: LMCell, study: Study) -> str:
    """Digest of the cell and of all that makes its tokens, and its texts where it is given some."""
    parts = [cell.identity(), _origin(study)]
    if study.text and study.corpus != SYNTHETIC:  # the synthesiser's own follow from what makes its audio
        parts.append(digest([[r.recording_id, r.text] for r in _audio(study).recordings]))
    return digest(parts)


def check_same_audio(cell: LMCell, study: Study, expected: str) -> None:
    """Raise UserError where recorded audio gives another fingerprint here than `expected`, that of the launch."""
    if is_recorded(study.corpus) and fingerprint(cell, study) != expected:
        raise UserError(
            f"the audio at {_audio_path(study)} on {platform.node()} is not what the launch read (its recordings have "
            "other bytes, ids or texts); give every node the same files and run the same command again"
        )


def _origin(study: Study) -> list[str]:
    if study.corpus == RECALL:
        from data.planted_recall import RecallSpec

        return [RECALL, repr(RecallSpec()), str(study.corpus_clips)]
    if study.corpus == SYNTHETIC:
        return [repr(_speech(study)), repr(study.melvq()), str(study.corpus_clips)]
    return _recorded_origin(study, _audio_path(study))


@functools.cache
def _recorded_origin(study: Study, path: str) -> list[str]:
    """Once a process: every cell of a study asks, and it looks into the recordings."""
    return [study.corpus, _content(_told(study.corpus, path)), _codec_origin(study)]


def _content(audio: AudioSet) -> str:
    """Digest of the recordings' ids and bytes, wherever they lie and whatever their files are called."""
    return digest([[r.recording_id, r.content] for r in audio.recordings])


def _codec_origin(study: Study) -> str:
    """What decides the codec: its weights, or how they are trained."""
    audio = _audio(study)
    if _trains_own(study):
        return f"{melvq_spec(study, audio)!r} holdout {study.holdout} chunk_s {study.chunk_s} min_s {study.min_s}"
    return _codec_facts(study.codec, study.codec_weights)


def _trains_own(study: Study) -> bool:
    return study.codec == "melvq" and not study.codec_weights


def melvq_spec(study: Study, audio: AudioSet) -> MelVQSpec:
    """The preset's stand-in codec at the audio's own sample rate where that is lower, frames a second unchanged.

    Audio is never raised to a higher rate: bands above its Nyquist frequency would hold nothing.
    """
    from data.audio_io import sample_rates

    spec, rates = study.melvq(), sample_rates(audio)
    native = next(iter(rates), spec.sample_rate)
    if native >= spec.sample_rate:
        return spec
    return replace(spec, sample_rate=native, hop=max(1, round(spec.hop * native / spec.sample_rate)))


def tokens_folder(study: Study) -> Path:
    """Where the tokens of a study are kept on this machine."""
    parts = [*_origin(study), study.holdout, study.chunk_s, study.min_s]
    return user_cache() / "codec_tokens" / digest(parts)[:16]


def open_source(
    study: Study,
    device: str,
    say: Callable[[str], None],
    ledger: Store | None = None,
    *,
    actors: int = 0,
    gpus_per_actor: float = 0,
) -> TokenSource:
    """The tokens of a study, made on first use in the user's cache; other processes of the machine wait for them.

    ledger: where the stand-in codec, if it is trained here, is kept for all nodes; None: on this machine alone.
    actors: Ray Data actors that code shards at the same time, in the Ray that is initialised; 0: this process does.
    device: of the codec in those actors, or in this process where there are none.
    Raises UserError for audio or codec weights that are out of reach.
    """
    from data.audio_io import sample_rates
    from data.codec_shards import Actors, tokenise

    folder = tokens_folder(study)
    folder.mkdir(parents=True, exist_ok=True)
    say("waiting for the tokens")
    with FileLock(folder / ".lock"):
        if study.corpus == RECALL:
            return _recall(study, folder)
        if study.corpus == SYNTHETIC:
            audio, train = _synthetic(study, folder, say)
        else:
            audio = _told(study.corpus, _audio_path(study))
            train = functools.partial(_train_codec, study, audio, say)
        spec, tokens_name = _codec_spec(study.codec, study.codec_weights, device), "tokens"
        if _trains_own(study):
            own = folder / "melvq.npz"
            file = codec_file(ledger, folder.name, own, train)
            spec = _codec_spec("melvq", str(file), "cpu")
            tokens_name = "tokens" if file == own else f"tokens-{file.stem}"
        say(f"coding {len(audio.recordings)} recordings with {study.codec}")
        try:
            tokens = tokenise(
                audio,
                spec,
                str(folder / tokens_name),
                chunk_s=study.chunk_s,
                min_s=study.min_s,
                actors=Actors(actors, gpus=gpus_per_actor) if actors else None,
            )
            content = _content(audio) if is_recorded(study.corpus) else ""
            return TokenSource(tokens, spec.on_driver(actors > 0).load(), sample_rates(audio), content)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from error


def _train_codec(study: Study, audio: AudioSet, say: Callable[[str], None]) -> MelVQ:
    """A melvq trained on the training side of the user's own audio, on an hour of it where there is more."""
    from data.audio_io import Oddity, first_of_each, read_clips
    from data.melvq import train

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
        return train(waves(), spec, epochs=2)[0]
    except ValueError as error:
        why = f"; of the recordings: {first_of_each(skipped)}" if skipped else ""
        raise UserError(f"{_LAYOUTS[study.corpus]} at {_audio_path(study)} cannot train melvq: {error}{why}") from error


def _recall(study: Study, folder: Path) -> TokenSource:
    from data.codec_shards import open_tokens
    from data.planted_recall import RecallSpec, Symbols, recall_tokens

    spec, out = RecallSpec(), str(folder / "tokens")
    try:
        tokens = open_tokens(out)
    except FileNotFoundError:
        tokens = recall_tokens(spec, study.corpus_clips, out)
    return TokenSource(tokens, Symbols(spec), {})


def _speech(study: Study) -> SpeechSpec:
    from data.synthetic_speech import SpeechSpec

    return SpeechSpec(min_s=study.min_s, max_s=study.chunk_s)


def _synthetic(study: Study, folder: Path, say: Callable[[str], None]) -> tuple[AudioSet, Callable[[], MelVQ]]:
    """The invented corpus in LJ Speech's layout, and what trains a melvq on its training side."""
    from data.ljspeech import open_ljspeech
    from data.melvq import train
    from data.synthetic_speech import utterance, write_ljspeech

    speech = _speech(study)
    say(f"synthesising {study.corpus_clips} clips")
    root = write_ljspeech(speech, study.corpus_clips, folder / "audio")
    audio = open_ljspeech(root, nominal_rate=speech.sample_rate, name=SYNTHETIC)

    def codec() -> MelVQ:
        say("training the stand-in codec")
        sides = [side_of(r.recording_id, holdout=study.holdout) for r in audio.recordings]
        waves = (utterance(speech, i)[0] for i, side in enumerate(sides) if side == "train")
        try:
            return train(waves, study.melvq(), epochs=2)[0]
        except ValueError as error:
            raise UserError(f"corpus_clips={study.corpus_clips} cannot train melvq: {error}") from error

    return audio, codec


def _audio(study: Study) -> AudioSet:
    return _listed(study.corpus, _audio_path(study))


def _audio_path(study: Study) -> str:
    path = study.audio_path
    if study.corpus == ASTERISK:
        path = path or str(user_cache() / "audio" / "ljspeech")
        if not Path(path).exists():
            home = Path(path).parent if Path(path).name == "ljspeech" else Path("DIR")
            raise UserError(
                f"no audio at {path}: this preset reads real speech, which is not part of the program; fetch it with "
                f"`python benchmarks/fetch_test_audio.py {home} --only ljspeech` (a Debian machine, 19 MB), or point "
                "--set audio_path=PATH at a folder laid out like LJ Speech"
            )
    what = {"fma": "FMA (fma_metadata and fma_large)"}.get(study.corpus, "LJ Speech (a folder or archive)")
    if not path:
        raise UserError(f"this preset reads {what}; say where it is with --set audio_path=PATH")
    return path


@functools.cache
def _listed(corpus: str, path: str) -> AudioSet:
    """The audio set at a path, listed once a process."""
    from data.audio_io import first_of_each
    from data.fma import open_fma
    from data.ljspeech import open_ljspeech

    readers: dict[str, Callable[[str], AudioSet]] = {
        ASTERISK: functools.partial(open_ljspeech, nominal_rate=ASTERISK_RATE),
        "fma": open_fma,
        "ljspeech": open_ljspeech,
    }
    try:
        audio = replace(readers[corpus](path), name=_LAYOUTS[corpus])
    except (OSError, ValueError) as error:
        raise UserError(f"audio_path={path}: {error}") from error
    if not audio.recordings:
        raise UserError(
            f"audio_path={path} lists no recording of {corpus}: {audio.entries} entries were read; "
            f"{first_of_each(audio.oddities)}; point it at the data set's own layout"
        )
    return audio


@functools.cache
def _told(corpus: str, path: str) -> AudioSet:
    """The same with the content of each recording, which is read once a machine."""
    from data.audio_io import with_contents

    return with_contents(_listed(corpus, path), user_cache() / "content", lambda line: print(f"  {line}", flush=True))


def _codec_spec(codec: str, weights: str, device: str) -> CodecSpec:
    from data.codec import CodecSpec

    return CodecSpec(name=codec, weights=weights or None, device=device)


@functools.cache
def _codec_facts(codec: str, weights: str) -> str:
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
        return _codec_spec(codec, weights, "cpu").load()
    except (RuntimeError, ValueError) as error:
        raise UserError(re.sub(r"--codec (\w)", r"--set codec=\1", str(error))) from error
