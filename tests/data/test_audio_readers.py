from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio_files import FolderFiles, open_files, unpack_tar
from data.audio_io import AudioSet, Recording, chunk_bounds, counts, decode, read_clips, resample
from data.fma import open_fma, parse_tracks, track_path
from data.ljspeech import open_ljspeech, parse_metadata

RATE = 22_050


def sine(seconds: float, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def lj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LJ Speech with everything wrong that can be: one good file, a long one, and eight odd ones."""
    root = tmp_path_factory.mktemp("lj") / "LJSpeech-1.1"
    wavs = root / "wavs"
    wavs.mkdir(parents=True)
    soundfile.write(wavs / "good.wav", sine(2.0), RATE)
    soundfile.write(wavs / "long.wav", sine(20.5), RATE)
    soundfile.write(wavs / "short.wav", sine(0.2), RATE)
    soundfile.write(wavs / "stereo.wav", np.stack([sine(2.0), -sine(2.0)], axis=1), RATE)
    soundfile.write(wavs / "rate.wav", sine(2.0, 16_000), 16_000)
    nan = sine(2.0)
    nan[100] = np.nan
    soundfile.write(wavs / "nan.wav", nan, RATE, subtype="FLOAT")
    soundfile.write(wavs / "nosamples.wav", np.zeros(0, dtype=np.float32), RATE)
    (wavs / "empty.wav").write_bytes(b"")
    (wavs / "garbage.wav").write_bytes(b"not audio at all" * 100)
    soundfile.write(wavs / "unlisted.wav", sine(2.0), RATE)
    names = ["good", "long", "short", "stereo", "rate", "nan", "nosamples", "empty", "garbage", "gone"]
    lines = [f'{n}|Raw "{n}" 2|raw {n} two' for n in names] + ["a line without bars", "good|again|again"]
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


def read_all(audio: AudioSet, **how: float) -> tuple[dict[str, np.ndarray], list]:
    clips, odd = {}, list(audio.oddities)
    for recording in audio.recordings:
        some, strange = read_clips(audio, recording, sample_rate=16_000, chunk_s=8.0, **how)
        clips.update({c.clip_id: c.wave_N for c in some})
        odd += strange
    return clips, odd


def test_odd_files_are_listed_and_never_fatal(lj: Path) -> None:
    audio = open_ljspeech(lj)
    clips, odd = read_all(audio, min_s=0.5)
    assert sorted(clips) == ["good#0", "long#0", "long#1", "long#2", "rate#0", "stereo#0"]
    by_id = {(o.recording_id, o.kind): o.skipped for o in odd}
    assert by_id == {
        ("short", "too short"): True,
        ("stereo", "channels"): False,
        ("rate", "sample rate"): False,
        ("nan", "not finite"): True,
        ("nosamples", "empty"): True,
        ("empty", "empty"): True,
        ("garbage", "unreadable"): True,
        ("gone", "missing"): True,
        ("unlisted", "metadata"): True,
        ("a line without bars", "metadata"): True,
        ("good", "metadata"): True,
    }
    assert counts(odd)["empty (skipped)"] == 2
    assert [len(clips[f"long#{i}"]) for i in range(3)] == [128_000, 128_000, 72_000]
    assert np.abs(clips["stereo#0"]).max() < 1e-4  # opposite channels cancel, up to 16 bits
    assert next(r for r in audio.recordings if r.recording_id == "good").text == "raw good two"


@pytest.mark.parametrize("kind", ["zip", "tar.bz2"])
def test_archives_read_like_the_folder(lj: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"LJSpeech-1.1.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(lj.rglob("*")):
                archive.write(file, f"LJSpeech-1.1/{file.relative_to(lj)}")
    else:
        with tarfile.open(path, "w:bz2") as archive:
            archive.add(lj, "LJSpeech-1.1")
    expected, odd = read_all(open_ljspeech(lj))
    audio = pickle.loads(pickle.dumps(open_ljspeech(path)))
    found, odd_too = read_all(audio)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[k], expected[k]) for k in expected)
    assert counts(odd) == counts(odd_too)


def test_a_damaged_tar_leaves_nothing_behind(lj: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(lj, "lj")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises((tarfile.TarError, EOFError)):
        unpack_tar(path, tmp_path / "into")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def test_a_tar_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("../outside.wav")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"RIFF"))
    with pytest.raises(tarfile.TarError):
        unpack_tar(path, tmp_path / "place" / "into")
    assert not (tmp_path / "place" / "outside.wav").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv in"):
        open_ljspeech(tmp_path)
    with pytest.raises(FileNotFoundError, match="no audio data at"):
        open_ljspeech(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"fma_metadata/tracks\.csv"):
        open_fma(tmp_path)
    (tmp_path / "a.rar").touch()
    with pytest.raises(ValueError, match="neither a folder"):
        open_files(tmp_path / "a.rar")


def test_metadata_without_normalised_text_falls_back_to_the_raw_one() -> None:
    transcripts, odd = parse_metadata('LJ1|He said "no|way"\nLJ2|only raw\nLJ3|raw|\n')
    assert transcripts == {"LJ1": 'way"', "LJ2": "only raw", "LJ3": "raw"}
    assert odd == []


TRACKS = """,set,set,track,track
,split,subset,genre_top,title
track_id,,,,
2,training,small,Hip-Hop,Food
10,test,medium,,Untitled
1003,training,large,Rock,"A, b"
140,training,full,Rock,Too long
"""


def write_fma(root: Path) -> None:
    (root / "fma_metadata").mkdir(parents=True)
    (root / "fma_metadata" / "tracks.csv").write_text(TRACKS)
    for number, seconds in ((2, 3.0), (1003, 2.0), (7, 2.0)):
        place = root / "fma_large" / track_path(number)
        place.parent.mkdir(parents=True, exist_ok=True)
        wave = np.stack([sine(seconds, 44_100), 0.5 * sine(seconds, 44_100)], axis=1)
        soundfile.write(place, wave, 44_100, format="MP3")


def test_fma_subsets_are_nested_and_titles_survive() -> None:
    assert list(parse_tracks(TRACKS.encode(), "large").index) == [2, 10, 1003]
    assert list(parse_tracks(TRACKS.encode(), "small").index) == [2]
    assert list(parse_tracks(TRACKS.encode(), "full").index) == [2, 10, 140, 1003]
    assert parse_tracks(TRACKS.encode()).loc[1003, "title"] == "A, b"
    with pytest.raises(ValueError, match=r"lacks the columns set\.subset"):
        parse_tracks(TRACKS.replace("subset", "subsets").encode())
    with pytest.raises(ValueError, match="is not one of"):
        parse_tracks(TRACKS.encode(), "huge")  # type: ignore[arg-type]


@pytest.mark.parametrize("zipped", [False, True])
def test_fma_reads_mp3_from_folder_and_zip(tmp_path: Path, zipped: bool) -> None:
    write_fma(tmp_path)
    if zipped:
        for part in ("fma_metadata", "fma_large"):
            with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
                for file in sorted((tmp_path / part).rglob("*.*")):
                    archive.write(file, f"{part}/{file.relative_to(tmp_path / part)}")
                    file.unlink()
            for folder in sorted((tmp_path / part).rglob("*"), reverse=True):
                folder.rmdir()
            (tmp_path / part).rmdir()
    audio = open_fma(tmp_path)
    texts = {r.recording_id: r.text for r in audio.recordings}
    assert texts == {"000002": "Hip-Hop: Food", "001003": "Rock: A, b"}
    assert {(o.recording_id, o.kind) for o in audio.oddities} == {("000007", "metadata"), ("000010", "missing")}
    (clip,), odd = read_clips(audio, audio.recordings[0], sample_rate=44_100, chunk_s=24.0, min_s=1.0)
    assert odd == []
    assert abs(clip.duration_s - 3.0) < 0.1
    spectrum = np.abs(np.fft.rfft(clip.wave_N[: 2 * 44_100]))
    assert abs(int(spectrum.argmax()) / 2 - 440.0) <= 1.0


def test_half_an_mp3_is_kept_up_to_its_end_and_listed(tmp_path: Path) -> None:
    write_fma(tmp_path)
    path = tmp_path / "fma_large" / track_path(2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    audio = open_fma(tmp_path)
    (clip,), odd = read_clips(audio, audio.recordings[0], sample_rate=44_100, chunk_s=24.0, min_s=1.0)
    assert 1.2 < clip.duration_s < 1.7
    assert [(o.kind, o.skipped) for o in odd] == [("truncated", False)]
    path.write_bytes(b"ID3" + bytes(range(256)) * 20)
    clips, odd = read_clips(audio, audio.recordings[0], sample_rate=44_100, chunk_s=24.0, min_s=1.0)
    assert clips == []
    assert [(o.kind, o.skipped) for o in odd] == [("unreadable", True)]


def test_half_a_wav_is_kept_up_to_its_end_and_listed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(4.0), RATE)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[: len(whole) // 2])
    audio = AudioSet("x", FolderFiles(tmp_path), (Recording("a", "a.wav"),))
    (clip,), odd = read_clips(audio, audio.recordings[0], sample_rate=RATE, chunk_s=8.0)
    assert abs(clip.duration_s - 2.0) < 0.01
    assert [(o.kind, o.skipped) for o in odd] == [("truncated", False)]


def test_resampling_keeps_a_tone_and_removes_what_would_alias() -> None:
    low = resample(sine(1.0, 48_000, 1_000.0), 48_000, 16_000)
    assert len(low) == 16_000
    reference = sine(1.0, 16_000, 1_000.0)
    assert np.abs(low[500:-500] - reference[500:-500]).max() < 2e-3
    assert np.abs(resample(sine(1.0, 48_000, 11_000.0), 48_000, 16_000)[500:-500]).max() < 2e-3
    same = sine(0.1)
    assert resample(same, RATE, RATE) is same


def test_chunks_cover_the_wave_without_overlap() -> None:
    assert chunk_bounds(205, 10, 8.0, 1.0) == [(0, 80), (80, 160), (160, 205)]
    assert chunk_bounds(165, 10, 8.0, 1.0) == [(0, 80), (80, 160)]
    assert chunk_bounds(5, 10, 8.0, 1.0) == []
    with pytest.raises(ValueError, match="at most chunk_s"):
        chunk_bounds(100, 10, 2.0, 3.0)


def test_decode_reports_what_the_header_promised(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sine(1.0), RATE)
    wave_NC, rate, promised = decode((tmp_path / "a.wav").read_bytes())
    assert (wave_NC.shape, rate, promised) == ((RATE, 1), RATE, RATE)
    audio = AudioSet("x", FolderFiles(tmp_path), (Recording("a", "a.wav"),))
    with pytest.raises(ValueError, match="min_s"):
        read_clips(audio, audio.recordings[0], sample_rate=16_000, chunk_s=0.5, min_s=1.0)
