"""Statements of the codec and memory-caching reports, and how their error rates are simulated.

Trained models of an architecture score the same recordings. A score is: the recording's difficulty, shared by all
models (sd 1); how the recording suits the architecture (sd CLIP); the chance of the training (sd `seed_noise` times the
standard error of the recordings' mean of CLIP); and a rest (sd CLIP / 2). Text and memory-caching contrasts are paired
by seed and recording, with the same parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.caching.effects import NO_EVIDENCE, verdicts
from analysis.codec.audio_distance import Embeddings, frechet_distance, frechet_of_gaussians
from analysis.codec.contrasts import Arms, arm_resamples, choose_lr
from analysis.codec.results import at
from analysis.codec.scores import CodebookScores
from analysis.codec.texts import SHUFFLED, WORTH, text_effects
from analysis.crossed import Effect, units_mean
from analysis.multiplicity import ALPHA
from analysis.recordings import difference_effect
from benchmarks._calibration import Statement, Tally, covers, grid

Floats = npt.NDArray[np.float64]
CLIP, RECORDINGS, LEVEL = 0.1, 40, 6.0
_Z = float(stats.norm.ppf(0.975))
_RATES = (0.004, 0.016)


@dataclass(frozen=True)
class _Noise:
    """Standard deviations of the parts of a score; see the head of this file."""

    seed_noise: float
    recordings: int = RECORDINGS

    @property
    def seed(self) -> float:
        return self.seed_noise * CLIP / math.sqrt(self.recordings)

    def error(self, arms: float, seeds: int, shared: float = 0.0) -> float:
        """Standard error of a sum over `arms` architectures, were all variances known; `shared`: sd of difficulty."""
        per_recording = shared**2 + arms * (CLIP**2 + (CLIP / 2) ** 2 / seeds)
        return math.sqrt(arms * self.seed**2 / seeds + per_recording / self.recordings)

    def scores(self, rng: np.random.Generator, seeds: int) -> Floats:
        """value_SU of one architecture, without the recordings' difficulty."""
        own_U = CLIP * rng.standard_normal(self.recordings)
        luck_S1 = self.seed * rng.standard_normal((seeds, 1))
        return own_U + luck_S1 + CLIP / 2 * rng.standard_normal((seeds, self.recordings))


def _table(value_MSU: Floats, clips: int = 1) -> pd.DataFrame:
    """Rows of models (architecture, seed) and clips; several clips of one recording have its value."""
    M, S, U = value_MSU.shape
    index = np.indices((M, S, U)).reshape(3, -1)
    tokens = np.random.default_rng(0).integers(50, 150, size=(U,))[index[2]]
    frame = pd.DataFrame(
        {"architecture": index[0], "seed": index[1], "recording_id": index[2], "tokens": tokens}
    ).assign(nll=value_MSU.ravel() * tokens)
    parts = [frame.assign(clip_id=frame["recording_id"] * clips + c) for c in range(clips)]
    return pd.concat(parts, ignore_index=True)


def _arms(
    rng: np.random.Generator, arms: int, seeds: int, seed_noise: float, *, clips: int = 1, effect: float = 0.0
) -> Arms:
    """As the report makes them; `effect` (in nats) makes the first architecture worse."""
    noise = _Noise(seed_noise)
    shared_U = LEVEL + rng.standard_normal(noise.recordings)
    value_MSU = np.stack([shared_U + noise.scores(rng, seeds) for _ in range(arms)])
    value_MSU[0] += effect
    return arm_resamples(_table(value_MSU, clips))


def difference_coverage(
    rng: np.random.Generator, trials: int, *, arms: int, seeds: int, seed_noise: float, clips: int = 1
) -> Tally:
    hits, width = 0, 0.0
    for _ in range(trials):
        rows = _arms(rng, arms, seeds, seed_noise, clips=clips).differences()
        first = rows[rows[["a", "b"]].isin([0, 1]).all(axis=1)]
        lo, hi = first[["lo", "hi"]].to_numpy(float)[0]
        hits += covers(lo, hi, 0.0)
        width += hi - lo
    return Tally(hits, trials, width / trials / (2 * _Z * _Noise(seed_noise).error(2, seeds)))


