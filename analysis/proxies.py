"""The proxy leaderboard: does a cheap proxy rank the cells as the patched loss does?

Shape suffixes: R resamples, C cells, P proxies, G groups of equal k.

Each resample draws the evaluated sequences (once for all cells that share them), then configurations
(model, layer, k, tokens) with replacement, then seeds within each drawn configuration. Every proxy is
correlated with CE_rec on the same resamples, so differences between proxies are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.bootstrap import Floats, percentile_interval
from analysis.cells import SequenceTables, configurations

TARGET = "ce_rec"
REFERENCE = "r2"
MIN_CELLS = 3
RELATIONS = ("pooled", "within k")
STATISTICS = ("pearson", "spearman")


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
    Proxy("cosine", "cosine", "cosine", _identity),
    Proxy("inv_nmse", "1/NMSE", "nmse", np.reciprocal),
    Proxy("inv_swd", "1/SWD", "swd", np.reciprocal),
    Proxy("inv_abs_gdelta", "1/E|gᵀδ|", "abs_gdelta", np.reciprocal),
)


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
    proxy_PRC: list[Floats], target_RC: Floats, weight_RC: Floats, group_C: npt.NDArray[np.int64]
) -> dict[tuple[str, str], Floats]:
    """(relation, statistic) → (P, R)."""
    result = {}
    for relation in RELATIONS:
        series = [target_RC, *proxy_PRC]
        if relation == "within k":
            series = [demean_within(x, weight_RC, group_C) for x in series]
        result[relation, "pearson"] = np.stack([pearson(x, series[0], weight_RC) for x in series[1:]])
        ranks = [midranks(x, weight_RC) for x in series]
        result[relation, "spearman"] = np.stack([pearson(x, ranks[0], weight_RC) for x in ranks[1:]])
    return result


class _CellDraws:
    """Two-stage draws of cells: configurations with replacement, then each one's seeds with replacement."""

    def __init__(self, cells: pd.DataFrame) -> None:
        _, rows = configurations(cells)
        self._n_seeds_G = np.array([len(r) for r in rows])
        self._row_GK = np.full((len(rows), self._n_seeds_G.max()), -1)
        for g, r in enumerate(rows):
            self._row_GK[g, : len(r)] = r
        self._size = len(cells)

    def weights(self, n: int, rng: np.random.Generator) -> Floats:
        """weight_RC: how often each cell occurs in each of n resamples."""
        groups, width = self._row_GK.shape
        drawn_RG = rng.integers(groups, size=(n, groups))
        seeds_RG = self._n_seeds_G[drawn_RG][..., None]
        pick_RGK = (rng.random((n, groups, width)) * seeds_RG).astype(np.int64)
        cell_RGK = self._row_GK[drawn_RG[..., None], pick_RGK]
        valid = np.arange(width) < seeds_RG
        flat = (cell_RGK + np.arange(n)[:, None, None] * self._size)[valid]
        return np.bincount(flat, minlength=n * self._size).reshape(n, self._size).astype(float)


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
    n_resamples: int = 2_000,
    seed: int = 0,
) -> Leaderboard:
    """Correlations of CE_rec with each proxy, pooled and within fixed k, with paired 95% intervals.

    Args:
        cells: prepared cells (`cells.prepare_cells`).
        tables: their evaluated sequences, in the same order.
        scopes: name → mask over the cells; by default all cells. A scope of fewer than 3 cells is left out.
        n_resamples: R; memory holds 250 resamples at a time.
        seed: of both levels of resampling.
    """
    proxies, dropped = available_proxies(cells)
    chosen = {"all cells": np.ones(len(cells), dtype=bool)} if scopes is None else scopes
    chosen = {name: np.asarray(mask) for name, mask in chosen.items() if int(np.sum(mask)) >= MIN_CELLS}
    if not proxies or not chosen:
        return Leaderboard(pd.DataFrame(columns=_TABLE), pd.DataFrame(columns=_PAIRS), tuple(dropped))
    metrics = [TARGET, *(proxy.metric for proxy in proxies)]
    draws = {name: _CellDraws(cells[mask].reset_index(drop=True)) for name, mask in chosen.items()}
    rngs = {name: np.random.default_rng([seed, 2, position]) for position, name in enumerate(chosen)}
    k_C = cells["k"].to_numpy(np.int64)
    resampled: dict[tuple[str, str, str], list[Floats]] = {}
    for block in tables.blocks(metrics, n_resamples=n_resamples, seed=seed):
        for name, mask in chosen.items():
            series = [proxy.transform(block[proxy.metric][:, mask]) for proxy in proxies]
            weight = draws[name].weights(len(block[TARGET]), rngs[name])
            for key, value in _correlations(series, block[TARGET][:, mask], weight, k_C[mask]).items():
                resampled.setdefault((name, *key), []).append(value)
    rows, pairs = [], []
    for name, mask in chosen.items():
        subset = cells[mask]
        series = [proxy.transform(subset[proxy.metric].to_numpy(float)[None]) for proxy in proxies]
        ones = np.ones((1, len(subset)))
        points = _correlations(series, subset[TARGET].to_numpy(float)[None], ones, k_C[mask])
        for (relation, statistic), point in points.items():
            labels = {"scope": name, "relation": relation, "statistic": statistic}
            draws_PR = np.concatenate(resampled[name, relation, statistic], axis=1)
            rows += _rank_rows(labels, proxies, point[:, 0], draws_PR, len(subset))
            pairs += _pair_rows(labels, proxies, point[:, 0], draws_PR)
    return Leaderboard(pd.DataFrame(rows, columns=_TABLE), pd.DataFrame(pairs, columns=_PAIRS), tuple(dropped))


_KEY = ["scope", "relation", "statistic"]
_TABLE = [*_KEY, "rank", "proxy", "label", "n_cells", "value", "lo", "hi"]
_TABLE += [f"minus_{REFERENCE}", f"minus_{REFERENCE}_lo", f"minus_{REFERENCE}_hi"]
_PAIRS = [*_KEY, "proxy_a", "proxy_b", "difference", "lo", "hi"]


def _rank_rows(
    key: dict[str, str], proxies: list[Proxy], point_P: Floats, draws_PR: Floats, n_cells: int
) -> list[dict[str, object]]:
    reference = next((i for i, proxy in enumerate(proxies) if proxy.name == REFERENCE), None)
    order = sorted(range(len(proxies)), key=lambda i: (np.isnan(point_P[i]), -point_P[i]))
    rows = []
    for rank, i in enumerate(order, start=1):
        row = {**key, "rank": rank, "proxy": proxies[i].name, "label": proxies[i].label, "n_cells": n_cells}
        row |= {"value": point_P[i]} | dict(zip(("lo", "hi"), percentile_interval(draws_PR[i]), strict=True))
        if reference is not None and i != reference:
            interval = percentile_interval(draws_PR[i] - draws_PR[reference])
            row[f"minus_{REFERENCE}"] = point_P[i] - point_P[reference]
            row[f"minus_{REFERENCE}_lo"], row[f"minus_{REFERENCE}_hi"] = interval
        rows.append(row)
    return rows


def _pair_rows(key: dict[str, str], proxies: list[Proxy], point_P: Floats, draws_PR: Floats) -> list[dict[str, object]]:
    rows = []
    for i, first in enumerate(proxies):
        for j in range(i):
            lo, hi = percentile_interval(draws_PR[i] - draws_PR[j])
            difference = point_P[i] - point_P[j]
            rows.append(
                {**key, "proxy_a": first.name, "proxy_b": proxies[j].name, "difference": difference, "lo": lo, "hi": hi}
            )
    return rows
