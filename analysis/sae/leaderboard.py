"""The proxy leaderboard: does a cheap proxy rank the cells as the patched loss does?

Shape suffixes: R resamples or leave-one-out samples, C cells, P proxies, G clusters.

What an interval is about. "Pooled": the rank correlation over all cells of this grid of models, layers, k and budgets;
what varies is the trajectory, that is, how one configuration (model, layer, k) with its trainings and budgets deviates
from the grid's common trends, and the evaluated sequences. Nothing is said about other models or layers. "Within k":
both sides minus their mean over the cells of the same k; what varies is the k-group, for other values of k in the same
models and layers, and the sequences.

How. A jackknife that leaves out one cluster at a time (a trajectory with all its seeds and budgets; a k with all its
cells) on Fisher's z scale, with t of G − 1 degrees of freedom (Efron & Tibshirani 1993, "An Introduction to the
Bootstrap", ch. 11), plus the variance over resampled sequences, joined as `analysis.crossed` joins components.
Differences of two proxies join their intervals by the jackknife's own correlation between them (Zou 2007, "Toward using
confidence intervals to compare correlations", Psychological Methods 12). All proxies see the same samples: differences
are paired. Below MIN_CLUSTERS clusters the intervals are too narrow: none is given. Only rank correlations have
intervals: those of Pearson's depend on how the cells are spread (coverage down to .86 where the spread falls with k).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from analysis.bootstrap import Floats
from analysis.crossed import LEVEL
from analysis.sae.cells import RESAMPLED, SequenceTables, needs_units

TARGET = "ce_rec"
REFERENCE = "r2"
MIN_CELLS = 3
RELATIONS = ("pooled", "within k")
STATISTICS = ("pearson", "spearman")
MIN_CLUSTERS = 6
NEEDS_RANKS = "Pearson's has no interval; see Spearman"
_CLUSTERS = {"pooled": ["model", "layer", "k"], "within k": ["k"]}
_CLUSTER_NAMES = {"pooled": "trajectories (model, layer and k)", "within k": "values of k"}


@dataclass(frozen=True)
class Proxy:
    """A score that should rise with CE_rec: a transform of one metric of the cells table."""

    name: str
    label: str
    metric: str
    transform: Callable[[Floats], Floats]


def _identity(x: Floats) -> Floats:
    return x


PROXIES = (
    Proxy("r2", "R²", "r2", _identity),
    Proxy("r2_legacy", "R² legacy", "r2_legacy", _identity),
    Proxy("r2_no_sinks", "R² without sinks", "r2_no_sinks", _identity),
    Proxy("r2_deflated1", "R² without top eigenvector", "r2_deflated1", _identity),
    Proxy("r2_whitened", "R² whitened", "r2_whitened", _identity),
    Proxy("cosine", "cosine", "cosine", _identity),
    Proxy("inv_nmse", "1/NMSE", "nmse", np.reciprocal),
    Proxy("inv_swd", "1/SWD", "swd", np.reciprocal),
    Proxy("inv_abs_gdelta", "1/E|gᵀδ|", "abs_gdelta", np.reciprocal),
    Proxy("first_order", "−Σgᵀδ (first order)", "first_order", np.negative),
    Proxy("fisher_sampled", "−Fisher form, drawn labels", "fisher_sampled", np.negative),
    Proxy("fisher_diag", "−Fisher form, diagonal", "fisher_diag", np.negative),
    Proxy("fisher", "−Fisher form", "fisher", np.negative),
    Proxy("kl", "−KL(p ‖ p̂)", "kl", np.negative),
    Proxy("attention_plan", "−attention-plan distance", "attention_plan", np.negative),
)
_SMALLEST_P = 1e-9
BEYOND_R2 = tuple(p.name for p in PROXIES if p.name in ("inv_swd", "inv_abs_gdelta") or p.transform is np.negative)
"""Proxies from rung 1 of the ladder on: those that look at the language model."""


@dataclass(frozen=True)
class Leaderboard:
    """`table`: a row a scope, relation, statistic and proxy. `pairs`: every difference between two proxies.

    `dropped` says in words which proxies the cells could not supply.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    dropped: tuple[str, ...]