def arm_coverage(rng: np.random.Generator, trials: int, *, arms: int, seeds: int, seed_noise: float) -> Tally:
    hits, width = 0, 0.0
    for _ in range(trials):
        table = _arms(rng, arms, seeds, seed_noise).table()
        lo, hi = table.loc[table["architecture"] == 0, ["lo", "hi"]].to_numpy(float)[0]
        hits += covers(lo, hi, LEVEL)
        width += hi - lo
    return Tally(hits, trials, width / trials / (2 * _Z * _Noise(seed_noise).error(1, seeds, shared=1.0)))


def any_star(rng: np.random.Generator, trials: int, *, arms: int, seeds: int, seed_noise: float) -> Tally:
    found = (_arms(rng, arms, seeds, seed_noise).differences()["p_holm"].min() < ALPHA for _ in range(trials))
    return Tally(sum(found), trials)


def any_star_of_two_rates(rng: np.random.Generator, trials: int, *, arms: int, seeds: int, seed_noise: float) -> Tally:
    """Every architecture is trained at two rates that are equally good, and judged at the one that came out better."""
    noise, hits = _Noise(seed_noise), 0
    for _ in range(trials):
        shared_U = LEVEL + rng.standard_normal(noise.recordings)
        tables = [
            _table(np.stack([shared_U + noise.scores(rng, seeds) for _ in range(arms)])).assign(lr=lr) for lr in _RATES
        ]
        clips = pd.concat(tables, ignore_index=True)
        sums = clips.groupby(["architecture", "lr", "seed"], as_index=False)[["nll", "tokens"]].sum()
        chosen = choose_lr(sums.assign(val_nll_ema=sums["nll"] / sums["tokens"]))
        hits += arm_resamples(at(clips, chosen)).differences()["p_holm"].min() < ALPHA
    return Tally(hits, trials)


def star_power(rng: np.random.Generator, trials: int, *, arms: int, seeds: int, effect_in_errors: float) -> Tally:
    """One of the architectures is worse by a multiple of its difference's standard error; is that pair starred?"""
    effect, hits = effect_in_errors * _Noise(1.0).error(2, seeds), 0
    for _ in range(trials):
        rows = _arms(rng, arms, seeds, 1.0, effect=effect).differences()
        hits += bool((rows[(rows["b"] == 0) & (rows["a"] == 1)]["p_holm"] < ALPHA).any())
    return Tally(hits, trials)


def odd_seeds_named(rng: np.random.Generator, trials: int, *, arms: int, seeds: int) -> Tally:
    return Tally(sum(_arms(rng, arms, seeds, 5.0).odd_seeds() is not None for _ in range(trials)), trials)


def _text_rows(rng: np.random.Generator, seeds: int, seed_noise: float, architectures: str = "xy") -> pd.DataFrame:
    """Architectures whose models with text are as good as those without, whatever text they are given."""
    noise = _Noise(seed_noise)
    shared_U = LEVEL + rng.standard_normal(noise.recordings)
    plain, right = (
        _table(np.stack([shared_U + noise.scores(rng, seeds) for _ in architectures])).replace({"architecture": names})
        for names in (dict(enumerate(architectures)), {i: f"{name}_text" for i, name in enumerate(architectures)})
    )
    kinds = {"right": right}
    for kind in ("shuffled", "no_text"):
        rest = CLIP / 2 * rng.standard_normal(len(right))
        kinds[kind] = right.assign(nll=right["nll"] + rest * right["tokens"])
    texts = pd.concat([rows.assign(text=kind) for kind, rows in kinds.items()], ignore_index=True)
    return text_effects(plain, texts, {name: f"{name}_text" for name in architectures})


def text_coverage(rng: np.random.Generator, trials: int, *, contrast: str, seeds: int, seed_noise: float) -> Tally:
    hits = count = 0
    for _ in range(trials):
        rows = _text_rows(rng, seeds, seed_noise, "x")
        lo, hi = rows.loc[rows["contrast"] == contrast, ["lo", "hi"]].to_numpy(float)[0]
        hits += covers(lo, hi, 0.0)
        count += bool(np.isfinite(lo))
    return Tally(hits, count)


