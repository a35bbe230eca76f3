"""The corpora that a study can be trained on, each with all that depends on which of them it is.

`corpus_of(study)` gives the study's own. Recordings lie at `audio_path`; synthetic speech and the planted recall task
are made by this program, which every output says.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from data import melvq
from data.audio_io import AudioSet, first_of_each, read_recording, sample_rates, with_contents
from data.codec import Codec, CodecSpec
from data.codec_shards import Actors, Tokens, open_tokens, tokenise
from data.fma import open_fma
from data.ljspeech import open_ljspeech
from data.melvq import MelVQ
from data.planted_recall import RecallSpec, Symbols, recall_tokens
from data.split import side_of
from data.synthetic_speech import SpeechSpec, utterance, write_ljspeech
from sweeps.codec.cells import Study
from sweeps.codec.codec_choice import EPOCHS, codec_origin, codec_spec, train_on_recordings, trains_own
from sweeps.codec.own_codec import codec_file
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache
from sweeps.ledger.storage import Store

RECALL = "recall"
PLANTED = (
    "recall is a PLANTED task of random symbols, made by this program to check the instrument; it says nothing of audio"
)
_PROMPTS_RATE = 8_000
_LOOKED_AT = 64  # recordings, to find out whether any can be read


@dataclass(frozen=True)
class TokenSource:
    """A cell's finished tokens and the codec that turns samples back into audio."""

    tokens: Tokens
    codec: Codec
    source_rates: Mapping[int, int] = field(default_factory=dict)
    """{sample rate in Hz: files} of some of the corpus's recordings, as they were before any resampling."""
    content: str = ""
    """Digest of the recordings' ids and bytes; nothing for audio that this program makes."""


@dataclass(frozen=True)
class Making:
    """How tokens are made.

    device: of the codec, in the actors or in this process where there are none. say: takes lines on the progress.
    ledger: where the stand-in codec, if it is trained here, is kept for all nodes; None: on this machine alone.
    actors: Ray Data actors that code shards at the same time, in the Ray that is initialised; None: this process does.
    """

    device: str
    say: Callable[[str], None]
    ledger: Store | None = None
    actors: Actors | None = None


@dataclass(frozen=True)
class Corpus(ABC):
    """What a study is trained on."""

    study: Study
    texts: ClassVar[str] = "the transcripts that come with the audio"

    @abstractmethod
    def banner(self) -> str:
        """One line on where the audio comes from."""

    def check(self) -> None:  # noqa: B027 (what this program makes is always there)
        """Raise UserError where the audio, the texts of a text study or the codec's weights are unreachable."""

    @abstractmethod
    def origin(self) -> list[str]:
        """What decides the tokens, apart from how recordings are split and cut into clips."""

    def texts_origin(self) -> str:
        """What decides the texts, where `origin` does not."""
        return ""

    def recorded_at(self) -> str | None:
        """Where the recordings lie; None for what this program makes. Raises UserError where they are missing."""
        return None

    @abstractmethod
    def source(self, folder: Path, making: Making) -> TokenSource:
        """The tokens kept in a folder, made where they are missing. Raises UserError for unreachable audio or weights.

        The caller holds the folder's lock.
        """


class PlantedRecall(Corpus):
    """Random symbols of which some must be recalled; no audio and no codec."""

    def banner(self) -> str:
        return PLANTED

    def origin(self) -> list[str]:
        return [RECALL, repr(RecallSpec()), str(self.study.corpus_clips)]

    def source(self, folder: Path, making: Making) -> TokenSource:
        spec, out = RecallSpec(), str(folder / "tokens")
        try:
            tokens = open_tokens(out)
        except FileNotFoundError:
            tokens = recall_tokens(spec, self.study.corpus_clips, out)
        return TokenSource(tokens, Symbols(spec), {})


