"""FMA, the Free Music Archive data set (Defferrard et al. 2017, arXiv 1612.01840): 30 s MP3 clips by track number.

Layout: ``fma_metadata/tracks.csv`` (two header rows and an index row) and ``fma_large/NNN/NNNNNN.mp3``, each a
folder or the published zip of the same name. The subsets are nested: small in medium in large in full. Tracks are found
by the number that their files are named by, in whatever folder and audio format they lie.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import pandas as pd

from data._text import decode_text
from data.audio_files import AudioFiles, FolderFiles, ZipFiles, below
from data.audio_io import AUDIO_ENDINGS, AudioSet, Oddity, Recording, hidden_files

SAMPLE_RATE = 44_100

Subset = Literal["small", "medium", "large", "full"]
_NESTED: tuple[Subset, ...] = ("small", "medium", "large", "full")


def parse_tracks(data: bytes, subset: Subset = "large") -> pd.DataFrame:
    """Tracks of a subset, indexed by track id, with columns ``title``, ``genre_top`` and ``split`` (may be empty).

    Raises ValueError where the two header rows of FMA's tracks.csv are not there or the subset has another name.
    """
    if subset not in _NESTED:
        raise ValueError(f"subset={subset!r} is not one of {', '.join(_NESTED)}")
    try:
        table = pd.read_csv(io.StringIO(decode_text(data)), index_col=0, header=[0, 1], low_memory=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise ValueError(f"tracks.csv is no table ({error}); use FMA's fma_metadata/tracks.csv") from error
    needed = [("set", "subset"), ("set", "split"), ("track", "genre_top"), ("track", "title")]
    absent = [f"{a}.{b}" for a, b in needed if (a, b) not in table.columns]
    if absent:
        raise ValueError(f"tracks.csv lacks the columns {', '.join(absent)}; use FMA's fma_metadata/tracks.csv")
    wanted = table[table[("set", "subset")].isin(_NESTED[: _NESTED.index(subset) + 1])]
    plain = pd.DataFrame({b: wanted[(a, b)].fillna("") for a, b in needed[1:]})
    numbers = pd.to_numeric(pd.Series(wanted.index, index=wanted.index), errors="coerce")
    plain = plain[numbers.notna().to_numpy()]
    plain.index = plain.index.astype(int)
    return plain[~plain.index.duplicated()].sort_index()


def track_path(track_id: int) -> str:
    """``NNN/NNNNNN.mp3``, the place of a track inside its subset's folder."""
    return f"{track_id // 1000:03d}/{track_id:06d}.mp3"


def _part(root: Path, folder: str, landmark: str | None = None) -> AudioFiles | None:
    if (root / folder).is_dir():
        return FolderFiles(root / folder)
    archive = root / f"{folder}.zip"
    if not archive.is_file():
        return None
    inside = ZipFiles(archive, f"{folder}/")
    return inside if inside.names() else below(ZipFiles(archive), landmark) if landmark else ZipFiles(archive)


def open_fma(root: str | Path, *, subset: Subset = "large") -> AudioSet:
    """List an FMA subset from the folder that holds fma_metadata and fma_{subset} (folders or zips).

    Texts are ``genre: title``. Tracks of the metadata without an MP3 and MP3s without a track are listed among
    the oddities. Raises FileNotFoundError naming the missing part, ValueError for a damaged archive or list.
    """
    root = Path(root)
    metadata = _part(root, "fma_metadata", "tracks.csv")
    audio = _part(root, f"fma_{subset}")
    if metadata is None or audio is None:
        part = "fma_metadata/tracks.csv" if metadata is None else f"fma_{subset}/NNN/NNNNNN.mp3"
        raise FileNotFoundError(f"no {part} in {root}; put FMA's folders or zips there")
    tracks = parse_tracks(metadata.read("tracks.csv"), subset)
    files = _by_track(audio.names())
    odd = hidden_files(audio)
    recordings = []
    for track, row in tracks.iterrows():
        number = int(str(track))
        found = files.pop(number, [])
        text = ": ".join(str(part) for part in (row["genre_top"], row["title"]) if part)
        chosen = track_path(number) if track_path(number) in found else found[0] if len(found) == 1 else None
        if chosen is not None:
            recordings.append(Recording(f"{number:06d}", chosen, text))
        elif found:
            odd.append(Oddity(f"{number:06d}", "metadata", f"several files: {', '.join(found)}", True))
        else:
            odd.append(Oddity(f"{number:06d}", "missing", track_path(number), True))
    odd += [Oddity(Path(p).stem, "metadata", f"{p} has no row in tracks.csv", True) for f in files.values() for p in f]
    return AudioSet("fma", audio, tuple(recordings), tuple(sorted(odd)), SAMPLE_RATE, entries=len(tracks))


def _by_track(names: list[str]) -> dict[int | str, list[str]]:
    """Audio files by the number they are named by; by their name where that is none."""
    found: dict[int | str, list[str]] = {}
    for name in names:
        if name.lower().endswith(AUDIO_ENDINGS):
            stem = Path(name).stem
            found.setdefault(int(stem) if stem.isascii() and stem.isdigit() else stem, []).append(name)
    return found