def demean_within(x_RC: Floats, weight_RC: Floats, group_C: npt.NDArray[np.int64]) -> Floats:
    """x minus its weighted mean over the cells of the same group; rounding residues become exact zeros."""
    member_CG = (group_C[:, None] == np.unique(group_C)[None, :]).astype(float)
    total_RG = np.maximum(weight_RC @ member_CG, 1e-300)
    centred = x_RC - ((weight_RC * x_RC) @ member_CG / total_RG) @ member_CG.T
    return np.where(np.abs(centred) <= 1e-12 * np.abs(x_RC), 0.0, centred)


def pearson(x_RC: Floats, y_RC: Floats, weight_RC: Floats) -> Floats:
    """Weighted Pearson correlation of each row, (R,); NaN where either side does not vary."""
    total = weight_RC.sum(axis=1, keepdims=True)
    x = x_RC - (weight_RC * x_RC).sum(axis=1, keepdims=True) / total
    y = y_RC - (weight_RC * y_RC).sum(axis=1, keepdims=True) / total
    var_x, var_y = (weight_RC * x * x).sum(axis=1), (weight_RC * y * y).sum(axis=1)
    floor_x = 1e-24 * (weight_RC * x_RC * x_RC).sum(axis=1)
    floor_y = 1e-24 * (weight_RC * y_RC * y_RC).sum(axis=1)
    varies = (var_x > floor_x) & (var_y > floor_y)
    scale = np.sqrt(np.where(varies, var_x, 1.0)) * np.sqrt(np.where(varies, var_y, 1.0))
    return np.where(varies, np.clip((weight_RC * x * y).sum(axis=1) / scale, -1.0, 1.0), np.nan)


def midranks(x_RC: Floats, weight_RC: Floats) -> Floats:
    """Average ranks of each row when cell c occurs weight_RC[r, c] times; ties share their mean rank."""
    order = np.argsort(x_RC, axis=1, kind="stable")
    x = np.take_along_axis(x_RC, order, axis=1)
    weight = np.take_along_axis(weight_RC, order, axis=1)
    upto = np.cumsum(weight, axis=1)
    position = np.broadcast_to(np.arange(x.shape[1]), x.shape)
    new = np.ones(x.shape, dtype=bool)
    new[:, 1:] = x[:, 1:] != x[:, :-1]
    last_of_tie = np.ones(x.shape, dtype=bool)
    last_of_tie[:, :-1] = new[:, 1:]
    first = np.maximum.accumulate(np.where(new, position, 0), axis=1)
    ends = np.where(last_of_tie, position, x.shape[1])
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    before = np.take_along_axis(upto - weight, first, axis=1)
    ranks = np.empty_like(upto)
    np.put_along_axis(ranks, order, (before + 1 + np.take_along_axis(upto, last, axis=1)) / 2, axis=1)
    return ranks


def _correlations(
    series_PRC: list[Floats], weight_RC: Floats, group_C: npt.NDArray[np.int64], relation: str, statistic: str
) -> Floats:
    """(P, R): correlations of the first series with each of the others."""
    if relation == "within k":
        series_PRC = [demean_within(x, weight_RC, group_C) for x in series_PRC]
    if statistic == "spearman":
        series_PRC = [midranks(x, weight_RC) for x in series_PRC]
    return np.stack([pearson(x, series_PRC[0], weight_RC) for x in series_PRC[1:]])


def _fisher(r: Floats, n_cells: int) -> Floats:
    """arctanh, with |r| = 1 moved inwards by less than a step of Spearman's correlation of that many cells."""
    most = 1 - 3 / n_cells**3
    return np.arctanh(np.clip(r, -most, most))


