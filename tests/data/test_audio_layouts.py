"""The script that fetches real audio lays it out so that the readers find it: tried on packages made here."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks import fetch_test_audio
from data.audio_io import read_clips
from data.fma import open_fma
from data.ljspeech import open_ljspeech


def tone(seconds: float, rate: int) -> np.ndarray:
    return 0.2 * np.sin(np.arange(round(seconds * rate)) * 0.05)


def test_prompts_become_an_ljspeech_folder(tmp_path: Path) -> None:
    voice = tmp_path / "tree" / "usr" / "share" / "asterisk" / "sounds" / "en_US_f_Allison"
    (voice / "digits").mkdir(parents=True)
    soundfile.write(voice / "agent-pass.wav", tone(1.5, 8_000), 8_000)
    soundfile.write(voice / "digits" / "7.wav", tone(1.2, 8_000), 8_000)
    soundfile.write(voice / "beep.wav", tone(1.1, 8_000), 8_000)
    soundfile.write(voice / "unlisted.wav", tone(1.1, 8_000), 8_000)
    listed = "; Sounds\n\nagent-pass: Enter: the | key.\nbeep: [a tone]\ndigits/7: seven\n"
    (tmp_path / "tree" / "core-sounds-en.txt.gz").write_bytes(gzip.compress(listed.encode()))
    assert fetch_test_audio.lay_out_speech(tmp_path / "tree", tmp_path / "lj") == 4
    audio = open_ljspeech(tmp_path / "lj", nominal_rate=8_000)
    assert audio.oddities == ()
    texts = {r.recording_id: r.text for r in audio.recordings}
    assert texts == {"agent-pass": "Enter: the   key.", "digits_7": "seven", "beep": "", "unlisted": ""}


def test_a_missing_list_of_transcripts_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no core-sounds-en\.txt\.gz in asterisk-core-sounds-en-wav"):
        fetch_test_audio.transcripts(tmp_path)


def test_pieces_become_an_fma_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_test_audio, "TRACK_S", 2.0)
    (tmp_path / "tree").mkdir()
    soundfile.write(tmp_path / "tree" / "A New Journey.ogg", np.stack([tone(5.0, 44_100)] * 2, axis=1), 44_100)
    assert fetch_test_audio.lay_out_music(tmp_path / "tree", tmp_path / "fma") == 2
    audio = open_fma(tmp_path / "fma")
    assert [r.text for r in audio.recordings] == [f"Electronic: A New Journey, part {i}" for i in (0, 1)]
    (clip,), odd = read_clips(audio, audio.recordings[1], sample_rate=44_100, chunk_s=24.0, min_s=1.0)
    assert odd == []
    assert abs(clip.duration_s - 2.0) < 0.1


def test_what_apt_get_cannot_find_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        returncode = 100
        stderr = "E: Unable to locate package"

    monkeypatch.setattr(fetch_test_audio.subprocess, "run", lambda *_a, **_k: Failed())
    with pytest.raises(RuntimeError, match=r"run apt-get update first\.\nE: Unable to locate"):
        fetch_test_audio.unpack(["no-such-package"], tmp_path / "x")