def text_stars(rng: np.random.Generator, trials: int, *, contrast: str, seeds: int, seed_noise: float) -> Tally:
    hits = count = 0
    for _ in range(trials):
        rows = _text_rows(rng, seeds, seed_noise)
        p = rows.loc[rows["contrast"] == contrast, "p_holm"].to_numpy(float)
        hits += bool((p < ALPHA).any())
        count += bool(np.isfinite(p).any())
    return Tally(hits, count)


def _cache_effect(rng: np.random.Generator, seeds: int, seed_noise: float, effect: float = 0.0) -> Effect:
    return difference_effect(effect + _Noise(seed_noise, 27).scores(rng, seeds))


def cache_coverage(rng: np.random.Generator, trials: int, *, seeds: int, seed_noise: float) -> Tally:
    found = [_cache_effect(rng, seeds, seed_noise) for _ in range(trials)]
    hits = sum(covers(e.lo, e.hi, 0.0) for e in found)
    width = float(np.mean([e.hi - e.lo for e in found]))
    return Tally(hits, trials, width / (2 * _Z * _Noise(seed_noise, 27).error(1, seeds)))


def cache_size(rng: np.random.Generator, trials: int, *, seeds: int, seed_noise: float, level: float) -> Tally:
    return Tally(sum(_cache_effect(rng, seeds, seed_noise).p < level for _ in range(trials)), trials)


def cache_words(rng: np.random.Generator, trials: int, *, settings: int, seeds: int, seed_noise: float) -> Tally:
    hits = 0
    for _ in range(trials):
        found = [_cache_effect(rng, seeds, seed_noise) for _ in range(settings)]
        hits += any(word != NO_EVIDENCE for word in verdicts(found, ("helps", "hurts"))[1])
    return Tally(hits, trials)


def cache_power(rng: np.random.Generator, trials: int, *, settings: int, seeds: int, effect_in_errors: float) -> Tally:
    effect, hits = -effect_in_errors * _Noise(1.0, 27).error(1, seeds), 0
    for _ in range(trials):
        found = [_cache_effect(rng, seeds, 1.0, effect * (i == 0)) for i in range(settings)]
        hits += verdicts(found, ("helps", "hurts"))[1][0] == "helps"
    return Tally(hits, trials)


def band_coverage(rng: np.random.Generator, trials: int, *, recordings: int, clips: int) -> Tally:
    """One trained model's val_nll; a recording's clips share its difficulty."""
    hits = 0
    names = [f"r{i}" for i in range(recordings) for _ in range(clips)]
    for _ in range(trials):
        nll = np.repeat(LEVEL + rng.standard_normal(recordings), clips) + 0.3 * rng.standard_normal(len(names))
        tokens = np.repeat(rng.integers(50, 150, recordings), clips).astype(float)
        zero = np.zeros((len(names), 1))
        scores = CodebookScores(1)
        sums = {"nll": (nll * tokens)[:, None], "count": tokens[:, None], "uniform": zero, "top1": zero, "top5": zero}
        scores.add(sums, names)
        hits += covers(*scores.val_nll_ci(), LEVEL)
    return Tally(hits, trials)


_D = 32
_LOAD_DD = np.linalg.qr(np.random.default_rng(1).normal(size=(_D, _D)))[0] * 10 * np.exp(-np.arange(_D) / 12)


def _vectors(rng: np.random.Generator, clips: int, shift: float, spread: float) -> Embeddings:
    """Four windows per clip, which share .6 of their variance; shift in sds of every direction."""
    shared, own = rng.standard_normal((clips, 1, _D)), rng.standard_normal((clips, 4, _D))
    z_CWD = spread * (shift + math.sqrt(0.6) * shared + math.sqrt(0.4) * own)
    return Embeddings("set", "simulated", (z_CWD @ _LOAD_DD.T).reshape(-1, _D), np.repeat(np.arange(clips), 4))


