"""How many null draws and runs does a claim need? Answers before the compute is spent, and honest ones after.

Shapes: R runs, B null draws, T numbers of draws tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.audit import monte_carlo_p, top1_ratio


@dataclass(frozen=True, kw_only=True)
class RatioPrecision:
    """95% band of the published ratio from `runs` runs with one draw a null each; `decided` when it excludes 1."""

    runs: int
    lo: float
    hi: float

    @property
    def decided(self) -> bool:
        return self.lo > 1 or self.hi < 1


def draws_needed(alpha: float, tests: int = 1) -> int:
    """Fewest null draws B with which a Monte-Carlo p, at best 1/(B + 1), can fall below alpha after Holm over `tests`.

    Raises:
        ValueError: alpha outside (0, 1), or tests below 1.
    """
    if not 0 < alpha < 1 or tests < 1:
        raise ValueError(f"alpha={alpha}, tests={tests}; choose 0 < alpha < 1 and tests >= 1")
    return math.floor(tests / alpha)


def power(
    observed_R: Sequence[float] | np.ndarray,
    null_B: np.ndarray,
    draws: int,
    alpha: float = 0.05,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Share of audits with p < alpha, if each saw one run and `draws` null draws like those at hand.

    Runs and draws are resampled with replacement, so it is as good as the pilot that feeds it.

    Raises:
        ValueError: draws below 1, or no finite pilot values.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}; choose draws >= 1")
    observed_R, null_B = np.asarray(observed_R, float).ravel(), np.asarray(null_B, float).ravel()
    monte_carlo_p(observed_R.mean() if observed_R.size else np.nan, null_B)
    rng = np.random.default_rng(seed)
    reached = 1 - np.searchsorted(np.sort(null_B), observed_R, side="left") / null_B.size
    exceed = rng.binomial(draws, rng.choice(reached, resamples))
    return float(((1 + exceed) / (draws + 1) < alpha).mean())


def ratio_precision(
    observed_R: Sequence[float] | np.ndarray,
    nulls: Mapping[str, np.ndarray],
    runs: int,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> RatioPrecision:
    """Band of the published ratio over repeats of the whole protocol with `runs` runs, by resampling the pilot.

    Raises:
        ValueError: runs below 2, or values that `top1_ratio` refuses.
    """
    if runs < 2:
        raise ValueError(f"runs={runs}; choose runs >= 2")
    top1_ratio(observed_R, nulls, resamples=1)
    rng = np.random.default_rng(seed)
    observed_R = np.asarray(observed_R, float).ravel()
    means = rng.choice(observed_R, (resamples, runs)).mean(axis=1)
    bars = np.max(
        [np.quantile(rng.choice(np.ravel(v), (resamples, runs)), 0.95, axis=1) for v in nulls.values()], axis=0
    )
    ratio = np.divide(means, bars, out=np.full(resamples, np.inf), where=bars > 0)
    lo, hi = np.quantile(ratio, (0.025, 0.975))
    return RatioPrecision(runs=runs, lo=float(lo), hi=float(hi))


def runs_needed(
    observed_R: Sequence[float] | np.ndarray, nulls: Mapping[str, np.ndarray], most: int = 1024, seed: int = 0
) -> int | None:
    """Fewest runs of 2, 4, 8 … `most` whose band of the published ratio excludes 1; None when none does."""
    runs = 2
    while runs <= most:
        if ratio_precision(observed_R, nulls, runs, seed=seed).decided:
            return runs
        runs *= 2
    return None


def advice(
    observed_R: Sequence[float] | np.ndarray,
    nulls: Mapping[str, np.ndarray],
    *,
    runs: int = 8,
    alpha: float = 0.05,
    tests: int = 1,
    seed: int = 0,
) -> str:
    """One sentence: is the ratio decided with `runs` runs, what it would take, and the power of the draws at hand.

    `nulls` maps a name to draws whose last axis are those of one run. Power is that of one run against the hardest
    null, at the level alpha/tests of Holm's first step.

    Raises:
        ValueError: see `ratio_precision`, `draws_needed` and `power`.
    """
    now = ratio_precision(observed_R, nulls, runs, seed=seed)
    band = f"95% band {now.lo:.2f} to {now.hi:.2f} with {runs} runs"
    drawn = min(np.shape(values)[-1] for values in nulls.values())
    reached = min(power(observed_R, values, drawn, alpha / tests, seed=seed) for values in nulls.values())
    draws = (
        f"p < {alpha:g} over {tests} {'test' if tests == 1 else 'tests'} needs {draws_needed(alpha, tests)} null draws "
        f"or more, one run with {drawn} has power {reached:.2f}"
    )
    if now.decided:
        return f"ratio decided: {band} excludes 1; {draws}"
    needed = runs_needed(observed_R, nulls, seed=seed)
    remedy = "no number of runs up to 1024 decides it" if needed is None else f"{needed} runs would decide it"
    return f"ratio undecidable with {runs} runs: {band} holds 1; {remedy}; {draws}"
