"""Recordings to clips: decode, mix to mono, resample, cut; whatever is wrong with a file is listed, never fatal.

Shape suffixes: N samples, C channels.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from data._content import UNREADABLE
from data.audio_files import AudioFiles

Wave = npt.NDArray[np.float32]
OddKind = Literal["missing", "unreadable", "empty", "not finite", "too short", "truncated", "sample rate", "channels",
                  "metadata", "hidden", "copy"]  # fmt: skip
AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff")
_NO_BYTES = hashlib.sha256(b"").hexdigest()


class ChangedAudioError(ValueError):
    """A file has changed since its content was read; nothing may be computed from it under that identity."""


class Oddity(NamedTuple):
    """Something unexpected in one recording, and whether it was skipped for it or converted."""

    recording_id: str
    kind: OddKind
    detail: str
    skipped: bool


@dataclass(frozen=True)
class Recording:
    """One audio file of a data set: its identity, its name among the set's files, and what is said or played.

    content: SHA-256 of its bytes, or `UNREADABLE`; nothing where nobody asked (see `with_contents`).
    same_as: id of the first recording of the set with the same bytes, nothing for that one itself.
    """

    recording_id: str
    name: str
    text: str = ""
    content: str = ""
    same_as: str = ""

    @property
    def unit(self) -> str:
        """Identifies this recording and its copies, which go to one side of a split and are one unit of resampling."""
        return self.same_as or self.recording_id


@dataclass(frozen=True)
class AudioSet:
    """A listed data set: files, recordings in order of their ids, and the problems met while listing them."""

    name: str
    files: AudioFiles
    recordings: tuple[Recording, ...]
    oddities: tuple[Oddity, ...] = ()
    nominal_rate: int | None = None
    """Sample rate in Hz that the set promises; another rate is listed as odd, and resampled."""
    nominal_channels: int | None = None
    entries: int = 0
    """Lines or rows of the set's list that were read, those without a recording too."""


@dataclass(frozen=True)
class Clip:
    """A piece of a recording: wave_N float32 mono at ``sample_rate`` Hz."""

    clip_id: str
    recording_id: str
    chunk: int
    n_chunks: int
    wave_N: Wave
    sample_rate: int
    text: str

    @property
    def duration_s(self) -> float:
        return len(self.wave_N) / self.sample_rate


def recording_of(clip_id: str) -> str:
    """Id of the recording that a clip of `read_clips` was cut from; an id of another form is its own recording."""
    recording, mark, chunk = clip_id.rpartition("#")
    return recording if mark and chunk.isascii() and chunk.isdigit() else clip_id