def frechet_coverage(
    rng: np.random.Generator, trials: int, *, real: int, made: int, shift: float, spread: float
) -> Tally:
    cov = _LOAD_DD @ _LOAD_DD.T
    mean = _LOAD_DD @ np.full(_D, shift * spread)
    truth = frechet_of_gaussians(np.zeros(_D), cov, mean, spread**2 * cov)
    hits = 0
    for _ in range(trials):
        found = frechet_distance(_vectors(rng, real, 0.0, 1.0), _vectors(rng, made, shift, spread))
        hits += covers(*found.interval, truth)
    return Tally(hits, trials)


def coherence_coverage(rng: np.random.Generator, trials: int, *, samples: int, mean: float) -> Tally:
    """Coherences lie in 0 … 1 and crowd near 1 for samples that are mostly silence."""
    hits = 0
    for _ in range(trials):
        found = units_mean(rng.beta(8 * mean, 8 * (1 - mean), samples))
        hits += covers(found.lo, found.hi, mean)
    return Tally(hits, trials)


_SEEDS, _NOISE = (2, 3, 5), (0.1, 1.0, 5.0)
_REPORT, _MEMORY = "codec_lm report", "memory_cache report"
_WIDE = (
    "Two variances, each with its own t quantile (Banerjee): at least nominal whatever their sizes, and wider than the "
    "ideal one, which knows both; with two seeds most of that is the price of knowing the noise of training badly."
)
_HARD = {"arms": 2, "seeds": 2, "seed_noise": 5.0}

