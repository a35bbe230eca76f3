"""How a statement's error rate is measured: simulate data whose truth is known, and count the product's statements.

A study lists its statements in `benchmarks/_calibration_STUDY.py`:

    STATEMENTS = (
        Statement(
            name="95% interval of a difference of two architectures",
            printed="codec_lm report, Differences",
            kind="coverage",
            simulate=difference_coverage,          # a function at module level: (rng, trials, **setting) -> Tally
            settings=grid(seeds=(2, 3, 5), seed_noise=(0.1, 1.0, 5.0)),
            quick=({"seeds": 2, "seed_noise": 5.0},),
        ),
    )

`simulate` draws data from `rng`, calls the product's own function as the report does, and counts. For an interval:
trials whose interval holds the truth, and the mean of its width over the width that known variances would give. For a
test: trials that reject although nothing is there (size), any of a family (family-wise error), or although something
is (power). A setting whose interval does not exist (the product prints "–") counts no trial.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

Kind = Literal["coverage", "size", "family-wise error", "power"]
Setting = Mapping[str, object]

NOMINAL: dict[Kind, float] = {"coverage": 0.95, "size": 0.05, "family-wise error": 0.05}
LEAST_COVERAGE, WIDE_COVERAGE = 0.93, 0.985
CLOSELY = 4  # times the trials of a setting whose rate lies beyond its bound
_SIZE_FACTOR, _FAMILY_FACTOR = 1.3, 1.5  # 5% tests: size up to .065, family-wise error up to .075


@dataclass(frozen=True)
class Tally:
    """Counts of a batch of trials: `hits` of `trials`; `width` is the mean relative width of intervals (NaN: none).

    before: (hits, trials) of the draws before, where these are fresh ones.
    """

    hits: int
    trials: int
    width: float = math.nan
    before: tuple[int, int] | None = None

    @property
    def rate(self) -> float:
        return self.hits / self.trials if self.trials else math.nan

    def limits(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper-Pearson limits of the rate: the simulation's own error. (0, 1) without a trial."""
        if not self.trials:
            return 0.0, 1.0
        found = stats.binomtest(self.hits, self.trials).proportion_ci(level)
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Statement:
    """Something that a report prints, and how to find out how often it is wrong.

    name, printed: what is stated, and where. settings: the grid, one simulation each. quick: the settings of a quick
    run and of the tests; they should be those that broke the method before. trials, quick_trials: per setting.
    nominal: of the statement; by default that of its kind. note: why a width or a rate is as it is, for the page.
    """

    name: str
    printed: str
    kind: Kind
    simulate: Callable[..., Tally]
    settings: Sequence[Setting]
    quick: Sequence[Setting]
    trials: int = 2_000
    quick_trials: int = 300
    nominal: float = math.nan
    note: str = ""

    @property
    def level(self) -> float:
        return NOMINAL.get(self.kind, math.nan) if math.isnan(self.nominal) else self.nominal

    @property
    def bound(self) -> float:
        """The worst rate that may be printed: at least this for coverage, at most for errors; NaN for power."""
        if self.kind == "coverage":
            return self.level - (NOMINAL["coverage"] - LEAST_COVERAGE)
        factor = {"size": _SIZE_FACTOR, "family-wise error": _FAMILY_FACTOR}.get(self.kind, math.nan)
        return self.level * factor

    def holds(self, tally: Tally, level: float = 0.95) -> bool:
        """The measured rate keeps the bound, or misses it by less than the simulation's own error at this level."""
        low, high = tally.limits(level)
        if self.kind == "coverage":
            return high >= self.bound
        return self.kind == "power" or low <= self.bound

    def breaks(self, tally: Tally) -> bool:
        """The measured rate itself lies beyond the bound, whether or not by the simulation's error."""
        if not tally.trials:
            return False
        return tally.rate < self.bound if self.kind == "coverage" else tally.rate > self.bound

    def worse(self, tally: Tally) -> float:
        """A number that is larger the worse the rate is."""
        if not tally.trials:
            return -math.inf
        return -tally.rate if self.kind in ("coverage", "power") else tally.rate


def grid(**values: Sequence[object]) -> list[dict[str, object]]:
    """Every combination of the values, one setting each."""
    return [dict(zip(values, some, strict=True)) for some in product(*values.values())]


def spelled(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def measure(statement: Statement, setting: Setting, trials: int, draws: str = "") -> Tally:
    """One simulation; its random numbers follow from the statement, the setting and the name of the draws, whatever
    else is run."""
    name = f"{statement.printed}|{statement.name}|{spelled(setting)}{draws}"
    # Arrow's strings take a fifth of the time of frames as small as these
    with pd.option_context("mode.string_storage", "python"):
        return statement.simulate(np.random.default_rng(zlib.crc32(name.encode())), trials, **setting)


def measure_closely(statement: Statement, setting: Setting, trials: int) -> Tally:
    """`measure`, and where the rate lies beyond the bound once more, with `CLOSELY` times as many fresh draws.

    Among hundreds of settings some lie beyond it by the simulation's own error. The fresh draws alone count then, so
    that looking twice does not favour either answer.
    """
    first = measure(statement, setting, trials)
    if not statement.breaks(first):
        return first
    return replace(measure(statement, setting, CLOSELY * trials, "|again"), before=(first.hits, first.trials))


def covers(lo: float, hi: float, truth: float) -> bool:
    return bool(lo <= truth <= hi)
