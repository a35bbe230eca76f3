"""The statement of a search's report: the best setting's value over fresh trainings.

A training's value is the setting's own (spread by `spread` standard deviations of the chance of a training), what the
held-out data add to it (`data` standard deviations, another draw for each setting and each data set) and that chance,
normal or a skewed one. The search measures each of `settings` settings once, keeps the best, and trains it again from
fresh seeds, measured on data of their own; the truth is the kept setting's mean on those data. The interval of the
optimism is the same one, turned round at the chosen value: it holds its truth in the same trials.
"""

from __future__ import annotations

import numpy as np

from analysis.search.trials import Again
from benchmarks._calibration import Statement, Tally, covers, grid


def fresh_coverage(
    rng: np.random.Generator, trials: int, *, settings: int, spread: float, data: float, fresh: int, chance: str
) -> Tally:
    """Coverage of the interval after choosing the best of `settings`."""

    def noise(shape: tuple[int, ...]) -> np.ndarray:
        if chance == "normal":
            return rng.standard_normal(shape)
        return rng.exponential(1.0, shape) - 1.0  # sd 1, skewness 2

    hits, widths = 0, 0.0
    for _ in range(trials):
        own_S = spread * rng.standard_normal(settings)
        seen_S, unseen_S = (own_S + data * rng.standard_normal(settings) for _ in range(2))
        best = int((seen_S + noise((settings,))).argmin())
        interval = Again(tuple(unseen_S[best] + noise((fresh,)))).interval()
        assert interval is not None
        hits += covers(interval.lo, interval.hi, float(unseen_S[best]))
        widths += (interval.hi - interval.lo) / (2 * 1.959964 / np.sqrt(fresh))
    return Tally(hits, trials, widths / trials)


STATEMENTS = (
    Statement(
        name="95% interval of the best setting, and of the optimism, over fresh trainings",
        printed="report of a search, Best setting",
        kind="coverage",
        simulate=fresh_coverage,
        settings=grid(settings=(1, 24, 200), spread=(0.0, 1.0), data=(0.0, 1.0), fresh=(2, 5, 10), chance=("normal",)),
        quick=({"settings": 24, "spread": 0.0, "data": 1.0, "fresh": 5, "chance": "normal"},),
        note="a t interval: with few trainings wider than one that knows the variance",
    ),
)
