"""LJ Speech 1.1 (Ito & Johnson 2017): one speaker, 13,100 sentences, 24 hours at 22,050 Hz.

Layout: ``metadata.csv`` with lines ``id|transcription|normalised transcription`` (no quoting) and ``wavs/{id}.wav``,
in a folder, in a zip or in the published tar.bz2, at the top or inside ``LJSpeech-1.1/``. Sets made alike differ in
small things, which are followed where they leave no doubt: a linked ``wavs``, ids written as ``wavs/{id}.wav`` or
``{id}.wav``, other endings (``.WAV``, ``.flac``), files next to the list, a list in UTF-16.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data._text import REPLACED, decode_text, lines
from data.audio_files import below, open_files
from data.audio_io import AUDIO_ENDINGS, AudioSet, Oddity, Recording, hidden_files

SAMPLE_RATE = 22_050
WAVS = "wavs"
_SHOWN = 60


def plain_id(name: str) -> str:
    """The id in a path, an id with an ending, or an id: without ``wavs/``, what is above it, and an audio ending."""
    parts = [p for p in name.strip().replace("\\", "/").split("/") if p not in ("", ".")]
    folders = [i for i, part in enumerate(parts[:-1]) if part.lower() == WAVS]
    plain = "/".join(parts[folders[-1] + 1 if folders else 0 :])
    ending = next((e for e in AUDIO_ENDINGS if plain.lower().endswith(e)), "")
    return plain[: len(plain) - len(ending)] or plain


def parse_metadata(text: str) -> tuple[dict[str, str], list[Oddity]]:
    """Transcript by plain id (the normalised one where there is one), and the lines that could not be used."""
    transcripts: dict[str, str] = {}
    odd: list[Oddity] = []
    for number, line in enumerate(lines(text), start=1):
        if not line.strip():
            continue
        fields = line.split("|")
        name = plain_id(fields[0])
        if len(fields) < 2 or not name:
            shown = line[:_SHOWN] + ("…" if len(line) > _SHOWN else "")
            odd.append(Oddity(name[:_SHOWN] or f"line {number}", "metadata", f"no id|text: {shown!r}", True))
        elif name in transcripts:
            odd.append(Oddity(name, "metadata", f"line {number} repeats the id", True))
        else:
            transcripts[name] = (fields[2] if len(fields) > 2 and fields[2].strip() else fields[1]).strip()
            if REPLACED in line:
                odd.append(Oddity(name, "metadata", f"line {number} holds bytes that are not UTF-8", False))
    return transcripts, odd


def _by_id(names: Iterable[str]) -> dict[str, list[str]]:
    """Audio files by plain id; those in ``wavs`` hide others of the same id."""
    inside: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    for name in names:
        if name.lower().endswith(AUDIO_ENDINGS):
            found = inside if name.split("/")[0].lower() == WAVS else beside
            found.setdefault(plain_id(name), []).append(name)
    return beside | inside


def _choose(identity: str, found: list[str]) -> str | None:
    """The file of an id: the only one, or the one named as published; None where several could be meant."""
    published = f"{WAVS}/{identity}.wav"
    return found[0] if len(found) == 1 else published if published in found else None


def open_ljspeech(
    path: str | Path,
    *,
    cache: str | Path | None = None,
    nominal_rate: int | None = SAMPLE_RATE,
    name: str = "ljspeech",
) -> AudioSet:
    """List LJ Speech, or any single-speaker set laid out like it, from a folder, .zip or .tar.bz2.

    Args:
        path: the folder or archive; the layout may lie one or more folders down.
        cache: where a tar is unpacked, once (default: next to it).
        nominal_rate: Hz; files at another rate are listed as odd and resampled. None accepts any.
    Returns:
        An AudioSet whose recordings are the ids of metadata.csv in sorted order; wavs without a metadata line
        and lines without a wav are listed among the oddities.
    Raises:
        FileNotFoundError: nothing at ``path``, or no metadata.csv below it. ValueError: a damaged archive.
        UnicodeDecodeError never: stray bytes become U+FFFD, and are listed.
    """
    found = below(open_files(path, cache), "metadata.csv")
    if found is None:
        raise FileNotFoundError(f"no metadata.csv in {path}; LJ Speech has metadata.csv (id|text|normalised) and wavs/")
    text = decode_text(found.read("metadata.csv"))
    transcripts, odd = parse_metadata(text)
    files = _by_id(found.names())
    recordings = []
    for identity in sorted(transcripts):
        chosen = _choose(identity, files.get(identity, []))
        if chosen is not None:
            recordings.append(Recording(identity, chosen, transcripts[identity]))
        elif identity in files:
            odd.append(Oddity(identity, "metadata", f"several files: {', '.join(files[identity])}", True))
        else:
            odd.append(Oddity(identity, "missing", f"{WAVS}/{identity}.wav", True))
    odd += _unlisted(found.names(), transcripts) + hidden_files(found)
    entries = sum(bool(line.strip()) for line in lines(text))
    return AudioSet(name, found, tuple(recordings), tuple(sorted(odd)), nominal_rate, 1, entries)


def _unlisted(names: Iterable[str], transcripts: dict[str, str]) -> list[Oddity]:
    inside = {plain_id(n) for n in names if n.split("/")[0].lower() == WAVS}
    what = f"a file in {WAVS}/ without a line in metadata.csv"
    return [Oddity(i, "metadata", what, True) for i in inside - set(transcripts)]