@dataclass(frozen=True)
class _Spread:
    """What the intervals of one scope and relation are made of; `needs` says why there is none.

    parts: covariances between proxies on the z scale, each with its degrees of freedom (clusters; sequences).
    """

    parts: tuple[tuple[Floats, int], ...]
    needs: str = ""

    @property
    def over_sequences(self) -> bool:
        return len(self.parts) > 1

    def squares(self, alpha: float) -> Floats:
        """Squared half widths of intervals of level 1 − alpha, and their products between proxies."""
        return np.asarray(sum(float(special.stdtrit(df, alpha / 2)) ** 2 * part_PP for part_PP, df in self.parts))

    def limits(self, value_P: Floats, n_cells: int, alpha: float = 1 - LEVEL) -> tuple[Floats, Floats]:
        z_P, half_P = _fisher(value_P, n_cells), np.sqrt(np.diag(self.squares(alpha)))
        return np.tanh(z_P - half_P), np.tanh(z_P + half_P)

    def difference(
        self, value_P: Floats, n_cells: int, i: int, j: int, alpha: float = 1 - LEVEL
    ) -> tuple[float, float]:
        """Limits of value i less value j (Zou 2007, eq. 15)."""
        both = [i, j]
        lo_2, hi_2 = (x[both] for x in self.limits(value_P, n_cells, alpha))
        square_22 = self.squares(alpha)[np.ix_(both, both)]
        together = float(square_22[0, 1] / math.sqrt(square_22[0, 0] * square_22[1, 1]))
        down = (value_P[i] - lo_2[0], hi_2[1] - value_P[j])
        up = (hi_2[0] - value_P[i], value_P[j] - lo_2[1])
        below, above = (math.sqrt(max(a**2 + b**2 - 2 * together * a * b, 0.0)) for a, b in (down, up))
        difference = float(value_P[i] - value_P[j])
        return difference - below, difference + above

    def p(self, value_P: Floats, n_cells: int, i: int, j: int) -> float:
        """Two-sided p of a difference against 0: the smallest alpha whose limits leave 0 out."""
        if not np.isfinite(self.difference(value_P, n_cells, i, j)).all():
            return math.nan
        low, high = math.log(_SMALLEST_P), 0.0
        for _ in range(30):
            middle = (low + high) / 2
            below, above = self.difference(value_P, n_cells, i, j, math.exp(middle))
            low, high = (middle, high) if below <= 0 <= above else (low, middle)
        return math.exp(high)


