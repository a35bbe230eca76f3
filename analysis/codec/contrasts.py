"""Architectures at their own best learning rate, and differences of their held-out likelihood.

Every seed of an architecture is a training of its own, and all trained models score the same held-out recordings:
`analysis.crossed` gives the intervals and p-values, for other seeds and other recordings. One seed says nothing about
other trainings, so that its differences have no interval and no p.

Shape suffixes: S seeds, U units (recordings), A architectures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from analysis.crossed import NEEDS_SEEDS, CrossedArms, Effect, ratio_influence
from analysis.multiplicity import ALPHA, holm_list
from analysis.recordings import NEEDS_RECORDINGS, unit_words, wide_sums


def choose_lr(
    models: pd.DataFrame, column: str = "val_nll_ema", tried: Mapping[str, Sequence[float]] | None = None
) -> pd.DataFrame:
    """One row per architecture: architecture, lr (its best), lr_tried (tuple), edge, n_seeds, and the mean `column`.

    The best learning rate is the one of lowest mean over seeds, among those that the most seeds finished with. `edge`
    is "" inside the grid, "lowest" or "highest" at its edge (a better one may lie outside), "only one" without a
    choice. Every architecture is judged on the clips it was chosen on, so each mean is a little too low, and more so
    for larger grids. Input columns: architecture, lr, seed and `column`. `tried` gives the rates of each architecture
    where some left no row (stopped early, or failed).
    """
    records = []
    for architecture, some in models.groupby("architecture", sort=False):
        by_lr = some.groupby("lr")[column].agg(["mean", "size"]).sort_index()
        whole = by_lr[by_lr["size"] == by_lr["size"].max()]
        best = float(whole["mean"].idxmin())
        grid = tuple(sorted({*(float(x) for x in by_lr.index), *(tried or {}).get(str(architecture), ())}))
        edge = "only one" if len(grid) == 1 else {0: "lowest", len(grid) - 1: "highest"}.get(grid.index(best), "")
        records.append(
            {
                "architecture": architecture,
                "lr": best,
                "lr_tried": grid,
                "edge": edge,
                "n_seeds": int(whole["size"].iloc[0]),
                column: float(whole["mean"].min()),
            }
        )
    return pd.DataFrame(records)


@dataclass(frozen=True)
class Arms:
    """Held-out likelihood of architectures: their names, their tables, and what the tables' columns are called."""

    names: tuple[str, ...]
    crossed: CrossedArms
    units: str

    @property
    def n_units(self) -> int:
        return self.crossed.units

    @property
    def n_seeds(self) -> tuple[int, ...]:
        return tuple(self.crossed.seeds(arm) for arm in range(len(self.names)))

    def table(self) -> pd.DataFrame:
        """One row per architecture, best first: architecture, val_nll, lo, hi (95%), n_seeds, seed_sd, needs.

        With several seeds the limits are for other seeds and recordings; with one seed for other recordings alone, of
        the trained model at hand. seed_sd: standard deviation of val_nll over the seeds, NaN for one.
        """
        found = [self._whole(self.crossed.mean(arm)) for arm in range(len(self.names))]
        table = pd.DataFrame(
            {
                "architecture": self.names,
                "val_nll": [e.value for e in found],
                "lo": [e.lo for e in found],
                "hi": [e.hi for e in found],
                "n_seeds": self.n_seeds,
                "seed_sd": [self.crossed.seed_sd(arm) for arm in range(len(self.names))],
                "needs": [e.needs for e in found],
            }
        )
        return table.sort_values("val_nll", ignore_index=True)

    def differences(self) -> pd.DataFrame:
        """One row per pair (a, b), a the better: difference val_nll(b) - val_nll(a), lo, hi (95%), p, p_holm, needs.

        p_holm controls the error of all pairs that could be tested together (Holm 1979). lo, hi, p and p_holm are NaN
        where `needs` says what is missing.
        """
        order = np.argsort([self.crossed.value(arm) for arm in range(len(self.names))], kind="stable").tolist()
        pairs = list(combinations(order, 2))
        found = [self._whole(e) for e in self.crossed.differences([(b, a) for a, b in pairs])]
        records = [
            {
                "a": self.names[a],
                "b": self.names[b],
                "difference": e.value,
                "lo": e.lo,
                "hi": e.hi,
                "p": e.p,
                "needs": e.needs,
            }
            for (a, b), e in zip(pairs, found, strict=True)
        ]
        table = pd.DataFrame(records, columns=["a", "b", "difference", "lo", "hi", "p", "needs"])
        table.insert(6, "p_holm", holm_list(table["p"].tolist()))
        return table

    def _whole(self, effect: Effect) -> Effect:
        """As it is, but nothing follows for other audio from one recording."""
        if self.n_units > 1 or effect.needs == NEEDS_SEEDS:
            return effect
        return Effect(effect.value, math.nan, math.nan, math.nan, NEEDS_RECORDINGS)

    def odd_seeds(self) -> tuple[str, float, float, float] | None:
        """(architecture, its seeds' sd, the others' pooled, p) where its seeds differ clearly more than the others'.

        The intervals pool the seeds' variance of all architectures. Largest F ratio of one architecture's variance and
        that of all others, p < .05 after Bonferroni's correction over the architectures ('t Lam 2010, "Scrutiny of
        variance results for outliers: Cochran's test optimized", Anal. Chim. Acta 659). None where no such one is
        found, or fewer than two have several seeds.
        """
        repeated = [arm for arm, seeds in enumerate(self.n_seeds) if seeds > 1]
        if len(repeated) < 2:
            return None
        variance = np.array([self.crossed.seed_sd(arm) ** 2 for arm in repeated])
        df = np.array([self.n_seeds[arm] - 1 for arm in repeated])
        rest_df = df.sum() - df
        rest = ((variance * df).sum() - variance * df) / rest_df
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.nan_to_num(stats.f.sf(variance / rest, df, rest_df), nan=1.0) * len(repeated)
        worst = int(p.argmin())
        if p[worst] >= ALPHA:
            return None
        return self.names[repeated[worst]], math.sqrt(variance[worst]), math.sqrt(rest[worst]), float(p[worst])


def arm_resamples(clips: pd.DataFrame) -> Arms:
    """val_nll (nats per token) by architecture, seed and recording; nothing is resampled, the name is a contract.

    Args:
        clips: one row per model and held-out clip, columns architecture, seed, clip_id, nll (sum over tokens), tokens,
            and recording_id of the recording that the clip was cut from (without it, clips are taken for recordings).
    Raises:
        ValueError: no clip, or models that were scored on other clips or tokens.
    """
    nll, tokens = wide_sums(clips, ["architecture", "seed"])
    if nll.isna().to_numpy().any() or (tokens.to_numpy() != tokens.to_numpy()[:1]).any():
        counts = clips.groupby(["architecture", "seed"])["tokens"].agg(["size", "sum"])
        raise ValueError(f"models were scored on different clips (clips and tokens of each: {counts.to_dict('index')})")
    names = tuple(dict.fromkeys(clips["architecture"]))
    tables = (ratio_influence(nll.loc[name].to_numpy(float), tokens.loc[name].to_numpy(float)) for name in names)
    return Arms(names, CrossedArms(tuple(tables)), unit_words(clips))
