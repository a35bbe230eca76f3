"""LJ Speech 1.1 (Ito & Johnson 2017): one speaker, 13,100 sentences, 24 hours at 22,050 Hz.

Layout: ``metadata.csv`` with lines ``id|transcription|normalised transcription`` (no quoting) and ``wavs/{id}.wav``,
in a folder, in a zip or in the published tar.bz2, at the top or inside ``LJSpeech-1.1/``.
"""

from __future__ import annotations

from pathlib import Path

from data.audio_files import below, open_files
from data.audio_io import AudioSet, Oddity, Recording

SAMPLE_RATE = 22_050


def parse_metadata(text: str) -> tuple[dict[str, str], list[Oddity]]:
    """Transcript by id (the normalised one where there is one), and the lines that could not be used."""
    transcripts: dict[str, str] = {}
    odd: list[Oddity] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("|")
        name = fields[0].strip()
        if len(fields) < 2 or not name:
            odd.append(Oddity(name or f"line {number}", "metadata", f"line {number} has no id|text", True))
        elif name in transcripts:
            odd.append(Oddity(name, "metadata", f"line {number} repeats the id", True))
        else:
            transcripts[name] = (fields[2] if len(fields) > 2 and fields[2].strip() else fields[1]).strip()
    return transcripts, odd


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
        cache: where a tar is unpacked, once (default: beside it).
        nominal_rate: Hz; files at another rate are listed as odd and resampled. None accepts any.
    Returns:
        An AudioSet whose recordings are the ids of metadata.csv in sorted order; wavs without a metadata line
        and lines without a wav are listed among the oddities.
    Raises:
        FileNotFoundError: nothing at ``path``, or no metadata.csv below it. UnicodeDecodeError never: stray bytes
        become U+FFFD.
    """
    found = below(open_files(path, cache), "metadata.csv")
    if found is None:
        raise FileNotFoundError(f"no metadata.csv in {path}; LJ Speech has metadata.csv (id|text|normalised) and wavs/")
    transcripts, odd = parse_metadata(found.read("metadata.csv").decode("utf-8-sig", errors="replace"))
    wavs = {n.removeprefix("wavs/").removesuffix(".wav") for n in found.names() if n.startswith("wavs/")}
    odd += [
        Oddity(w, "metadata", "a file in wavs/ without a line in metadata.csv", True) for w in wavs - set(transcripts)
    ]
    odd += [Oddity(t, "missing", f"wavs/{t}.wav", True) for t in set(transcripts) - wavs]
    recordings = tuple(Recording(i, f"wavs/{i}.wav", transcripts[i]) for i in sorted(wavs & set(transcripts)))
    return AudioSet(name, found, recordings, tuple(sorted(odd)), nominal_rate, nominal_channels=1)