class _Scope:
    """The cells of one scope, with everything that its rows need."""

    def __init__(self, cells: pd.DataFrame, proxies: list[Proxy], units: int | None, unit: str) -> None:
        """`units`: how many documents or sequences (`unit`) every cell was evaluated on; None without their tables."""
        self.cells, self.proxies, self.units, self.unit = cells, proxies, units, unit
        self.k_C = cells["k"].to_numpy(np.int64)
        columns = {name: cells[name].to_numpy(float)[None] for name in (TARGET, *(p.metric for p in proxies))}
        self.series = self.of(columns)
        self.resampled: dict[str, list[Floats]] = {relation: [] for relation in RELATIONS}
        self.by_sequence = np.array([p.metric in RESAMPLED for p in proxies])

    def of(self, metrics: Mapping[str, Floats]) -> list[Floats]:
        return [metrics[TARGET], *(proxy.transform(metrics[proxy.metric]) for proxy in self.proxies)]

    def add_resamples(self, metrics: Mapping[str, Floats]) -> None:
        """Rank correlations of all cells in some resamples of the sequences."""
        some = [proxy for proxy, known in zip(self.proxies, self.by_sequence, strict=True) if known]
        series = [metrics[TARGET], *(proxy.transform(metrics[proxy.metric]) for proxy in some)]
        ones = np.ones_like(series[0])
        for relation in RELATIONS:
            r_PR = np.full((len(self.proxies), len(ones)), np.nan)
            if some:
                r_PR[self.by_sequence] = _correlations(series, ones, self.k_C, relation, "spearman")
            self.resampled[relation].append(_fisher(r_PR, len(self.cells)))

    def values(self, relation: str, statistic: str) -> Floats:
        ones = np.ones((1, len(self.cells)))
        return _correlations(self.series, ones, self.k_C, relation, statistic)[:, 0]

    def spread(self, relation: str, statistic: str) -> _Spread:
        nothing = np.full((len(self.proxies),) * 2, np.nan)
        if statistic == "pearson":
            return _Spread(((nothing, 1),), NEEDS_RANKS)
        cluster_C = self.cells.groupby(_CLUSTERS[relation], sort=False).ngroup().to_numpy()
        n_clusters = int(cluster_C.max()) + 1
        if n_clusters < MIN_CLUSTERS:
            return _Spread(((nothing, 1),), f"needs ≥ {MIN_CLUSTERS} {_CLUSTER_NAMES[relation]}")
        if self.units is not None and needs_units(self.units, self.unit):
            return _Spread(((nothing, 1),), needs_units(self.units, self.unit))
        kept_RC = (cluster_C != np.arange(n_clusters)[:, None]).astype(float)
        series = [np.broadcast_to(x, kept_RC.shape) for x in self.series]
        z_PR = _fisher(_correlations(series, kept_RC, self.k_C, relation, statistic), len(self.cells))
        deviation_PR = z_PR - z_PR.mean(axis=1, keepdims=True)
        jackknife_PP = (n_clusters - 1) / n_clusters * (deviation_PR @ deviation_PR.T)
        jackknife_PP[np.diag(jackknife_PP) == 0] = np.nan  # all samples give the same ranking: no spread is known
        parts = [(jackknife_PP, n_clusters - 1)]
        if self.resampled[relation] and self.units:
            over_sequences_PP = np.cov(np.concatenate(self.resampled[relation], axis=1)).reshape(jackknife_PP.shape)
            parts.append((over_sequences_PP, self.units - 1))
        return _Spread(tuple(parts))


def available_proxies(cells: pd.DataFrame) -> tuple[list[Proxy], list[str]]:
    """The proxies every cell can supply, and why the others were dropped."""
    kept, dropped = [], []
    for proxy in PROXIES:
        if proxy.metric not in cells.columns or cells[proxy.metric].isna().all():
            dropped.append(f"{proxy.label}: no cell measured `{proxy.metric}`")
            continue
        values = cells[proxy.metric].to_numpy(float)
        with np.errstate(divide="ignore"):
            undefined = int((~np.isfinite(proxy.transform(values))).sum())
        if undefined:
            dropped.append(f"{proxy.label}: `{proxy.metric}` is missing or zero in {undefined} of {len(cells)} cells")
        else:
            kept.append(proxy)
    return kept, dropped


