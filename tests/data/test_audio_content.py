"""A recording is identified by its bytes; damaged archives, odd layouts and odd characters are listed, never fatal."""

from __future__ import annotations

import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import _content
from data._text import decode_text, lines
from data.audio_files import FolderFiles, ZipFiles, open_files
from data.audio_io import ChangedAudioError, counts, first_of_each, read_recording, with_contents
from data.fma import open_fma
from data.ljspeech import open_ljspeech, parse_metadata, plain_id

RATE = 8_000
LONG_AGO = 10**9  # seconds


def noise(place: Path, seed: int, seconds: float = 0.2, **how: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(place, 0.3 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)), RATE, **how)


def lj(root: Path, ids: str = "abc", seed: int = 0) -> Path:
    for i, name in enumerate(ids):
        noise(root / "wavs" / f"{name}.wav", seed + i)
    (root / "metadata.csv").write_text("".join(f"{n}|said {n}|said {n}\n" for n in ids), encoding="utf-8")
    return root


def zipped(root: Path, to: Path, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(to, "w", compression) as archive:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(root))
    return to


def content(path: Path, cache: Path | None = None) -> dict[str, str]:
    return {r.recording_id: r.content for r in with_contents(open_ljspeech(path), cache).recordings}


def test_content_is_of_the_bytes_wherever_they_lie(tmp_path: Path) -> None:
    a, b, c = lj(tmp_path / "a"), lj(tmp_path / "b"), lj(tmp_path / "c", seed=9)
    assert content(a) == content(b) == content(zipped(a, tmp_path / "a.zip"))
    assert all(x != y for x, y in zip(content(a).values(), content(c).values(), strict=True))


def test_kept_digests_follow_a_file_replaced_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_content, "_FRESH_NS", 0)
    root, cache = lj(tmp_path / "a"), tmp_path / "cache"
    for wav in (root / "wavs").iterdir():
        os.utime(wav, (LONG_AGO, LONG_AGO))
    before, read = content(root, cache), []
    real = FolderFiles._digest
    monkeypatch.setattr(FolderFiles, "_digest", lambda self, name: read.append(name) or real(self, name))
    assert content(root, cache) == before
    assert read == []
    replaced = root / "wavs" / "b.wav"
    time.sleep(0.02)
    noise(replaced, 77)  # of the same size, into the same inode, with the old time of change
    os.utime(replaced, (LONG_AGO, LONG_AGO))
    after = content(root, cache)
    assert read == ["wavs/b.wav"]
    assert {name for name in after if after[name] != before[name]} == {"b"}


def test_long_reading_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_content, "_LONG_BYTES", 1_000)
    monkeypatch.setattr(_content, "_FRESH_NS", 0)
    said: list[str] = []
    for path in (lj(tmp_path / "a"), zipped(tmp_path / "a", tmp_path / "a.zip")):
        time.sleep(0.02)
        for _ in range(2):
            with_contents(open_ljspeech(path), tmp_path / "cache", said.append)
    assert said == ["reading 3 files (0 GB) once, to know their content"] * 2


def test_a_file_written_just_now_is_read_again(tmp_path: Path) -> None:
    root, cache = lj(tmp_path / "a"), tmp_path / "cache"
    content(root, cache)
    assert not list(cache.glob("*.json"))


def test_a_file_that_changes_after_its_content_was_told_is_not_used(tmp_path: Path) -> None:
    audio = with_contents(open_ljspeech(lj(tmp_path / "a"), nominal_rate=RATE))
    noise(tmp_path / "a" / "wavs" / "a.wav", 5)
    (tmp_path / "a" / "wavs" / "b.wav").unlink()
    for place, message in enumerate(["a.wav has changed since", "b.wav could be read before"]):
        with pytest.raises(ChangedAudioError, match=message):
            read_recording(audio, audio.recordings[place], RATE, 0.1)
    assert read_recording(audio, audio.recordings[2], RATE, 0.1)[1] == []


