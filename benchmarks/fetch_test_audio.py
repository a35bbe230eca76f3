"""Fetch real audio for experiments and slow tests: two Debian packages laid out as LJ Speech and as FMA.

    python benchmarks/fetch_test_audio.py OUT

makes OUT/ljspeech (the telephone prompts of asterisk-core-sounds-en-wav: one speaker, 8 kHz, about 25 minutes; its
files of silence are left out) and OUT/fma (the pieces of singularity-music as 30 s MP3s). It needs apt-get and dpkg-
deb, hence a Debian machine. The prompts' transcripts are in asterisk-core-sounds-en; tones, and the few prompts that it
does not list, get no text. Nothing here is committed: the licences are in the packages.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import soundfile

SPEECH_PACKAGES = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")  # the audio, its transcripts
MUSIC_PACKAGES = ("singularity-music",)
TRACK_S = 30.0


def unpack(packages: Sequence[str], into: Path) -> Path:
    """Download Debian packages with apt-get and unpack them; raises RuntimeError naming the remedy."""
    into.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["apt-get", "download", *packages], cwd=into, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        names = " ".join(packages)
        raise RuntimeError(f"apt-get download {names} failed; run apt-get update first.\n{done.stderr.strip()}")
    for archive in into.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(into / "tree")], check=True)
    return into / "tree"


def transcripts(tree: Path) -> dict[str, str]:
    """What is said in each prompt, by its path without the ending, such as digits/1; tones have no entry.

    Raises RuntimeError where the packages hold no list of them.
    """
    found = next(tree.rglob("core-sounds-en.txt.gz"), None)
    if found is None:
        raise RuntimeError(f"no core-sounds-en.txt.gz in {' '.join(SPEECH_PACKAGES)}; their layout has changed")
    pairs = (line.split(":", 1) for line in gzip.decompress(found.read_bytes()).decode().split("\n") if ":" in line)
    texts = {name.strip(): text.strip().replace("|", " ") for name, text in pairs}
    return {name: text for name, text in texts.items() if text and not text.startswith(("[", "<"))}


def lay_out_speech(tree: Path, out: Path) -> int:
    """Write metadata.csv and wavs/ from the prompts below ``tree``; returns how many."""
    (out / "wavs").mkdir(parents=True)
    texts, listed = transcripts(tree), []
    for path in sorted(tree.rglob("*.wav")):
        parts = path.relative_to(tree).parts
        folders = parts[parts.index("sounds") + 2 :] if "sounds" in parts else (path.name,)
        if folders[0] == "silence":
            continue
        name = "_".join(folders).removesuffix(".wav")
        said = texts.get("/".join(folders).removesuffix(".wav"), "")
        shutil.copyfile(path, out / "wavs" / f"{name}.wav")
        listed.append(f"{name}|{said}|{said}\n")
    (out / "metadata.csv").write_text("".join(listed), encoding="utf-8")
    return len(listed)


def lay_out_music(tree: Path, out: Path) -> int:
    """Cut the pieces below ``tree`` into 30 s MP3s with FMA's names and tracks.csv; returns how many."""
    rows = [",set,set,track,track", ",split,subset,genre_top,title", "track_id,,,,"]
    number = 0
    for path in sorted(tree.rglob("*.ogg")):
        with soundfile.SoundFile(path) as piece:
            size = int(TRACK_S * piece.samplerate)
            for part in range(piece.frames // size):
                number += 1
                place = out / "fma_large" / f"{number // 1000:03d}" / f"{number:06d}.mp3"
                place.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(place, piece.read(size, dtype="float32"), piece.samplerate, format="MP3")
                rows.append(f'{number},training,large,Electronic,"{path.stem}, part {part}"')
    (out / "fma_metadata").mkdir(parents=True)
    (out / "fma_metadata" / "tracks.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=["ljspeech", "fma"], help="fetch one of the two")
    arguments = parser.parse_args(argv)
    jobs = {"ljspeech": (SPEECH_PACKAGES, lay_out_speech), "fma": (MUSIC_PACKAGES, lay_out_music)}
    for name, (packages, lay_out) in jobs.items():
        target = arguments.out / name
        if arguments.only not in (None, name) or target.is_dir():
            continue
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
            aside = Path(scratch) / name
            n = lay_out(unpack(packages, Path(scratch) / "package"), aside)
            aside.rename(target)
        print(f"{n} files of {packages[0]} laid out in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
