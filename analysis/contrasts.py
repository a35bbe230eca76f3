"""Means over seeds and differences between models, with two-level bootstrap intervals.

Shape suffixes: R resamples, C cells, G configurations (model, layer, k, tokens).

Each resample draws the evaluated sequences once for all cells that share them, and within every
configuration its seeds, both with replacement. A configuration of one seed has sequence variation only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.bootstrap import Floats, percentile_interval
from analysis.cells import SequenceTables, configurations, models_of

METRICS = ("ce_rec", "r2")


@dataclass(frozen=True)
class ConfigurationMeans:
    """One row a configuration: its metrics' means over seeds, `<metric>_lo` and `<metric>_hi`."""

    table: pd.DataFrame
    resamples: dict[str, Floats]  # metric → (R, G), columns in the table's row order


def configuration_means(
    cells: pd.DataFrame, tables: SequenceTables, *, n_resamples: int = 5_000, seed: int = 0
) -> ConfigurationMeans:
    """Mean over seeds of CE_rec and R² (with 95% intervals) and of every other numeric column."""
    table, rows = configurations(cells)
    rng = np.random.default_rng([seed, 1])
    parts: dict[str, list[Floats]] = {metric: [] for metric in METRICS}
    for block in tables.blocks(METRICS, n_resamples=n_resamples, seed=seed):
        size = len(block[METRICS[0]])
        draws = [r[rng.integers(len(r), size=(size, len(r)))] for r in rows]
        for metric in METRICS:
            means = [np.take_along_axis(block[metric], draw, axis=1).mean(axis=1) for draw in draws]
            parts[metric].append(np.stack(means, axis=1))
    resamples = {metric: np.concatenate(part) for metric, part in parts.items()}
    numeric = [c for c in cells.select_dtypes("number").columns if c not in (*table.columns, "seed")]
    for column in numeric:
        table[column] = [float(cells[column].to_numpy(float)[r].mean()) for r in rows]
    for metric in METRICS:
        intervals = [percentile_interval(column) for column in resamples[metric].T]
        table[f"{metric}_lo"] = [i.lo for i in intervals]
        table[f"{metric}_hi"] = [i.hi for i in intervals]
    return ConfigurationMeans(table, resamples)


def model_deltas(means: ConfigurationMeans) -> pd.DataFrame:
    """The grid's widest minus its narrowest model at each depth, k and budget that has both, with intervals.

    Columns: depth, k, tokens, small, large, n_seeds (the fewer of the two), delta_ce_rec, delta_r2, each
    with _lo and _hi. The models' shared sequences are resampled together, so their variation cancels.
    """
    models = models_of(means.table)
    records = []
    for (depth, k, tokens), group in means.table.groupby(["depth", "k", "tokens"], sort=True):
        rows = dict(zip(group["model"], group.index, strict=True))
        if len(models) < 2 or models[0] not in rows or models[-1] not in rows:
            continue
        small, large = int(rows[models[0]]), int(rows[models[-1]])
        record = {
            "depth": depth,
            "k": k,
            "tokens": tokens,
            "small": models[0],
            "large": models[-1],
            "n_seeds": min(int(group["n_seeds"][small]), int(group["n_seeds"][large])),
        }
        for metric in METRICS:
            interval = percentile_interval(means.resamples[metric][:, large] - means.resamples[metric][:, small])
            record[f"delta_{metric}"] = group[metric][large] - group[metric][small]
            record[f"delta_{metric}_lo"], record[f"delta_{metric}_hi"] = interval
        records.append(record)
    columns = ["depth", "k", "tokens", "small", "large", "n_seeds"]
    columns += [f"delta_{metric}{end}" for metric in METRICS for end in ("", "_lo", "_hi")]
    return pd.DataFrame(records, columns=columns)
