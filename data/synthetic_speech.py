"""Speech-like audio made by the program: a cascade formant synthesiser speaking an invented language.

It stands in for a real corpus where none is at hand, and every result made with it is marked. The language
has structure at several ranges for a model to find: phonemes with fixed formants, a closed lexicon of words, a sparse
bigram grammar over them, and one speaker (pitch and vocal-tract length) throughout a clip. Clip i of a seed is a
function of the seed and i alone.

Synthesis follows Klatt (1980, J. Acoust. Soc. Am. 67): a Rosenberg glottal pulse and aspiration noise through
second-order resonators in cascade, frication noise through one parallel resonator. Vowel formants are the men's
averages of Peterson & Barney (1952).

Shape suffixes: N samples, F control frames, R resonators.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import soundfile

Floats = npt.NDArray[np.float64]

_CONTROL_S = 0.001
_SMOOTHING_S = 0.03
_UPPER_FORMANTS_HZ = (3500.0, 4500.0)
_BANDWIDTHS_HZ = (70.0, 100.0, 150.0, 250.0, 350.0)


class Phoneme(NamedTuple):
    """Targets of one sound: formants in Hz, mean length in s, source amplitudes in [0, 1], frication band in Hz."""

    spelling: str
    formants: tuple[float, float, float]
    length_s: float
    voicing: float
    aspiration: float = 0.0
    frication: float = 0.0
    noise_hz: float = 4000.0
    noise_width_hz: float = 1500.0


VOWELS = (
    Phoneme("ee", (270, 2290, 3010), 0.13, 1.0),
    Phoneme("i", (390, 1990, 2550), 0.09, 1.0),
    Phoneme("e", (530, 1840, 2480), 0.10, 1.0),
    Phoneme("a", (660, 1720, 2410), 0.14, 1.0),
    Phoneme("u", (640, 1190, 2390), 0.10, 1.0),
    Phoneme("ah", (730, 1090, 2440), 0.14, 1.0),
    Phoneme("aw", (570, 840, 2410), 0.14, 1.0),
    Phoneme("oo", (300, 870, 2240), 0.13, 1.0),
    Phoneme("er", (490, 1350, 1690), 0.13, 1.0),
)
CONSONANTS = (
    Phoneme("m", (250, 1000, 2200), 0.07, 0.45),
    Phoneme("n", (250, 1500, 2500), 0.07, 0.45),
    Phoneme("l", (360, 1200, 2700), 0.06, 0.6),
    Phoneme("r", (330, 1100, 1500), 0.07, 0.6),
    Phoneme("w", (300, 700, 2200), 0.06, 0.6),
    Phoneme("y", (270, 2200, 3000), 0.06, 0.6),
    Phoneme("s", (400, 1700, 2600), 0.11, 0.0, 0.0, 0.5, 6000, 2500),
    Phoneme("sh", (400, 1800, 2500), 0.11, 0.0, 0.0, 0.5, 3000, 1200),
    Phoneme("f", (400, 1100, 2200), 0.09, 0.0, 0.0, 0.15, 4500, 5000),
    Phoneme("z", (300, 1700, 2600), 0.08, 0.35, 0.0, 0.25, 6000, 2500),
    Phoneme("v", (300, 1100, 2200), 0.06, 0.45, 0.0, 0.08, 4500, 5000),
    Phoneme("h", (500, 1500, 2500), 0.06, 0.0, 0.5),
)
_STOPS = {  # closure, then a burst whose band marks the place of articulation; voiced ones murmur in the closure
    "p": Phoneme("p", (400, 900, 2200), 0.02, 0.0, 0.3, 0.5, 900, 900),
    "t": Phoneme("t", (400, 1700, 2600), 0.02, 0.0, 0.2, 0.6, 4500, 2500),
    "k": Phoneme("k", (400, 1900, 2400), 0.03, 0.0, 0.3, 0.6, 2000, 700),
    "b": Phoneme("b", (250, 900, 2200), 0.012, 0.4, 0.0, 0.25, 700, 900),
    "d": Phoneme("d", (250, 1700, 2600), 0.012, 0.4, 0.0, 0.3, 4000, 2500),
    "g": Phoneme("g", (250, 1900, 2400), 0.015, 0.4, 0.0, 0.3, 1800, 700),
}
_PAUSE = Phoneme("", (500, 1500, 2500), 0.12, 0.0)


def _sounds(symbol: str) -> tuple[Phoneme, ...]:
    if symbol in _STOPS:
        burst = _STOPS[symbol]
        closure = burst._replace(length_s=0.05, voicing=0.12 if burst.voicing else 0.0, aspiration=0.0, frication=0.0)
        return closure, burst
    return (_BY_SPELLING[symbol],)


_BY_SPELLING = {p.spelling: p for p in (*VOWELS, *CONSONANTS)}
_ONSETS = (*(c.spelling for c in CONSONANTS), *_STOPS, "")
_CODAS = ("m", "n", "l", "s", "t", "k", "d", "", "", "", "")
_NUCLEI = tuple(v.spelling for v in VOWELS)


@dataclass(frozen=True, kw_only=True)
class SpeechSpec:
    """An endless synthetic corpus: its clips are numbered 0, 1, 2, ...

    Args:
        seed: of the lexicon, the grammar, the speakers and every clip.
        sample_rate: Hz, at least 8,000.
        n_words: words of the lexicon.
        successors: words that may follow a word.
        n_speakers: voices; each clip has one.
        min_s, max_s: bounds of a clip's length in seconds.
    """

    seed: int = 0
    sample_rate: int = 16_000
    n_words: int = 120
    successors: int = 6
    n_speakers: int = 4
    min_s: float = 3.0
    max_s: float = 8.0

    def __post_init__(self) -> None:
        if self.sample_rate < 8_000:
            raise ValueError(f"sample_rate={self.sample_rate} must be at least 8000 Hz to hold three formants")
        if not 0.5 <= self.min_s <= self.max_s:
            raise ValueError(f"min_s={self.min_s}, max_s={self.max_s} must satisfy 0.5 <= min_s <= max_s")
        if not 1 <= self.successors <= self.n_words or self.n_speakers < 1:
            raise ValueError(
                f"successors={self.successors} must lie in 1..n_words={self.n_words} and "
                f"n_speakers={self.n_speakers} must be >= 1"
            )


class _Language(NamedTuple):
    words: tuple[tuple[str, ...], ...]
    next_words: npt.NDArray[np.int64]
    speakers: Floats  # columns: pitch in Hz, vocal-tract scale of the formants, breathiness


@lru_cache(maxsize=8)
def _language(seed: int, n_words: int, successors: int, n_speakers: int) -> _Language:
    rng = np.random.default_rng([seed, 0])
    words: list[tuple[str, ...]] = []
    while len(words) < n_words:
        symbols: list[str] = []
        for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15])):
            symbols += [str(rng.choice(_ONSETS)), str(rng.choice(_NUCLEI)), str(rng.choice(_CODAS))]
        word = tuple(s for s in symbols if s)
        if word not in words:
            words.append(word)
    next_words = np.stack([rng.choice(n_words, successors, replace=False) for _ in range(n_words)])
    scale = np.linspace(0.92, 1.2, n_speakers) if n_speakers > 1 else np.ones(1)
    pitch = 105.0 * (scale / scale[0]) ** 2.6
    return _Language(tuple(words), next_words, np.stack([pitch, scale, rng.uniform(0.02, 0.08, n_speakers)], axis=1))


@numba.njit(cache=True)
def _render(
    cascade_FR3: Floats,
    parallel_F3: Floats,
    voicing_F: Floats,
    aspiration_F: Floats,
    frication_F: Floats,
    step_F: Floats,
    noise_N: Floats,
    hop: int,
) -> Floats:
    n_resonators = cascade_FR3.shape[1]
    memory = np.zeros((n_resonators + 1, 2))
    wave_N = np.empty(noise_N.shape[0])
    phase = 0.0
    flow_before = 0.0
    for n in range(noise_N.shape[0]):
        f = min(n // hop, voicing_F.shape[0] - 1)
        phase += step_F[f]
        if phase >= 1.0:
            phase -= 1.0
        if phase < 0.4:  # Rosenberg (1971), pulse C: opening
            flow = 0.5 * (1.0 - math.cos(math.pi * phase / 0.4))
        elif phase < 0.56:  # closing
            flow = math.cos(0.5 * math.pi * (phase - 0.4) / 0.16)
        else:
            flow = 0.0
        x = voicing_F[f] * (flow - flow_before) + 0.05 * aspiration_F[f] * noise_N[n]
        flow_before = flow
        for r in range(n_resonators):
            y = cascade_FR3[f, r, 0] * x + cascade_FR3[f, r, 1] * memory[r, 0] + cascade_FR3[f, r, 2] * memory[r, 1]
            memory[r, 1] = memory[r, 0]
            memory[r, 0] = y
            x = y
        hiss = 0.1 * frication_F[f] * noise_N[n]
        y = (
            parallel_F3[f, 0] * hiss
            + parallel_F3[f, 1] * memory[n_resonators, 0]
            + parallel_F3[f, 2] * memory[n_resonators, 1]
        )
        memory[n_resonators, 1] = memory[n_resonators, 0]
        memory[n_resonators, 0] = y
        wave_N[n] = x + y
    return wave_N


def _resonator(frequency: Floats, bandwidth: Floats | float, rate: int) -> Floats:
    """Coefficients (A, B, C) of y_n = A x_n + B y_{n-1} + C y_{n-2}, unit gain at 0 Hz (Klatt 1980, eq. 1-2)."""
    c = -np.exp(-2 * np.pi * np.broadcast_to(bandwidth, frequency.shape) / rate)
    b = 2 * np.sqrt(-c) * np.cos(2 * np.pi * frequency / rate)
    return np.stack([1 - b - c, b, c], axis=-1)


def _band(frequency: Floats, bandwidth: Floats, rate: int) -> Floats:
    """The same resonator with unit gain at its own frequency instead, for frication."""
    coefficients = _resonator(frequency, bandwidth, rate)
    z = np.exp(-2j * np.pi * frequency / rate)
    coefficients[..., 0] = np.abs(1 - coefficients[..., 1] * z - coefficients[..., 2] * z**2)
    return coefficients


def _smooth(x_F: Floats, seconds: float) -> Floats:
    width = max(1, round(seconds / _CONTROL_S)) | 1
    padded = np.pad(x_F, (width // 2, width // 2), mode="edge")
    return np.convolve(padded, np.hanning(width + 2)[1:-1] / np.hanning(width + 2).sum(), mode="valid")


def utterance(spec: SpeechSpec, index: int) -> tuple[npt.NDArray[np.float32], str]:
    """Clip ``index`` of the corpus: wave_N float32 in [-1, 1] at ``spec.sample_rate`` Hz, and its words.

    Raises ValueError for a negative index.
    """
    if index < 0:
        raise ValueError(f"index={index} must be >= 0")
    language = _language(spec.seed, spec.n_words, spec.successors, spec.n_speakers)
    rng = np.random.default_rng([spec.seed, 1, index])
    speaker = language.speakers[rng.integers(spec.n_speakers)]
    goal_s = rng.uniform(spec.min_s, spec.max_s)
    sounds, spoken = _sentence(spec, language, goal_s, rng)
    lengths = np.array([p.length_s for p in sounds]) * rng.uniform(0.85, 1.15, len(sounds))
    lengths *= goal_s / lengths.sum()
    frames = np.maximum(1, np.round(lengths / _CONTROL_S).astype(int))
    targets = np.array(
        [(*p.formants, p.voicing, p.aspiration, p.frication, p.noise_hz, p.noise_width_hz) for p in sounds]
    )
    wave_N = _spoken(np.repeat(targets, frames, axis=0), speaker, spec.sample_rate, rng)
    wave_N *= 0.07 / math.sqrt(float(np.mean(wave_N**2)))
    wave_N += 2e-4 * rng.standard_normal(len(wave_N))  # the room: no recording is digitally silent
    wave_N *= min(1.0, 0.95 / float(np.abs(wave_N).max()))
    return wave_N.astype(np.float32), " ".join(spoken)


def _sentence(
    spec: SpeechSpec, language: _Language, goal_s: float, rng: np.random.Generator
) -> tuple[list[Phoneme], list[str]]:
    """Words drawn until about `goal_s` seconds are full: their sounds with pauses, and the words."""
    sounds: list[Phoneme] = [_PAUSE]
    spoken: list[str] = []
    word = int(rng.integers(spec.n_words))
    total_s = _PAUSE.length_s
    while True:
        added = [p for symbol in language.words[word] for p in _sounds(symbol)]
        if rng.random() < 0.15:
            added.append(_PAUSE)
        length_s = sum(p.length_s for p in added)
        if spoken and total_s + length_s > goal_s - _PAUSE.length_s:
            return [*sounds, _PAUSE], spoken
        sounds += added
        spoken.append("".join(language.words[word]))
        total_s += length_s
        word = int(language.next_words[word, rng.integers(spec.successors)])


def _spoken(tracks_FC: Floats, speaker: Floats, rate: int, rng: np.random.Generator) -> Floats:
    """The wave of target tracks in one speaker's voice: formants and voicing glide, the pitch falls and drifts."""
    pitch, scale, breath = speaker
    n_frames = len(tracks_FC)
    formants_FR = np.stack(
        [_smooth(tracks_FC[:, r], _SMOOTHING_S) * scale for r in range(3)]
        + [np.full(n_frames, f * scale) for f in _UPPER_FORMANTS_HZ],
        axis=1,
    )
    kept = formants_FR.max(axis=0) < 0.47 * rate
    voicing_F, aspiration_F, frication_F = (_smooth(tracks_FC[:, c], 0.012) for c in (3, 4, 5))
    time = np.arange(n_frames) / n_frames
    drift = np.cumsum(rng.standard_normal(n_frames)) * 0.002
    pitch_F = pitch * (1.08 - 0.2 * time) * np.exp(_smooth(drift - drift.mean(), 0.1) * 0.5)
    hop = round(_CONTROL_S * rate)
    noise_hz = np.minimum(tracks_FC[:, 6], 0.42 * rate)
    return _render(
        _resonator(formants_FR[:, kept], np.array(_BANDWIDTHS_HZ)[kept], rate),
        _band(noise_hz, np.minimum(tracks_FC[:, 7], 0.2 * rate), rate),
        voicing_F,
        aspiration_F + breath * voicing_F,
        frication_F,
        np.clip(pitch_F, 50.0, 500.0) / rate,
        rng.standard_normal(n_frames * hop),
        hop,
    )


def write_ljspeech(spec: SpeechSpec, n_clips: int, out: str | Path) -> Path:
    """Write clips 0..n_clips-1 in LJ Speech's layout (16-bit wavs), whole or not at all; an existing folder is kept.

    The folder's name should carry the spec: it is not compared with what is there.
    """
    out = Path(out)
    if out.is_dir():
        return out
    aside = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        (aside / "wavs").mkdir(parents=True)
        lines = []
        for index in range(n_clips):
            wave_N, text = utterance(spec, index)
            name = f"SYN{spec.seed:03d}-{index:05d}"
            soundfile.write(aside / "wavs" / f"{name}.wav", wave_N, spec.sample_rate, subtype="PCM_16")
            lines.append(f"{name}|{text}|{text}\n")
        (aside / "metadata.csv").write_text("".join(lines), encoding="utf-8")
        try:
            os.rename(aside, out)
        except OSError:
            if not out.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out
