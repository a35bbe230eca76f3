"""Statements of the proxy-gap report's adjudication and how their error rates are simulated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.bootstrap import Floats
from analysis.multiplicity import ALPHA, holm
from analysis.sae.cells import SequenceTables
from analysis.sae.contrasts import ConfigurationMeans, configuration_means
from analysis.sae.hypotheses import (
    BLOCKED,
    REJECTED,
    SUPPORTED,
    Reference,
    Thresholds,
    choose_reference,
    judge_h0,
    judge_h2,
    magnitude_ratio,
    permutation_rank_test,
)
from analysis.sae.leaderboard import Leaderboard, leaderboard
from analysis.sae.task_dimension import TOLERANCE, task_dimension
from benchmarks._calibration import Statement, Tally, grid
from benchmarks._calibration_proxies import Design, measured_cells
from benchmarks._calibration_sae import losses, sequence_table
from models.information.settings import CriticSettings

_SEQUENCE_SD, _SEQUENCES, _TOKENS = 0.03, 48, 1_000_000
_LEVELS = (0.5, 0.8)  # CE_rec and R² of the narrow model
_NO_BOARD = Leaderboard(pd.DataFrame(), pd.DataFrame(), ())


def _means(
    rng: np.random.Generator, gaps_2G: Floats, budgets: Sequence[int], seeds: int, seed_sd: float
) -> ConfigurationMeans:
    """Two models of one family at one k: gaps of CE_rec and R² by budget, trajectories of `seeds` seeds each.

    A seed deviates by `seed_sd` alike at all budgets, and by half of that at each; sequences do so in both models, in
    one, and in one SAE.
    """
    orig_U, sst_U = losses(rng, _SEQUENCES), rng.gamma(11.0, 1.0, size=_SEQUENCES)
    shared_2U = rng.normal(0, _SEQUENCE_SD, (2, _SEQUENCES))
    rows, tables = [], []
    for m, model in enumerate(("tiny-1m", "tiny-2m")):
        own_2U = shared_2U + rng.normal(0, _SEQUENCE_SD / 2, (2, _SEQUENCES))
        for seed in range(seeds):
            lasting_2 = rng.normal(0, seed_sd, (2, 1))
            for i, budget in enumerate(budgets):
                value_2U = own_2U + lasting_2 + rng.normal(0, seed_sd / 2, (2, 1)) + m * gaps_2G[:, i : i + 1]
                value_2U += rng.normal(0, _SEQUENCE_SD / 4, (2, _SEQUENCES))
                recon_U = orig_U * (2 - _LEVELS[0] - value_2U[0])
                tables.append(sequence_table(orig_U, recon_U, sst_U * (1 - _LEVELS[1] - value_2U[1]), sst_U))
                rows.append((model, 8 * (m + 1), budget, seed))
    frame = pd.DataFrame(rows, columns=["model", "d_model", "tokens", "seed"])
    frame = frame.assign(layer=3, depth="mid", k=8, alive=0.5)
    frame["cell_key"] = [str(i) for i in range(len(frame))]
    sums = [t[["loss_recon", "loss_orig", "sse", "sst"]].sum() for t in tables]
    frame["ce_rec"] = [2 - s["loss_recon"] / s["loss_orig"] for s in sums]
    frame["r2"] = [1 - s["sse"] / s["sst"] for s in sums]
    return configuration_means(frame, SequenceTables(frame, dict(zip(frame["cell_key"], tables, strict=True))))


def _reference(
    rng: np.random.Generator, gaps_2G: Floats, budgets: Sequence[int], seeds: int, seed_sd: float
) -> Reference:
    found = choose_reference(_means(rng, gaps_2G, budgets, seeds, seed_sd))
    assert found is not None
    return found


def _budgets(count: int, spacing: int) -> list[int]:
    return [_TOKENS * spacing**i for i in range(count)]


def h0_rejected(
    rng: np.random.Generator,
    trials: int,
    *,
    limit: float,
    seeds: int,
    alpha: float,
    seed_sd: float,
    fall: float = -0.1,
    spacing: int = 4,
) -> Tally:
    """Trials in which H0 is rejected although (limit 0) or because (another) the gap has that limit."""
    budgets = _budgets(4, spacing)
    gap_G = limit + fall * (np.array(budgets) / budgets[0]) ** -alpha
    hits = told = 0
    for _ in range(trials):
        verdict = judge_h0(_reference(rng, np.stack([gap_G, gap_G]), budgets, seeds, seed_sd), Thresholds())
        told += verdict.decided or seeds >= Thresholds().min_seeds
        hits += verdict.word == REJECTED
    return Tally(hits, told)


def h0_supported(rng: np.random.Generator, trials: int, *, limit: float, seeds: int, seed_sd: float) -> Tally:
    """Trials in which H0 is supported although the limit lies outside the margin, at its edge."""
    budgets = _budgets(4, 4)
    gap_G = limit - 0.1 * (np.array(budgets) / budgets[0]) ** -0.5
    hits = 0
    for _ in range(trials):
        reference = _reference(rng, np.stack([gap_G, gap_G]), budgets, seeds, seed_sd)
        hits += judge_h0(reference, Thresholds()).word == SUPPORTED
    return Tally(hits, trials)


def h2_read_although_h0_is_open(rng: np.random.Generator, trials: int, *, seeds: int) -> Tally:
    """Budgets in a random order of gaps: H0 is not decided, or by chance; H2 must not be read where it is not."""
    budgets, hits = _budgets(4, 4), 0
    for _ in range(trials):
        gap_G = rng.permutation(-0.1 * (np.array(budgets) / budgets[0]) ** -0.5)
        h0 = judge_h0(_reference(rng, np.stack([gap_G, gap_G]), budgets, seeds, 0.01), Thresholds())
        h2 = judge_h2(_NO_BOARD, h0, Thresholds()) if not h0.decided else None
        hits += h2 is not None and h2.word != BLOCKED
    return Tally(hits, trials)


def ratio_coverage(rng: np.random.Generator, trials: int, *, ratio: float, gap: float, seeds: int) -> Tally:
    hits = there = 0
    for _ in range(trials):
        found = _reference(rng, np.array([[gap], [ratio * gap]]), [_TOKENS], seeds, 0.01)
        (small_ce, large_ce), (small_r2, large_r2) = found.ce_rec, found.r2
        interval = magnitude_ratio((large_r2[0], small_r2[0]), (large_ce[0], small_ce[0]))
        there += interval.lo == interval.lo
        hits += interval.lo <= ratio <= interval.hi
    return Tally(hits, there)


def h2_false(rng: np.random.Generator, trials: int, *, relation: str, places: int, strong: float) -> Tally:
    """R² and the cosine correlate with CE_rec alike: any difference that is told is told without ground."""
    return _differences(rng, trials, relation, Design(places, 6, 0.0, strong, strong))


def h2_found(rng: np.random.Generator, trials: int, *, relation: str, places: int, weak: float) -> Tally:
    return _differences(rng, trials, relation, Design(places, 6, 0.0, 0.95, weak))


def _differences(rng: np.random.Generator, trials: int, relation: str, design: Design) -> Tally:
    hits = there = 0
    for values_3C in np.moveaxis(design.draw(rng, trials), 1, 0):
        cells, tables = measured_cells(rng, design, values_3C, 0)
        table = leaderboard(cells, tables).table
        rows = table[(table["relation"] == relation) & (table["proxy"] == "cosine")]
        p = float(rows[rows["statistic"] == "spearman"]["minus_r2_p"].iloc[0])
        there += p == p
        hits += min(holm({"cosine": p}).values()) < ALPHA
    return Tally(hits, there)


def h3_size(rng: np.random.Generator, trials: int, *, models: int, layers: int, alike: float, between: float) -> Tally:
    """Departure and failure that have nothing to do with each other, each smooth over layers and unlike by model."""
    names = np.repeat(np.arange(models), layers)
    hits = 0
    for i in range(trials):
        departure_P, failure_P = (_smooth(rng, models, layers, alike, between) for _ in range(2))
        hits += permutation_rank_test(departure_P, failure_P, names.tolist(), seed=i)[1] < ALPHA
    return Tally(hits, trials)


def _smooth(rng: np.random.Generator, models: int, layers: int, alike: float, between: float) -> Floats:
    """A lognormal value per (model, layer): a level of each model, and an autoregression over its layers."""
    own_ML = rng.normal(size=(models, layers))
    for i in range(1, layers):
        own_ML[:, i] = alike * own_ML[:, i - 1] + np.sqrt(1 - alike**2) * own_ML[:, i]
    return np.exp((between * rng.normal(size=(models, 1)) + own_ML).ravel())


def k_mi_coverage(rng: np.random.Generator, trials: int, *, rank: int, noise: float, below: float = 0.0) -> Tally:
    """Information in equal parts over `rank` dimensions; at the k_z before the plateau `below` of it, where given.

    Every estimate deviates by `noise` nats: of that variance a fourth is shared by the four folds, as they share three
    quarters of their training data; a level of each fold is shared by all k_z.
    """
    grid_K, folds = np.array(CriticSettings().dimensions), CriticSettings().folds
    truth_K = 1.5 * np.minimum(grid_K / rank, 1.0)
    if below:
        truth_K[np.flatnonzero(truth_K < truth_K.max())[-1]] = below * truth_K.max()
    truth = grid_K[np.flatnonzero(truth_K >= (1 - TOLERANCE) * truth_K.max())[0]]
    hits = there = 0
    for _ in range(trials):
        own_FK = rng.normal(0, noise * np.sqrt(1 - 1 / folds), (folds, len(grid_K)))
        shared_K = rng.normal(0, noise / np.sqrt(folds), len(grid_K))
        found = task_dimension(grid_K.tolist(), truth_K + shared_K + own_FK + rng.normal(0, 0.1, (folds, 1)))
        there += not found.needs
        hits += not found.needs and found.lo <= truth <= found.hi
    return Tally(hits, there)


_PRINTED = "proxy_gap report: Adjudication"
_UNION = (
    "The interval of Δ∞ is a union over every α that the data allow, so it rejects less often than 5%: four budgets "
    "hardly tell α, and an interval at the best α alone rejects far too often."
)

STATEMENTS: Sequence[Statement] = (
    Statement(
        name="H0 rejected although the gap closes",
        printed=_PRINTED,
        kind="size",
        simulate=h0_rejected,
        settings=[
            *grid(limit=(0.0,), seeds=(3, 5), alpha=(0.25, 0.5, 1.0), seed_sd=(0.002, 0.01)),
            *grid(limit=(0.0,), seeds=(3,), alpha=(0.5,), seed_sd=(0.01,), fall=(0.0, -0.3)),
            {"limit": 0.0, "seeds": 3, "alpha": 0.5, "seed_sd": 0.002, "spacing": 2},
        ],
        quick=({"limit": 0.0, "seeds": 3, "alpha": 1.0, "seed_sd": 0.01},),
        trials=100,
        quick_trials=25,
        note=_UNION,
    ),
    Statement(
        name="H0 rejected because the gap stays",
        printed=_PRINTED,
        kind="power",
        simulate=h0_rejected,
        settings=grid(limit=(0.05, 0.1), seeds=(3, 5), alpha=(0.5,), seed_sd=(0.002, 0.01)),
        quick=(),
        trials=60,
        note="The gap at the smallest budget is 0.1 smaller than its limit. seed_sd: of CE_rec between seeds.",
    ),
    Statement(
        name="H0 supported although the gap stays beyond the margin",
        printed=_PRINTED,
        kind="size",
        simulate=h0_supported,
        settings=grid(limit=(0.05, -0.05), seeds=(3, 5), seed_sd=(0.002, 0.01)),
        quick=({"limit": 0.05, "seeds": 3, "seed_sd": 0.002},),
        trials=60,
        quick_trials=20,
    ),
    Statement(
        name="H2 read although H0 is open",
        printed=_PRINTED,
        kind="size",
        simulate=h2_read_although_h0_is_open,
        settings=grid(seeds=(2, 3)),
        quick=({"seeds": 2},),
        trials=60,
        quick_trials=15,
        note="Budgets' gaps in random order; with two seeds nothing is decided.",
    ),
    Statement(
        name="95% interval of |ΔR²| / |ΔCE_rec|",
        printed=_PRINTED,
        kind="coverage",
        simulate=ratio_coverage,
        settings=grid(ratio=(0.5, 1.5, 8.0), gap=(0.005, 0.03, 0.1), seeds=(3,)),
        quick=({"ratio": 1.5, "gap": 0.03, "seeds": 3},),
        trials=100,
        quick_trials=50,
        note="Fieller's set; unbounded above where ΔCE_rec may be 0.",
    ),
    Statement(
        name="a proxy told from R² although it ranks alike",
        printed=f"{_PRINTED}, H2",
        kind="size",
        simulate=h2_false,
        settings=grid(relation=("pooled", "within k"), places=(3, 6), strong=(0.5, 0.8)),
        quick=({"relation": "pooled", "places": 3, "strong": 0.5},),
        trials=200,
        quick_trials=60,
        note="One proxy; with several, Holm's correction over all of them and both relations holds the family at 5%.",
    ),
    Statement(
        name="a proxy told from R² that ranks worse",
        printed=f"{_PRINTED}, H2",
        kind="power",
        simulate=h2_found,
        settings=grid(relation=("pooled", "within k"), places=(3, 6), weak=(0.5, 0.8)),
        quick=(),
        trials=100,
        note="R² correlates at .95 with CE_rec among deviations, the other proxy at `weak`.",
    ),
    Statement(
        name="H3's permutation p",
        printed=f"{_PRINTED}, H3",
        kind="size",
        simulate=h3_size,
        settings=[
            *grid(models=(6, 12), layers=(1,), alike=(0.0,), between=(1.0,)),
            *grid(models=(2, 4), layers=(3, 6), alike=(0.0, 0.7), between=(1.0,)),
            *grid(models=(1, 3), layers=(12,), alike=(0.7,), between=(1.0,)),
        ],
        quick=({"models": 4, "layers": 3, "alike": 0.7, "between": 1.0},),
        trials=600,
        quick_trials=200,
        note="alike: correlation of neighbouring layers. Shuffling places freely rejects in up to .31 of such trials.",
    ),
    Statement(
        name="95% interval of k_MI*",
        printed="proxy_gap report: Task-relevant dimension by mutual information",
        kind="coverage",
        simulate=k_mi_coverage,
        settings=[
            *grid(rank=(1, 3, 8, 16), noise=(0.005, 0.02, 0.05)),
            *grid(rank=(3, 8), noise=(0.005, 0.02), below=(0.94, 0.952)),
        ],
        quick=({"rank": 3, "noise": 0.02, "below": 0.94},),
        trials=2_000,
        quick_trials=500,
        note="For other seeds and splits of the same sequences. Both limits are one-sided statements about single k_z, "
        "so it covers more than 95% wherever no k_z lies near the tolerance.",
    ),
)
