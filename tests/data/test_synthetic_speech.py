from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from data.audio_io import read_clips
from data.ljspeech import open_ljspeech
from data.synthetic_speech import SpeechSpec, _resonator, utterance, write_ljspeech


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    spec = SpeechSpec(min_s=1.0, max_s=2.0)
    wave, text = utterance(spec, 3)
    utterance(SpeechSpec(seed=9), 0)
    again, text_again = utterance(SpeechSpec(min_s=1.0, max_s=2.0), 3)
    assert np.array_equal(wave, again)
    assert text == text_again
    assert not np.array_equal(wave[:8_000], utterance(SpeechSpec(min_s=1.0, max_s=2.0, seed=1), 3)[0][:8_000])
    assert not np.array_equal(wave[:8_000], utterance(spec, 4)[0][:8_000])


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000])
def test_waves_are_bounded_and_as_long_as_asked(rate: int) -> None:
    spec = SpeechSpec(sample_rate=rate, min_s=1.0, max_s=3.0)
    for index in range(6):
        wave, text = utterance(spec, index)
        assert wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert np.abs(wave).max() < 1.0
        assert 0.95 < len(wave) / rate < 3.1
        assert 0.01 < np.sqrt(np.mean(wave**2)) < 0.1
        assert text


def test_a_resonator_peaks_at_its_formant() -> None:
    a, b, c = _resonator(np.array([1500.0]), 80.0, 16_000)[0]
    frequencies = np.arange(0, 8_000, 5.0)
    z = np.exp(-2j * np.pi * frequencies / 16_000)
    gain = np.abs(a / (1 - b * z - c * z**2))
    assert abs(gain[0] - 1.0) < 1e-9
    assert abs(frequencies[gain.argmax()] - 1500.0) <= 10.0
    half = frequencies[gain > gain.max() / np.sqrt(2)]
    assert abs((half[-1] - half[0]) - 80.0) < 12.0


def test_the_grammar_is_sparse_and_the_lexicon_closed() -> None:
    spec = SpeechSpec(n_words=20, successors=2, min_s=5.0, max_s=8.0)
    texts = [utterance(spec, i)[1].split() for i in range(30)]
    words = {w for t in texts for w in t}
    followers: dict[str, set[str]] = {}
    for t in texts:
        for a, b in itertools.pairwise(t):
            followers.setdefault(a, set()).add(b)
    assert len(words) <= 20
    assert max(len(f) for f in followers.values()) == 2


def test_written_corpus_is_read_by_the_ljspeech_reader(tmp_path: Path) -> None:
    spec = SpeechSpec(min_s=1.0, max_s=1.5)
    root = write_ljspeech(spec, 3, tmp_path / "corpus")
    audio = open_ljspeech(root, nominal_rate=spec.sample_rate)
    assert len(audio.recordings) == 3
    assert audio.oddities == ()
    (clip,), odd = read_clips(audio, audio.recordings[1], sample_rate=16_000, chunk_s=8.0, min_s=0.5)
    wave, text = utterance(spec, 1)
    assert odd == []
    assert clip.text == text
    assert np.abs(clip.wave_N - wave).max() <= 1 / 32_768
    before = sorted(p.stat().st_mtime_ns for p in root.rglob("*"))
    write_ljspeech(spec, 3, root)
    assert sorted(p.stat().st_mtime_ns for p in root.rglob("*")) == before


@pytest.mark.parametrize(
    "bad", [{"sample_rate": 4_000}, {"min_s": 5.0, "max_s": 4.0}, {"successors": 0}, {"n_speakers": 0}]
)
def test_impossible_specs(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpeechSpec(**bad)
    with pytest.raises(ValueError, match="index"):
        utterance(SpeechSpec(), -1)