def with_contents(
    audio: AudioSet, cache: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> AudioSet:
    """The same set with the content of each recording, and with copies of one recording found by it.

    A copy (the same bytes under another name) is listed as an oddity. Every file is read once; `cache` is a folder
    that keeps the digests, so that a machine reads unchanged files once. `say` reports a long wait.
    """
    found = audio.files.contents([r.name for r in audio.recordings], cache, say)
    first: dict[str, str] = {}
    recordings, copies = [], []
    for recording in audio.recordings:
        content = found[recording.name]
        original = recording.recording_id
        if content not in (UNREADABLE, _NO_BYTES):
            original = first.setdefault(content, original)
        same_as = "" if original == recording.recording_id else original
        recordings.append(replace(recording, content=content, same_as=same_as))
        if same_as:
            copies.append(Oddity(recording.recording_id, "copy", f"the same bytes as {same_as}", False))
    return replace(audio, recordings=tuple(recordings), oddities=tuple(sorted([*audio.oddities, *copies])))


def hidden_files(files: AudioFiles) -> list[Oddity]:
    """Audio files that listing leaves out for what their names begin with."""
    names = (n for n in files.hidden() if n.lower().endswith(AUDIO_ENDINGS))
    return [Oddity(name, "hidden", "left behind by a desktop program", True) for name in names]


def counts(oddities: Iterable[Oddity]) -> dict[str, int]:
    """How many recordings of each kind, e.g. ``{"unreadable (skipped)": 2, "channels (converted)": 1}``."""
    return dict(sorted(Counter(f"{o.kind} ({_treatment(o)})" for o in oddities).items()))


def _treatment(odd: Oddity) -> str:
    if odd.kind == "copy":
        return "kept on its original's side"
    return "skipped" if odd.skipped else "converted"


def first_of_each(oddities: Iterable[Oddity], n: int = 1) -> str:
    """`12 missing (skipped), first a (wavs/a.wav); …`: how many of each kind, and the first n of it; `none` without."""
    by_kind: dict[str, list[Oddity]] = {}
    for odd in oddities:
        by_kind.setdefault(f"{odd.kind} ({_treatment(odd)})", []).append(odd)
    return "; ".join(
        f"{len(some)} {kind}, first " + ", ".join(f"{o.recording_id} ({o.detail})" for o in some[:n])
        for kind, some in sorted(by_kind.items())
    ) or "none"  # fmt: skip


def decode(data: bytes) -> tuple[npt.NDArray[np.float32], int, int]:
    """(wave_NC float32 in [-1, 1], sample rate in Hz, frames the header promised) of a WAV, FLAC, Ogg or MP3 file.

    Raises soundfile.LibsndfileError (a RuntimeError) where libsndfile finds no audio.
    """
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        return file.read(dtype="float32", always_2d=True), file.samplerate, file.frames


def riff_size(data: bytes) -> int:
    """Bytes that the header of a WAV promises for the whole file; 0 for other files and for streamed WAVs."""
    size = int.from_bytes(data[4:8], "little")
    return size + 8 if data[:4] == b"RIFF" and size < 0xFFFFFFFF else 0


def _bytes_of(audio: AudioSet, recording: Recording) -> bytes:
    """Raises OSError, ChangedAudioError."""
    known = recording.content not in ("", UNREADABLE)
    try:
        data = audio.files.read(recording.name)
    except OSError as error:
        if known:
            raise ChangedAudioError(f"{recording.name} could be read before and cannot now: {error}") from error
        raise
    if recording.content and hashlib.sha256(data).hexdigest() != recording.content:
        raise ChangedAudioError(
            f"{recording.name} has changed since its content was read ({recording.content[:12]}); let nothing write "
            "to the audio meanwhile, and run the same command again"
        )
    return data


def sample_rates(audio: AudioSet, n: int = 64) -> dict[int, int]:
    """{sample rate in Hz: files}, the commonest first, from the headers of up to n recordings spread over the set.

    Files that cannot be read are left out: `read_clips` lists them. Empty when none can be read.
    """
    places = np.unique(np.linspace(0, len(audio.recordings) - 1, min(n, len(audio.recordings))).astype(int))
    found: Counter[int] = Counter()
    for place in places:
        try:
            data = audio.files.read(audio.recordings[place].name)
            found[soundfile.info(io.BytesIO(data)).samplerate] += 1
        except (OSError, RuntimeError, ValueError, TypeError):
            continue
    return dict(found.most_common())


def resample(wave_N: Wave, from_rate: int, to_rate: int) -> Wave:
    """Band-limited resampling (soxr, high quality) of a mono wave; rates in Hz."""
    if from_rate == to_rate:
        return wave_N
    import librosa

    return np.asarray(librosa.resample(wave_N, orig_sr=from_rate, target_sr=to_rate), dtype=np.float32)


def chunk_bounds(n: int, sample_rate: int, chunk_s: float, min_s: float) -> list[tuple[int, int]]:
    """[start, stop) in samples of consecutive chunks of ``chunk_s`` seconds; a rest shorter than ``min_s`` is dropped.

    Raises ValueError unless 0 < min_s <= chunk_s.
    """
    if not 0 < min_s <= chunk_s:
        raise ValueError(f"min_s={min_s} must be positive and at most chunk_s={chunk_s} seconds")
    size = round(chunk_s * sample_rate)
    least = max(1, round(min_s * sample_rate))
    return [(a, min(a + size, n)) for a in range(0, n, size) if min(a + size, n) - a >= least]


def read_recording(
    audio: AudioSet, recording: Recording, sample_rate: int, min_s: float
) -> tuple[Wave | None, list[Oddity]]:
    """The whole recording as wave_N at ``sample_rate`` Hz (None when it had to be skipped) and what was odd.

    Raises ChangedAudioError for a file whose content differs from its recording's `content`.
    """
    rid = recording.recording_id
    odd: list[Oddity] = []

    def skip(kind: OddKind, detail: str) -> tuple[None, list[Oddity]]:
        return None, [*odd, Oddity(rid, kind, detail, True)]

    try:
        data = _bytes_of(audio, recording)
    except FileNotFoundError:
        return skip("missing", recording.name)
    except OSError as error:
        return skip("unreadable", str(error))
    if not data:
        return skip("empty", "0 bytes")
    try:
        wave_NC, rate, promised = decode(data)
    except soundfile.LibsndfileError as error:
        return skip("unreadable", error.error_string)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # of a header that promises terabytes, too
        return skip("unreadable", str(error).strip() or type(error).__name__)
    n, channels = wave_NC.shape
    if n == 0:
        return skip("empty", "no samples")
    if n < promised:
        odd.append(Oddity(rid, "truncated", f"{n} of {promised} samples", False))
    elif len(data) < riff_size(data):  # libsndfile silently lowers the sample count of a cut WAV
        odd.append(Oddity(rid, "truncated", f"{len(data)} of {riff_size(data)} bytes", False))
    bad = int((~np.isfinite(wave_NC)).sum())
    if bad:
        return skip("not finite", f"{bad} samples are NaN or infinite")
    if n < min_s * rate:
        return skip("too short", f"{n / rate:.3f} s < {min_s:g} s")
    if audio.nominal_rate is not None and rate != audio.nominal_rate:
        odd.append(Oddity(rid, "sample rate", f"{rate} Hz, not {audio.nominal_rate} Hz", False))
    if audio.nominal_channels is not None and channels != audio.nominal_channels:
        odd.append(Oddity(rid, "channels", f"{channels}, not {audio.nominal_channels}", False))
    return resample(wave_NC.mean(axis=1), rate, sample_rate), odd


def read_clips(
    audio: AudioSet, recording: Recording, *, sample_rate: int, chunk_s: float, min_s: float = 1.0
) -> tuple[list[Clip], list[Oddity]]:
    """Mono clips of at most ``chunk_s`` seconds at ``sample_rate`` Hz, and whatever was odd about the recording.

    Clip ids are ``{recording id}#{chunk}``; every chunk carries the recording's whole text. Never raises for a
    bad file: it comes back in the list instead. Raises ValueError for impossible ``chunk_s`` and ``min_s``, and
    ChangedAudioError (see `read_recording`).
    """
    chunk_bounds(1, 1, chunk_s, min_s)
    wave_N, odd = read_recording(audio, recording, sample_rate, min_s)
    if wave_N is None:
        return [], odd
    bounds = chunk_bounds(len(wave_N), sample_rate, chunk_s, min_s)
    rid = recording.recording_id
    clips = [
        Clip(f"{rid}#{i}", rid, i, len(bounds), wave_N[a:b], sample_rate, recording.text)
        for i, (a, b) in enumerate(bounds)
    ]
    if not clips:
        odd.append(Oddity(rid, "too short", f"{len(wave_N) / sample_rate:.3f} s < {min_s:g} s", True))
    return clips, odd