STATEMENTS: Sequence[Statement] = (
    Statement(
        "95% interval of a difference of two architectures",
        f"{_REPORT}, Differences",
        "coverage",
        difference_coverage,
        [
            *grid(arms=(2,), seeds=_SEEDS, seed_noise=_NOISE),
            *grid(arms=(9,), seeds=(2,), seed_noise=_NOISE),
            *grid(arms=(2,), seeds=(2, 5), seed_noise=(0.1,), clips=(4,)),
        ],
        (_HARD, {"arms": 2, "seeds": 5, "seed_noise": 0.1, "clips": 4}),
        trials=300,
        quick_trials=150,
        note=_WIDE + " clips 4: four clips of each recording.",
    ),
    Statement(
        "95% interval of an architecture's val_nll",
        f"{_REPORT}, main table",
        "coverage",
        arm_coverage,
        grid(arms=(2,), seeds=_SEEDS, seed_noise=_NOISE),
        ({"arms": 2, "seeds": 2, "seed_noise": 5.0},),
        trials=400,
        quick_trials=150,
        note=_WIDE,
    ),
    Statement(
        "a star at any pair, all architectures equal",
        f"{_REPORT}, Differences",
        "family-wise error",
        any_star,
        [*grid(arms=(2, 9), seeds=_SEEDS, seed_noise=_NOISE), *grid(arms=(4,), seeds=(2,), seed_noise=_NOISE)],
        ({"arms": 9, "seeds": 2, "seed_noise": 5.0}, _HARD),
        trials=300,
        quick_trials=150,
    ),
    Statement(
        "a star at any pair, each architecture at the better of two equal rates",
        f"{_REPORT}, Differences",
        "family-wise error",
        any_star_of_two_rates,
        grid(arms=(2, 9), seeds=(2, 3), seed_noise=(1.0, 5.0)),
        ({"arms": 2, "seeds": 2, "seed_noise": 5.0},),
        trials=250,
        quick_trials=100,
    ),
    Statement(
        "a star where the difference is 4 or 6 of its standard errors",
        f"{_REPORT}, Differences",
        "power",
        star_power,
        grid(arms=(2, 9), seeds=_SEEDS, effect_in_errors=(4.0, 6.0)),
        (),
        trials=250,
    ),
    Statement(
        "an architecture is named for seeds that differ more than the others'",
        f"{_REPORT}, Differences",
        "size",
        odd_seeds_named,
        grid(arms=(2, 9), seeds=_SEEDS),
        ({"arms": 9, "seeds": 2},),
        trials=600,
        quick_trials=200,
    ),
    Statement(
        "95% interval of a text contrast",
        f"{_REPORT}, Does the transcript help?",
        "coverage",
        text_coverage,
        [
            {"contrast": WORTH, "seeds": 1, "seed_noise": 1.0},
            *grid(contrast=(WORTH,), seeds=_SEEDS, seed_noise=(0.1, 5.0)),
            *grid(contrast=(SHUFFLED,), seeds=(1, 2, 3), seed_noise=(1.0,)),
        ],
        ({"contrast": WORTH, "seeds": 2, "seed_noise": 5.0}, {"contrast": SHUFFLED, "seeds": 1, "seed_noise": 1.0}),
        trials=150,
        quick_trials=40,
        note=_WIDE,
    ),
    Statement(
        "a star at any architecture of a text contrast",
        f"{_REPORT}, Does the transcript help?",
        "family-wise error",
        text_stars,
        [
            *grid(contrast=(WORTH,), seeds=_SEEDS, seed_noise=(0.1, 5.0)),
            *grid(contrast=(SHUFFLED,), seeds=(1, 2, 3), seed_noise=(1.0,)),
        ],
        ({"contrast": WORTH, "seeds": 2, "seed_noise": 5.0},),
        trials=120,
        quick_trials=40,
    ),
    Statement(
        "95% interval of what caching is worth",
        f"{_MEMORY}, What caching is worth",
        "coverage",
        cache_coverage,
        grid(seeds=_SEEDS, seed_noise=_NOISE),
        ({"seeds": 3, "seed_noise": 1.0},),
        note=_WIDE,
    ),
    Statement(
        "p of an effect, at 5%",
        f"{_MEMORY}, all tables",
        "size",
        cache_size,
        grid(seeds=_SEEDS, seed_noise=_NOISE, level=(0.05,)),
        ({"seeds": 3, "seed_noise": 1.0, "level": 0.05},),
        quick_trials=1_000,
    ),
    Statement(
        "p of an effect, at .0045 (Holm's first step of eleven)",
        f"{_MEMORY}, all tables",
        "size",
        cache_size,
        grid(seeds=_SEEDS, seed_noise=_NOISE, level=(0.0045,)),
        ({"seeds": 3, "seed_noise": 1.0, "level": 0.0045}, {"seeds": 3, "seed_noise": 0.1, "level": 0.0045}),
        trials=4_000,
        quick_trials=3_000,
        nominal=0.0045,
    ),
    Statement(
        "a word (helps, hurts, opens, …) for any of eleven settings",
        f"{_MEMORY}, verdicts",
        "family-wise error",
        cache_words,
        grid(settings=(11,), seeds=_SEEDS, seed_noise=_NOISE),
        ({"settings": 11, "seeds": 3, "seed_noise": 1.0},),
        trials=600,
        quick_trials=200,
    ),
    Statement(
        "helps, where caching is worth 4 or 8 of its standard errors",
        f"{_MEMORY}, verdicts",
        "power",
        cache_power,
        grid(settings=(11,), seeds=_SEEDS, effect_in_errors=(4.0, 8.0)),
        (),
        trials=500,
    ),
    Statement(
        "95% band of one trained model's val_nll",
        f"{_REPORT}, Curves; rows val_nll_lo and val_nll_hi",
        "coverage",
        band_coverage,
        grid(recordings=(6, 24, 64), clips=(1, 3)),
        ({"recordings": 24, "clips": 3},),
        trials=1_000,
        quick_trials=300,
    ),
    Statement(
        "95% interval of a Fréchet distance at infinite N",
        f"{_REPORT}, Generated audio",
        "coverage",
        frechet_coverage,
        [
            *grid(real=(56,), made=(32, 64), shift=(0.5, 2.0), spread=(1.0, 0.5)),
            *grid(real=(24,), made=(12,), shift=(0.5, 2.0), spread=(1.0,)),
            *grid(real=(56,), made=(64,), shift=(0.0,), spread=(1.0, 0.3)),
        ],
        ({"real": 24, "made": 12, "shift": 2.0, "spread": 1.0},),
        trials=200,
        quick_trials=60,
        note="Distances are cut at 0: two sets of one law are covered nearly always.",
    ),
    Statement(
        "95% interval of a mean coherence",
        f"{_REPORT}, Generated audio",
        "coverage",
        coherence_coverage,
        grid(samples=(12, 32, 64), mean=(0.35, 0.7)),
        ({"samples": 12, "mean": 0.7},),
        quick_trials=400,
    ),
)