def test_copies_of_a_recording_are_one_unit(tmp_path: Path) -> None:
    root = lj(tmp_path / "a", "abcde")
    for copy in "bd":
        (root / "wavs" / f"{copy}.wav").write_bytes((root / "wavs" / "a.wav").read_bytes())
    (root / "wavs" / "c.wav").write_bytes(b"")
    (root / "wavs" / "e.wav").write_bytes(b"")  # nothing is no copy of nothing
    audio = with_contents(open_ljspeech(root))
    assert [r.unit for r in audio.recordings] == ["a", "a", "c", "a", "e"]
    assert counts(audio.oddities) == {"copy (kept on its original's side)": 2}
    assert "first b (the same bytes as a)" in first_of_each(audio.oddities)


def damage(path: Path, name: str) -> None:
    """Overwrite the compressed bytes of a member."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(name)
    data = bytearray(path.read_bytes())
    start = info.header_offset + 30 + sum(struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30]))
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_are_skipped_and_told(tmp_path: Path, compression: int) -> None:
    path = zipped(lj(tmp_path / "a"), tmp_path / "a.zip", compression)
    damage(path, "wavs/b.wav")
    audio = with_contents(pickle.loads(pickle.dumps(open_ljspeech(path, nominal_rate=RATE))))
    odd = [read_recording(audio, r, RATE, 0.1)[1] for r in audio.recordings]
    assert [[o.kind for o in some] for some in odd] == [[], ["unreadable"], []]
    assert audio.recordings[1].content == _content.UNREADABLE


@pytest.mark.parametrize("spoilt", ["encrypted", "unknown packing"])
def test_members_that_cannot_be_unpacked_are_told(tmp_path: Path, spoilt: str) -> None:
    path = zipped(lj(tmp_path / "a"), tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    for mark, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        place = data.index(mark, data.index(b"wavs/b.wav", 0 if mark[2] == 3 else data.index(mark)) - 60)
        if spoilt == "encrypted":
            data[place + flags] |= 1
        else:
            data[place + method] = 97
    path.write_bytes(bytes(data))
    files = open_files(path)
    with pytest.raises(OSError, match=r"wavs/b\.wav in a\.zip: "):
        files.read("wavs/b.wav")
    assert files.contents(["wavs/a.wav", "wavs/b.wav"])["wavs/b.wav"] == _content.UNREADABLE


@pytest.mark.parametrize("name", ["a.zip", "a.tar.bz2", "a.tar.gz", "a.tar.xz", "a.tar"])
@pytest.mark.parametrize("data", [b"no archive at all" * 50, b""])
def test_what_is_no_archive_is_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        open_ljspeech(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tar_of_the_same_name_is_unpacked_anew(tmp_path: Path) -> None:
    import tarfile

    found = []
    for seed in (0, 9):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(lj(tmp_path / str(seed), seed=seed), "lj")
        found.append(content(tmp_path / "a.tar"))
    assert found == [content(tmp_path / "0"), content(tmp_path / "9")]


def test_ids_and_files_are_brought_together_where_there_is_no_doubt(tmp_path: Path) -> None:
    root, store = tmp_path / "lj", tmp_path / "store"
    noise(store / "a.wav", 0)
    noise(store / "b.WAV", 1, format="WAV")
    noise(store / "c.flac", 2)
    for ending in ("flac", "ogg"):
        noise(store / f"d.{ending}", 3)
    noise(store / "._a.wav", 4)
    noise(store / "_e.wav", 5)
    root.mkdir()
    (root / "wavs").symlink_to(store, target_is_directory=True)
    (store / "loop").symlink_to(store, target_is_directory=True)
    listed = "wavs/a.wav|one\nb.wav|two\n./wavs/c|three\nd|four\n_e|five\nf|six\nwavs\\a.wav|again\n"
    (root / "metadata.csv").write_bytes("\ufeff".encode("utf-16-le") + listed.replace("\n", "\r\n").encode("utf-16-le"))
    audio = open_ljspeech(root)
    assert {r.recording_id: (r.name, r.text) for r in audio.recordings} == {
        "a": ("wavs/a.wav", "one"),
        "b": ("wavs/b.WAV", "two"),
        "c": ("wavs/c.flac", "three"),
        "_e": ("wavs/_e.wav", "five"),
    }
    assert {(o.recording_id, o.kind) for o in audio.oddities} == {
        ("d", "metadata"),
        ("f", "missing"),
        ("a", "metadata"),
        ("wavs/._a.wav", "hidden"),
    }
    assert audio.entries == 7
    assert {plain_id(n) for n in ("x", "x.wav", "wavs/x.FLAC", "/data/LJ/wavs/x.wav", "wavs\\x")} == {"x"}
    assert plain_id("speaker/x.wav") == "speaker/x"


def test_wavs_beside_the_list_are_found(tmp_path: Path) -> None:
    noise(tmp_path / "clips" / "a.wav", 0)
    (tmp_path / "metadata.csv").write_text("clips/a.wav|one\n", encoding="utf-8")
    assert [r.name for r in open_ljspeech(tmp_path).recordings] == ["clips/a.wav"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\v", "\f", "\x1c", "\r"])
def test_transcripts_are_cut_at_line_feeds_alone(mark: str) -> None:
    transcripts, odd = parse_metadata(f"a|one{mark}two\r\nb|three\n")
    assert transcripts == {"a": f"one{mark}two", "b": "three"}
    assert odd == []


def test_text_is_decoded_by_its_mark_and_never_by_the_locale() -> None:
    text = "a|é\u2028ü\nb|ñ\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        assert decode_text(text.encode(encoding)) == text
    assert lines("a\r\nb\n\nc") == ["a", "b", "", "c"]
    assert lines("") == []
    _, odd = parse_metadata(decode_text("a|é\n".encode("latin-1")))
    assert [(o.recording_id, o.skipped, o.detail) for o in odd] == [
        ("a", False, "line 1 holds bytes that are not UTF-8")
    ]


TRACKS = """,set,set,track,track
,split,subset,genre_top,title
track_id,,,,
2,training,small,Hip-Hop,"Food\u2028and more"
10,test,small,,Untitled
140,test,small,,Two
"""


def test_fma_tracks_are_found_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "fma_metadata").mkdir()
    (tmp_path / "fma_metadata" / "tracks.csv").write_bytes(TRACKS.encode("utf-16"))
    store = tmp_path / "store"
    noise(store / "000002.WAV", 0, format="WAV")
    noise(store / "000" / "000010.flac", 1)
    for ending in ("flac", "ogg"):
        noise(store / f"000140.{ending}", 2)
    noise(store / "cover.wav", 3)
    (tmp_path / "fma_large").mkdir()
    (tmp_path / "fma_large" / "music").symlink_to(store, target_is_directory=True)
    audio = open_fma(tmp_path)
    assert {r.name: r.text for r in audio.recordings} == {
        "music/000002.WAV": "Hip-Hop: Food\u2028and more",
        "music/000/000010.flac": "Untitled",
    }
    assert {(o.recording_id, o.kind) for o in audio.oddities} == {("000140", "metadata"), ("cover", "metadata")}
    (tmp_path / "fma_metadata" / "tracks.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tracks\.csv is no table"):
        open_fma(tmp_path)


def test_a_zip_from_windows_is_read(tmp_path: Path) -> None:
    root = lj(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted(p for p in root.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo("a/" + file.relative_to(root).as_posix())
            info.filename = info.filename.replace("/", "\\")
            archive.writestr(info, file.read_bytes())
    files = open_files(tmp_path / "a.zip")
    assert isinstance(files, ZipFiles)
    assert content(tmp_path / "a.zip") == content(root)
