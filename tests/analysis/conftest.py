"""A synthetic proxy-gap grid with known structure, for the leaderboard and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from analysis.sae.budget import rate_bits, rate_bits_entropy
from analysis.sae.cells import ce_rec_interval
from analysis.sae.columns import (
    AUDIT_COLUMNS,
    CELL_COLUMNS,
    FIRING_COLUMNS,
    LAYER_COLUMNS,
    RUNG_SUMS,
    SEQUENCE_COLUMNS,
    SEQUENCE_SUMS,
)
from analysis.sae.fidelity import metrics_from_table
from analysis.sae.rungs import rung_numbers

LAYERS = {
    "pythia-70m": (512, 6, (1, 3, 5)),
    "pythia-160m": (768, 12, (2, 6, 10)),
    "pythia-410m": (1024, 24, (4, 12, 20)),
}
DEPTHS = ("early", "mid", "late")
TOKENS_A_SEQUENCE = 256


@dataclass(frozen=True)
class Grid:
    cells: pd.DataFrame
    sequences: dict[str, pd.DataFrame]
    geometry: pd.DataFrame


def _sequence_table(
    ce: float, r2: float, d: int, n: int, difficulty: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Sequences whose ratio-of-sums metrics lie near ce and r2; SWD falls as CE_rec rises, whatever r2 does."""
    t = TOKENS_A_SEQUENCE
    sst = t * 0.5 * d * np.exp(0.3 * rng.normal(size=n))
    sse = (1 - r2) * sst * np.exp(0.1 * rng.normal(size=n))
    original = 3.2 * difficulty
    table = pd.DataFrame(
        {
            "sequence": np.arange(n),
            "n_tokens": t,
            "loss_orig": original,
            "loss_recon": original * (2 - ce) * np.exp(0.04 * rng.normal(size=n)),
            "loss_zero": original + 6.0,
            "sse": sse,
            "sst": sst,
            "sum_sq": 1.4 * sst,
            "cos_sum": t * np.sqrt(r2) * np.exp(0.005 * rng.normal(size=n)),
            "rel_sum": t * np.sqrt(1 - r2),
            "swd_sum": t * 0.02 * (1.02 - ce) ** 2 * difficulty * np.exp(0.2 * rng.normal(size=n)),
            "abs_sum": t * 0.1 * (1.05 - ce) ** 0.8 * difficulty * np.exp(0.3 * rng.normal(size=n)),
        }
    )
    table["legacy_sum"] = t * (r2 - 0.03)
    rise = table["loss_recon"] - original
    for name, share in zip(RUNG_SUMS, (0.6, 2.2, 2.6, 2.0, 1.0, 0.1), strict=True):
        table[name] = share * rise * np.exp(0.1 * rng.normal(size=n))
    table["sse_no_sinks"], table["sst_no_sinks"] = table["sse"], table["sst"] / 1.1
    return table[[*SEQUENCE_COLUMNS, *SEQUENCE_SUMS, *RUNG_SUMS]]


def build_grid(
    models: Sequence[str] = ("pythia-70m", "pythia-410m"),
    depths: Sequence[str] = DEPTHS,
    ks: Sequence[int] = (8, 16, 32, 64, 128, 256),
    tokens: Sequence[int] = (10_000_000,),
    seeds: int = 1,
    n_sequences: int = 60,
    seed: int = 0,
) -> Grid:
    """At fixed k the wide model has the higher R² and the lower CE_rec, as in the source study."""
    rng = np.random.default_rng(seed)
    difficulty = np.exp(0.25 * rng.normal(size=n_sequences))
    records, sequences = [], {}
    for model in models:
        d, _, layers = LAYERS[model]
        width = np.log2(d / 512)
        for depth in depths:
            position = DEPTHS.index(depth)
            for k in ks:
                for budget in tokens:
                    for s in range(seeds):
                        trained = np.log10(budget / 1e7)
                        loss = (0.62 + 0.1 * width * (1 - trained) - 0.12 * position) * (8 / k) ** 0.65 * 0.55**trained
                        ce = float(np.clip(1 - loss - 0.03 * rng.normal() * loss, 0.02, 0.995))
                        r2 = 1 - (0.2 - 0.07 * width - 0.02 * position) * (8 / k) ** 0.3 * 0.8**trained
                        key = f"{model}-{depth}-{k}-{budget}-{s}"
                        table = _sequence_table(ce, r2, d, n_sequences, difficulty, rng)
                        sequences[key] = table
                        limits = ce_rec_interval(table)
                        mean_sq = float(table["sum_sq"].sum() - table["sst"].sum()) / float(table["n_tokens"].sum())
                        metrics = metrics_from_table(table, d_model=d, mean_sq=mean_sq)
                        records.append(
                            metrics
                            | {"model": model, "layer": layers[position], "depth": depth, "k": k, "seed": s}
                            | {
                                "tokens": budget,
                                "ce_rec_lo": limits.lo,
                                "ce_rec_hi": limits.hi,
                                "d_model": d,
                                "d_sae": 32 * d,
                            }
                            | {
                                "alive": float(np.clip((0.14 - 0.03 * width) * (k / 8) ** 0.55 * 1.4**trained, 0, 1)),
                                "cell_key": key,
                            }
                            | {"rate_bits": rate_bits(32 * d, k), "rate_bits_entropy": rate_bits_entropy(11.5, k)}
                            | {"pr": 40.0 / (1 + position), "pr_deflated": 90.0}
                            | dict.fromkeys((*AUDIT_COLUMNS, *FIRING_COLUMNS), 0.9 * r2)
                            | {"r2_no_sinks": float(1 - table["sse_no_sinks"].sum() / table["sst_no_sinks"].sum())}
                            | rung_numbers(table)
                            | {"fisher_deviation": 1.3, "attention_cost": 0.02}
                        )
    geometry = [
        {
            "model": model,
            "layer": layer,
            "d_model": LAYERS[model][0],
            "pr": 1.2 + 80 * np.exp(-layer / 2) + 6 * layer / LAYERS[model][1],
            "pr_deflated": 60 + 40 * np.sin(layer / 3),
            **dict.fromkeys(LAYER_COLUMNS, 0.25),
            "sst_share_top1pct": 0.9 if layer in (12, 13, 15) else 0.25,
        }
        for model in models
        for layer in range(LAYERS[model][1])
    ]
    return Grid(pd.DataFrame(records)[list(CELL_COLUMNS)], sequences, pd.DataFrame(geometry))


@pytest.fixture(scope="session")
def make_grid() -> Callable[..., Grid]:
    return build_grid