class AudioCorpus(Corpus):
    """Recordings that a codec turns into tokens."""

    name: ClassVar[str]  # in a study's `corpus`

    @abstractmethod
    def audio(self, folder: Path, say: Callable[[str], None]) -> AudioSet:
        """The recordings; made ones are kept in the folder."""

    @abstractmethod
    def train_codec(self, audio: AudioSet, say: Callable[[str], None]) -> MelVQ:
        """The stand-in codec, trained on the training side. Raises UserError where the audio does not suffice."""

    def content(self) -> str:
        """Digest of the recordings' ids and bytes; nothing for audio that this program makes."""
        return ""

    def source(self, folder: Path, making: Making) -> TokenSource:
        study, audio = self.study, self.audio(folder, making.say)
        codec, out = self._codec(audio, folder, making)
        making.say(f"coding {len(audio.recordings)} recordings with {study.codec}")
        try:
            tokens = tokenise(audio, codec, str(out), chunk_s=study.chunk_s, min_s=study.min_s, actors=making.actors)
            loaded = codec.on_driver(making.actors is not None).load()
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from error
        return TokenSource(tokens, loaded, sample_rates(audio), self.content())

    def _codec(self, audio: AudioSet, folder: Path, making: Making) -> tuple[CodecSpec, Path]:
        """(the study's codec, folder of its tokens); one that is trained here is the ledger's where it has one."""
        study = self.study
        if not trains_own(study):
            return codec_spec(study.codec, study.codec_weights, making.device), folder / "tokens"
        own = folder / "melvq.npz"
        file = codec_file(making.ledger, folder.name, own, lambda: self.train_codec(audio, making.say))
        return codec_spec("melvq", str(file), "cpu"), folder / ("tokens" if file == own else f"tokens-{file.stem}")


class SyntheticSpeech(AudioCorpus):
    """An invented language spoken by a formant synthesiser, in LJ Speech's layout."""

    name = "synthetic_speech"
    texts = "the synthesiser's own spelling of its invented words"

    def banner(self) -> str:
        return (
            "the audio is SYNTHETIC: an invented language spoken by a formant synthesiser, made by this program; "
            "nothing here says anything about real speech or music"
        )

    def origin(self) -> list[str]:
        return [repr(self._speech()), repr(self.study.melvq()), str(self.study.corpus_clips)]

    def audio(self, folder: Path, say: Callable[[str], None]) -> AudioSet:
        say(f"synthesising {self.study.corpus_clips} clips")
        speech = self._speech()
        root = write_ljspeech(speech, self.study.corpus_clips, folder / "audio")
        return open_ljspeech(root, nominal_rate=speech.sample_rate, name=self.name)

    def train_codec(self, audio: AudioSet, say: Callable[[str], None]) -> MelVQ:
        say("training the stand-in codec")
        study, speech = self.study, self._speech()
        sides = [side_of(r.recording_id, holdout=study.holdout) for r in audio.recordings]
        waves = (utterance(speech, i)[0] for i, side in enumerate(sides) if side == "train")
        try:
            return melvq.train(waves, study.melvq(), epochs=EPOCHS)[0]
        except ValueError as error:
            raise UserError(f"corpus_clips={study.corpus_clips} cannot train melvq: {error}") from error

    def _speech(self) -> SpeechSpec:
        return SpeechSpec(min_s=self.study.min_s, max_s=self.study.chunk_s)


class Recorded(AudioCorpus):
    """Recordings of the user's. What lies at a path that the user gives is known by its layout alone."""

    layout: ClassVar[str]
    wanted: ClassVar[str]  # what to point audio_path at

    @staticmethod
    @abstractmethod
    def read(path: str) -> AudioSet:
        """The audio set at a path. Raises OSError and ValueError."""

    def banner(self) -> str:
        if self.study.audio_path:
            return f"audio: {self.layout} at {self.study.audio_path}"
        return f"audio: {self.layout}; --set audio_path=PATH says where"

    def check(self) -> None:
        study, path = self.study, self.recorded_at()
        audio = listed(type(self), path)
        codec_origin(study, audio)
        if study.text and not any(r.text.strip() for r in audio.recordings):
            raise UserError(
                f"none of {len(audio.recordings)} recordings at {path} has a text, and text="
                f"{','.join(study.text)} needs transcripts; add them to metadata.csv, or set text to nothing"
            )
        if not sample_rates(audio):
            odd = [o for r in audio.recordings[:_LOOKED_AT] for o in read_recording(audio, r, _PROMPTS_RATE, 0.0)[1]]
            raise UserError(f"no recording at {path} can be read: {first_of_each(odd)}; fetch the audio again")

    def origin(self) -> list[str]:
        return recorded_origin(self, self.recorded_at())

    def texts_origin(self) -> str:
        return digest([[r.recording_id, r.text] for r in listed(type(self), self.recorded_at()).recordings])

    def recorded_at(self) -> str:
        if not self.study.audio_path:
            raise UserError(f"this preset reads {self.wanted}; say where it is with --set audio_path=PATH")
        return self.study.audio_path

    def audio(self, folder: Path, say: Callable[[str], None]) -> AudioSet:
        return with_content(type(self), self.recorded_at())

    def train_codec(self, audio: AudioSet, say: Callable[[str], None]) -> MelVQ:
        return train_on_recordings(self.study, audio, f"{self.layout} at {self.recorded_at()}", say)

    def content(self) -> str:
        """The same wherever the recordings lie and whatever their files are called."""
        audio = with_content(type(self), self.recorded_at())
        return digest([[r.recording_id, r.content] for r in audio.recordings])