def leaderboard(
    cells: pd.DataFrame,
    tables: SequenceTables,
    *,
    scopes: Mapping[str, npt.NDArray[np.bool_]] | None = None,
    n_resamples: int = 400,
    seed: int = 0,
) -> Leaderboard:
    """Correlations of CE_rec with each proxy, pooled and within fixed k; rank correlations with 95% intervals.

    Args:
        cells: prepared cells (`cells.prepare_cells`).
        tables: their evaluated sequences, in the same order.
        scopes: name → mask over the cells; by default all cells. A scope of fewer than 3 cells is left out.
        n_resamples: of the sequences.
        seed: of the resamples.
    """
    proxies, dropped = available_proxies(cells)
    masks = {"all cells": np.ones(len(cells), dtype=bool)} if scopes is None else scopes
    masks = {name: np.asarray(mask) for name, mask in masks.items() if int(np.sum(mask)) >= MIN_CELLS}
    if not proxies or not masks:
        return Leaderboard(pd.DataFrame(columns=_TABLE), pd.DataFrame(columns=_PAIRS), tuple(dropped))
    counts_C = tables.unit_counts
    chosen = {
        name: _Scope(cells[mask], proxies, int(counts_C[mask].min()) if tables.given else None, tables.unit)
        for name, mask in masks.items()
    }
    if tables.given:
        metrics = [TARGET, *(proxy.metric for proxy in proxies if proxy.metric in RESAMPLED)]
        for block in tables.blocks(metrics, n_resamples=n_resamples, seed=seed):
            for name, mask in masks.items():
                chosen[name].add_resamples({metric: values[:, mask] for metric, values in block.items()})
    rows, pairs = [], []
    for (name, scope), relation, statistic in itertools.product(chosen.items(), RELATIONS, STATISTICS):
        labels = {"scope": name, "relation": relation, "statistic": statistic}
        value_P, spread = scope.values(relation, statistic), scope.spread(relation, statistic)
        rows += _rank_rows(labels, proxies, value_P, spread, len(scope.cells))
        pairs += _pair_rows(labels, proxies, value_P, spread, len(scope.cells))
    return Leaderboard(pd.DataFrame(rows, columns=_TABLE), pd.DataFrame(pairs, columns=_PAIRS), tuple(dropped))


_KEY = ["scope", "relation", "statistic"]
_TABLE = [*_KEY, "rank", "proxy", "label", "n_cells", "value", "lo", "hi"]
_TABLE += [f"minus_{REFERENCE}", *(f"minus_{REFERENCE}_{end}" for end in ("lo", "hi", "p")), "needs"]
_PAIRS = [*_KEY, "proxy_a", "proxy_b", "difference", "lo", "hi", "needs"]


def _rank_rows(
    key: dict[str, str], proxies: list[Proxy], value_P: Floats, spread: _Spread, n_cells: int
) -> list[dict[str, object]]:
    reference = next((i for i, proxy in enumerate(proxies) if proxy.name == REFERENCE), None)
    order = sorted(range(len(proxies)), key=lambda i: (np.isnan(value_P[i]), -value_P[i]))
    lo_P, hi_P = spread.limits(value_P, n_cells)
    rows = []
    for rank, i in enumerate(order, start=1):
        row = {**key, "rank": rank, "proxy": proxies[i].name, "label": proxies[i].label, "n_cells": n_cells}
        row |= {"value": value_P[i], "lo": lo_P[i], "hi": hi_P[i]}
        row["needs"] = spread.needs or ("" if np.isfinite(lo_P[i]) else _needs(proxies[i], spread))
        if reference is not None and i != reference:
            row[f"minus_{REFERENCE}"] = value_P[i] - value_P[reference]
            limits = spread.difference(value_P, n_cells, i, reference)
            row[f"minus_{REFERENCE}_lo"], row[f"minus_{REFERENCE}_hi"] = limits
            row[f"minus_{REFERENCE}_p"] = spread.p(value_P, n_cells, i, reference)
        rows.append(row)
    return rows


def _needs(proxy: Proxy, spread: _Spread) -> str:
    if spread.over_sequences and proxy.metric not in RESAMPLED:
        return f"{proxy.label} keeps no sums by sequence"
    return "needs ranks that vary between clusters"


def _pair_rows(
    key: dict[str, str], proxies: list[Proxy], value_P: Floats, spread: _Spread, n_cells: int
) -> list[dict[str, object]]:
    rows = []
    for i, first in enumerate(proxies):
        for j in range(i):
            lo, hi = spread.difference(value_P, n_cells, i, j)
            row = {**key, "proxy_a": first.name, "proxy_b": proxies[j].name, "lo": lo, "hi": hi, "needs": spread.needs}
            rows.append(row | {"difference": value_P[i] - value_P[j]})
    return rows
