"""Fetch real audio for experiments and slow tests: two Debian packages laid out as LJ Speech and as FMA.

    python benchmarks/fetch_test_audio.py OUT

makes OUT/ljspeech (the telephone prompts of asterisk-core-sounds-en-wav: one speaker, 8 kHz, about 25 minutes; its
files of silence are left out) and OUT/fma (the pieces of singularity-music as 30 s MP3s). It needs apt-get and dpkg-
deb, hence a Debian machine. The
prompts come without transcripts: the text of a clip is the words of its file's name, which for a prompt is close to
what is said. Nothing here is committed: the licences are in the packages.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import soundfile

SPEECH_PACKAGE = "asterisk-core-sounds-en-wav"
MUSIC_PACKAGE = "singularity-music"
TRACK_S = 30.0


def unpack(package: str, into: Path) -> Path:
    """Download a Debian package with apt-get and unpack it; raises RuntimeError naming the remedy."""
    into.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["apt-get", "download", package], cwd=into, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"apt-get download {package} failed; run apt-get update first.\n{done.stderr.strip()}")
    (archive,) = into.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(into / "tree")], check=True)
    return into / "tree"


def lay_out_speech(tree: Path, out: Path) -> int:
    """Write metadata.csv and wavs/ from the prompts below ``tree``; returns how many."""
    (out / "wavs").mkdir(parents=True)
    lines = []
    for path in sorted(tree.rglob("*.wav")):
        parts = path.relative_to(tree).parts
        folders = parts[parts.index("sounds") + 2 :] if "sounds" in parts else (path.name,)
        if folders[0] == "silence":
            continue
        name = "_".join(folders).removesuffix(".wav")
        words = path.stem.replace("-", " ").replace("_", " ")
        shutil.copyfile(path, out / "wavs" / f"{name}.wav")
        lines.append(f"{name}|{words}|{words}\n")
    (out / "metadata.csv").write_text("".join(lines))
    return len(lines)


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
    (out / "fma_metadata" / "tracks.csv").write_text("\n".join(rows) + "\n")
    return number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=["ljspeech", "fma"], help="fetch one of the two")
    arguments = parser.parse_args(argv)
    jobs = {"ljspeech": (SPEECH_PACKAGE, lay_out_speech), "fma": (MUSIC_PACKAGE, lay_out_music)}
    for name, (package, lay_out) in jobs.items():
        target = arguments.out / name
        if arguments.only not in (None, name) or target.is_dir():
            continue
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
            aside = Path(scratch) / name
            n = lay_out(unpack(package, Path(scratch) / "package"), aside)
            aside.rename(target)
        print(f"{n} files of {package} laid out in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