class LJSpeech(Recorded):
    """LJ Speech, or other recordings laid out like it: a folder or an archive."""

    name = "ljspeech"
    layout = "recordings in LJ Speech's layout"
    wanted = "LJ Speech (a folder or archive)"

    @staticmethod
    def read(path: str) -> AudioSet:
        return open_ljspeech(path)


class FMA(Recorded):
    """The Free Music Archive (Defferrard et al. 2017, arXiv 1612.01840)."""

    name = "fma"
    layout = "recordings in FMA's layout"
    wanted = "FMA (fma_metadata and fma_large)"

    @staticmethod
    def read(path: str) -> AudioSet:
        return open_fma(path)


class TelephonePrompts(Recorded):
    """The prompts of the Asterisk telephone exchange, laid out like LJ Speech; by default in the user's cache."""

    name = "asterisk"
    layout = "recordings in LJ Speech's layout, of 8 kHz"

    @staticmethod
    def read(path: str) -> AudioSet:
        return open_ljspeech(path, nominal_rate=_PROMPTS_RATE)

    def banner(self) -> str:
        if self.study.audio_path:
            return super().banner()
        return (
            "audio: REAL speech, the telephone prompts of one speaker (asterisk-core-sounds-en, as "
            "benchmarks/fetch_test_audio.py lays them out), 8 kHz"
        )

    def recorded_at(self) -> str:
        path = self.study.audio_path or str(user_cache() / "audio" / "ljspeech")
        if not Path(path).exists():
            home = Path(path).parent if Path(path).name == "ljspeech" else Path("DIR")
            raise UserError(
                f"no audio at {path}: this preset reads real speech, which is not part of the program; fetch it with "
                f"`python benchmarks/fetch_test_audio.py {home} --only ljspeech` (a Debian machine, 19 MB), or point "
                "--set audio_path=PATH at a folder laid out like LJ Speech"
            )
        return path


_BY_NAME: Mapping[str, type[Corpus]] = {
    RECALL: PlantedRecall,
    SyntheticSpeech.name: SyntheticSpeech,
    LJSpeech.name: LJSpeech,
    FMA.name: FMA,
    TelephonePrompts.name: TelephonePrompts,
}


def corpus_of(study: Study) -> Corpus:
    """The corpus that a study names."""
    return _BY_NAME[study.corpus](study)


@functools.cache
def listed(kind: type[Recorded], path: str) -> AudioSet:
    """The audio set at a path, listed once per process. Raises UserError where nothing can be listed."""
    try:
        audio = replace(kind.read(path), name=kind.layout)
    except (OSError, ValueError) as error:
        raise UserError(f"audio_path={path}: {error}") from error
    if not audio.recordings:
        raise UserError(
            f"audio_path={path} lists no recording of {kind.name}: {audio.entries} entries were read; "
            f"{first_of_each(audio.oddities)}; point it at the data set's own layout"
        )
    return audio


@functools.cache
def with_content(kind: type[Recorded], path: str) -> AudioSet:
    """The same with the content of each recording, which is read once per machine."""
    return with_contents(listed(kind, path), user_cache() / "content", lambda line: print(f"  {line}", flush=True))


@functools.cache
def recorded_origin(corpus: Recorded, path: str) -> list[str]:
    """Once per process: every cell of a study asks, and it looks into the recordings."""
    return [corpus.name, corpus.content(), codec_origin(corpus.study, listed(type(corpus), path))]
