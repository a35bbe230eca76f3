"""Resampling: one matrix product against SciPy, for a bootstrap interval and for the leaderboard's intervals.

Interval: CE_rec over 200 sequences, 5,000 resamples, against `scipy.stats.bootstrap` (paired, vectorised,
percentile). Leaderboard: rank correlations of CE_rec with five proxies, pooled and within k, over 36 cells, each
trajectory or k left out once and the sequences resampled, against a loop that does the same by `scipy.stats.spearmanr`.
CPU-seconds, paired.

    python benchmarks/bootstrap.py [--repeats 5] [--resamples 400] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from scipy import stats

from analysis.bootstrap import ce_rec_ci
from analysis.sae.cells import SequenceTables
from analysis.sae.columns import LOSSES, TOKEN_SUMS
from analysis.sae.leaderboard import PROXIES, leaderboard
from benchmarks._paired import machine, markdown_table, paired, timed, write_report

SEQUENCES, RESAMPLES, TOKENS = 200, 5_000, 256
MODELS, DEPTHS, KS = ("small", "large"), ("early", "mid", "late"), (8, 16, 32, 64, 128, 256)
PEER = "scipy"


def losses(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Per-sequence losses before and after patching."""
    original = rng.gamma(20, 0.15, size=SEQUENCES)
    return original, original * rng.normal(1.4, 0.1, size=SEQUENCES)


def grid(rng: np.random.Generator) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """36 cells with random sequence sums, in the report's columns."""
    rows, tables = [], {}
    for model in MODELS:
        for layer, depth in enumerate(DEPTHS):
            for k in KS:
                key = f"{model}-{depth}-{k}"
                table = pd.DataFrame({name: rng.gamma(9, 1.0, size=SEQUENCES) for name in TOKEN_SUMS})
                original, recon = losses(rng)
                table[list(LOSSES)] = np.stack([original, recon, original + 6], axis=1)
                tables[key] = table.assign(sequence=np.arange(SEQUENCES), n_tokens=TOKENS)
                identity = {
                    "model": model,
                    "depth": depth,
                    "layer": layer,
                    "k": k,
                    "seed": 0,
                    "tokens": 1,
                    "d_model": 8,
                }
                rows.append(identity | {"cell_key": key} | metrics(tables[key].sum().to_dict()))
    return pd.DataFrame(rows), tables


def metrics(total: Mapping[Any, Any]) -> dict[str, Any]:
    """CE_rec and the proxies' metrics from sums over sequences, as numbers or with one array entry per cell."""
    return {
        "ce_rec": 2 - total["loss_recon"] / total["loss_orig"],
        "r2": 1 - total["sse"] / total["sst"],
        "cosine": total["cos_sum"] / total["n_tokens"],
        "nmse": total["sse"] / total["sum_sq"],
        "swd": total["swd_sum"] / total["n_tokens"],
        "abs_gdelta": total["abs_sum"] / total["n_tokens"],
    }


def scipy_leaderboard(cells: pd.DataFrame, tables: dict[str, pd.DataFrame], n_resamples: int) -> np.ndarray:
    """95% limits of rank correlations by loops: (relation, proxy, limit)."""
    rng = np.random.default_rng(0)
    names = list(tables[cells["cell_key"][0]].columns)
    stacked = np.stack([tables[key].to_numpy() for key in cells["cell_key"]])

    def fisher(values: Mapping[Any, Any], kept: np.ndarray, within: bool) -> list[float]:
        columns = [values["ce_rec"], *(p.transform(values[p.metric]) for p in PROXIES)]
        columns = [np.asarray(column)[kept] for column in columns]
        if within:
            k = cells["k"].to_numpy()[kept]
            columns = [c - pd.Series(c).groupby(k).transform("mean").to_numpy() for c in columns]
        return [np.arctanh(stats.spearmanr(score, columns[0]).statistic) for score in columns[1:]]

    measured = {name: cells[name].to_numpy() for name in ("ce_rec", *(p.metric for p in PROXIES))}
    draws = []
    for _ in range(n_resamples):
        rows = rng.integers(SEQUENCES, size=SEQUENCES)
        draws.append(metrics(dict(zip(names, stacked[:, rows].sum(axis=1).T, strict=True))))
    limits = []
    everything = np.arange(len(cells))
    for within, cluster in ((False, everything), (True, cells["k"].to_numpy())):
        left_out = [np.flatnonzero(cluster != c) for c in np.unique(cluster)]
        samples = np.array([fisher(measured, kept, within) for kept in left_out])
        over_sequences = np.var([fisher(values, everything, within) for values in draws], axis=0, ddof=1)
        jackknife = (len(samples) - 1) ** 2 / len(samples) * np.var(samples, axis=0, ddof=1)
        t_clusters, t_sequences = stats.t.ppf(0.975, [len(samples) - 1, SEQUENCES - 1])
        half = np.sqrt(t_clusters**2 * jackknife + t_sequences**2 * over_sequences)
        centre = np.array(fisher(measured, everything, within))
        limits.append(np.tanh(np.stack([centre - half, centre + half], axis=-1)))
    return np.stack(limits)


def our_limits(cells: pd.DataFrame, tables: dict[str, pd.DataFrame], n_resamples: int) -> np.ndarray:
    """95% limits of the product's leaderboard in the same layout."""
    table = leaderboard(cells, SequenceTables(cells, tables), n_resamples=n_resamples).table
    keyed = table[table["statistic"] == "spearman"].set_index(["relation", "proxy"])[["lo", "hi"]]
    order = [(relation, p.name) for relation in ("pooled", "within k") for p in PROXIES]
    return keyed.loc[order].to_numpy().reshape(2, len(PROXIES), 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=400, help="of the leaderboard")
    parser.add_argument("--quick", action="store_true", help="one round of few resamples, to see that it runs")
    parser.add_argument("--out")
    options = parser.parse_args()
    repeats, resamples = (1, 20) if options.quick else (options.repeats, options.resamples)
    rng = np.random.default_rng(0)
    original, recon = losses(rng)
    cells, tables = grid(rng)

    def scipy_interval() -> np.ndarray:
        def statistic(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
            return 2 - y.mean(axis=axis) / x.mean(axis=axis)

        result = stats.bootstrap(
            (original, recon), statistic, paired=True, method="percentile", n_resamples=RESAMPLES, rng=0
        )
        return np.asarray(result.confidence_interval)

    cases: dict[str, tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]] = {
        f"CE_rec interval, {SEQUENCES} sequences, {RESAMPLES:,} resamples": (
            scipy_interval,
            lambda: np.asarray(ce_rec_ci(original, recon, n_resamples=RESAMPLES)),
        ),
        f"leaderboard, {len(cells)} cells, {resamples} resamples": (
            lambda: scipy_leaderboard(cells, tables, resamples),
            lambda: our_limits(cells, tables, resamples),
        ),
    }
    results, agreement = {}, []
    for case, (peer, ours) in cases.items():
        expected, found = peer(), ours()
        agreement.append(f"- {case}: largest difference between limits {np.abs(expected - found).max():.3g}")
        results[case] = paired({PEER: timed(peer), "ours": timed(ours)}, baseline=PEER, repeats=repeats)
    text = f"# bootstrap\n\n{machine()}\n\n{markdown_table(results, baseline=PEER)}\n\n" + "\n".join(agreement)
    write_report(text, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
