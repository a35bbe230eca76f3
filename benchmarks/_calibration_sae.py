"""Statements of the proxy-gap report and how their error rates are simulated.

Many trials share one grid of cells (as different k, each drawn on its own), since the product computes a grid at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd

from analysis.bootstrap import Floats
from analysis.sae.budget import Censored, KStar, k_star, k_star_interval
from analysis.sae.cells import SequenceTables
from analysis.sae.columns import SEQUENCE_COLUMNS
from analysis.sae.contrasts import METRICS, configuration_means, model_deltas
from analysis.sae.tables import direction
from benchmarks._calibration import Setting, Statement, Tally, grid

_CE, _R2, _TOKENS, _AT_ONCE = 0.4, 0.8, 256, 250
_SEQUENCE_SD = 0.05  # of a sequence's own CE_rec (and three times that of its R²), between sequences
_HELD_OUT = 78  # documents of the embedded text
_IDEAL = 2 * 1.96  # width of the interval that knows the variances, in standard errors


def chunks(trials: int, at_once: int = _AT_ONCE) -> Iterator[int]:
    """Numbers of trials that sum to all of them."""
    yield from (min(at_once, trials - start) for start in range(0, trials, at_once))


def losses(rng: np.random.Generator, sequences: int) -> Floats:
    """Nats per token of the unpatched model: gamma, with a coefficient of variation of .2, as measured."""
    return rng.gamma(25.0, 0.1, size=sequences)


def sequence_table(
    orig_U: Floats, recon_U: Floats, sse_U: Floats, sst_U: Floats, cosine_U: float | Floats = 1.0
) -> pd.DataFrame:
    """A cell's evaluated sequences from their losses, sums of squares and mean cosines."""
    one = np.ones(len(orig_U))
    known: dict[str, Floats] = {
        "sequence": np.arange(float(len(orig_U))),
        "n_tokens": _TOKENS * one,
        "sse": sse_U,
        "sst": sst_U,
    }
    known |= {"loss_orig": orig_U, "loss_recon": recon_U, "loss_zero": orig_U + 6}
    known["cos_sum"] = known["n_tokens"] * cosine_U
    return pd.DataFrame(np.stack([known.get(c, one) for c in SEQUENCE_COLUMNS], axis=1), columns=SEQUENCE_COLUMNS)


def _grid(
    rows: Sequence[tuple[str, int, int, int]], tables: Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, SequenceTables]:
    """Cells (model, d_model, k, seed) with CE_rec and R² of their sequences."""
    frame = pd.DataFrame(rows, columns=["model", "d_model", "k", "seed"]).assign(layer=3, depth="mid", tokens=1000)
    frame["cell_key"] = [f"{model}-{k}-{seed}" for model, _, k, seed in rows]
    sums = np.array([[t[c].to_numpy().sum() for c in ("loss_recon", "loss_orig", "sse", "sst")] for t in tables])
    frame["ce_rec"], frame["r2"] = 2 - sums[:, 0] / sums[:, 1], 1 - sums[:, 2] / sums[:, 3]
    return frame, SequenceTables(frame, dict(zip(frame["cell_key"], tables, strict=True)))


def lengths(rng: np.random.Generator) -> Floats:
    """Documents' shares of a text, as uneven as in the embedded text's held-out part (48 sequences are of about 28)."""
    length_D = np.exp(rng.normal(0, 1.4, _HELD_OUT))
    return np.asarray(length_D / length_D.sum())


def _trained(
    rng: np.random.Generator, trials: int, sequences: int, damage: str, alike: float | None
) -> tuple[pd.DataFrame, SequenceTables, dict[str, float], dict[str, float]]:
    """One trained SAE per trial; its true metrics, and the standard errors of the linearised ratios.

    alike: the share of a sequence's deviations that its document has; None: documents are not known.
    """
    rows, tables = [], []
    truth = {"ce_rec": _CE, "r2": _R2}
    document_U = np.arange(sequences)
    repeats = 0.0  # Σ over documents of their squared numbers of sequences, in sequences

    def draw(of: Callable[[int], Floats]) -> Floats:
        """[U] of mean 0 and variance 1, as alike within documents as is asked."""
        if not alike:
            return of(sequences)
        return np.asarray(math.sqrt(1 - alike) * of(sequences) + math.sqrt(alike) * of(_HELD_OUT)[document_U])

    def skewed(n: int) -> Floats:  # skewness 2.4: a few take most of the damage, as at k = 8 on the stand-in
        return np.asarray((rng.gamma(0.7, size=n) - 0.7) / math.sqrt(0.7))

    for k in range(1, trials + 1):
        if alike is not None:
            document_U = rng.choice(_HELD_OUT, sequences, p=lengths(rng))
            repeats += float((np.bincount(document_U) ** 2).sum()) / sequences / trials
        orig_U, sst_U = losses(rng, sequences), rng.gamma(11.0, 1.0, size=sequences)
        if damage == "even":
            extra_U = orig_U * 0.15 * draw(rng.standard_normal)
        else:
            extra_U = 2.5 * 0.15 * draw(skewed)
            sst_U *= np.exp(0.7 * draw(rng.standard_normal))
        rest_U = sst_U * 0.03 * draw(rng.standard_normal)
        table = sequence_table(orig_U, orig_U * (2 - _CE) + extra_U, sst_U * (1 - _R2) + rest_U, sst_U)
        tables.append(table if alike is None else table.assign(document=document_U))
        rows.append(("m", 8, k, 0))
    moment = math.exp(0.49) if damage == "skewed" else 1.0
    one = {"ce_rec": 0.15 * (math.sqrt(1.04) if damage == "even" else 1.0), "r2": 0.03 * math.sqrt(moment * 12 / 11)}
    more = math.sqrt(1 + (alike or 0.0) * (repeats - 1))
    return *_grid(rows, tables), truth, {metric: more * sd / math.sqrt(sequences) for metric, sd in one.items()}


def trained_coverage(
    rng: np.random.Generator, trials: int, *, metric: str, sequences: int, damage: str, alike: float | None = None
) -> Tally:
    """The interval of one trained SAE over sequences: a cell's CE_rec, and the means of one seed."""
    counts = _Counts()
    for some in chunks(trials):
        cells, tables, truth, ideal = _trained(rng, some, sequences, damage, alike)
        found = configuration_means(cells, tables).table
        counts.add(found[f"{metric}_lo"], found[f"{metric}_hi"], truth[metric], _IDEAL * ideal[metric])
    return counts.tally()


class _Counts:
    def __init__(self) -> None:
        self.hits, self.trials, self.width = 0, 0, 0.0

    def add(self, lo: pd.Series, hi: pd.Series, truth: float, ideal: float) -> None:
        there = (lo.notna() & hi.notna()).to_numpy()
        self.hits += int(((lo <= truth) & (truth <= hi))[there].sum())
        self.trials += int(there.sum())
        self.width += float((hi - lo)[there].sum()) / ideal

    def tally(self) -> Tally:
        return Tally(self.hits, self.trials, self.width / self.trials if self.trials else math.nan)


def _models(
    rng: np.random.Generator,
    trials: int,
    seeds: tuple[int, int],
    sequences: int,
    seed_noise: float,
    *,
    ratio: float = 1.0,
    gap: tuple[float, float] = (0.0, 0.0),
) -> tuple[pd.DataFrame, SequenceTables]:
    """A narrow and a wide model on the same sequences, at one k per trial.

    seed_noise: standard deviation between the narrow model's seeds, in standard errors of its mean over sequences;
    ratio: how many times as much the wide model's vary. gap: CE_rec and R² of the wide less the narrow model.
    """
    rows, tables = [], []
    seed_sd = seed_noise * _SEQUENCE_SD / math.sqrt(sequences)
    for k in range(1, trials + 1):
        orig_U, sst_U = losses(rng, sequences), rng.gamma(11.0, 1.0, size=sequences)
        shared_MU = rng.normal(0, _SEQUENCE_SD * math.sqrt(0.5), (2, sequences))
        for m, model in enumerate(("narrow", "wide")):
            own_MU = shared_MU + rng.normal(0, _SEQUENCE_SD * math.sqrt(0.5), (2, sequences))
            for seed in range(seeds[m]):
                value_MU = own_MU + rng.normal(0, _SEQUENCE_SD / 2, (2, sequences))
                value_MU += rng.normal(0, seed_sd * (ratio if m else 1), (2, 1)) + m * np.array(gap)[:, None] * [
                    [1],
                    [3],
                ]
                recon_U = orig_U * (2 - _CE - value_MU[0])
                tables.append(sequence_table(orig_U, recon_U, sst_U * (1 - _R2 - value_MU[1] / 3), sst_U))
                rows.append((model, 8 * (m + 1), k, seed))
    return _grid(rows, tables)


def _standard_error(seeds: tuple[int, ...], sequences: int, seed_noise: float, ratio: float) -> float:
    """Of a mean (one model) or a paired difference (two) of CE_rec, with the variances of `_models`."""
    own = 1.04 * _SEQUENCE_SD**2 / sequences
    parts = [own * 0.25 / s + seed_noise**2 * own * r**2 / s for s, r in zip(seeds, (1, ratio), strict=False)]
    return math.sqrt(own + sum(parts))  # two halves of the sequences' variance are private, or one is whole


def mean_coverage(rng: np.random.Generator, trials: int, *, seeds: int, sequences: int, seed_noise: float) -> Tally:
    counts = _Counts()
    for some in chunks(trials // 4):  # two models, two metrics
        found = configuration_means(*_models(rng, some, (seeds, seeds), sequences, seed_noise)).table
        ideal = _IDEAL * _standard_error((seeds,), sequences, seed_noise, 1.0)
        counts.add(found["ce_rec_lo"], found["ce_rec_hi"], _CE, ideal)
        counts.add(found["r2_lo"], found["r2_hi"], _R2, ideal / 3)
    return counts.tally()


def delta_coverage(
    rng: np.random.Generator, trials: int, *, seeds: tuple[int, int], sequences: int, seed_noise: float, ratio: float
) -> Tally:
    counts = _Counts()
    ideal = _IDEAL * _standard_error(seeds, sequences, seed_noise, ratio)
    for some in chunks(trials // 2):
        cells, tables = _models(rng, some, seeds, sequences, seed_noise, ratio=ratio)
        found = model_deltas(configuration_means(cells, tables))
        for metric, width in zip(METRICS, (ideal, ideal / 3), strict=True):
            counts.add(found[f"delta_{metric}_lo"], found[f"delta_{metric}_hi"], 0.0, width)
    return counts.tally()


def _other_tokenizers(
    rng: np.random.Generator, trials: int, seeds: int, sequences: int, seed_noise: float, own: float
) -> tuple[pd.DataFrame, SequenceTables]:
    """A narrow and a wide model, each on sequences of its own of the same documents, at one k per trial.

    own: how much a document's effect on one model varies, in standard deviations of a sequence; the effect
    that both models share varies as much as a sequence.
    """
    rows, tables = [], []
    seed_sd = seed_noise * _SEQUENCE_SD / math.sqrt(sequences)
    for k in range(1, trials + 1):
        share_D = lengths(rng)
        shared_MD = rng.normal(0, _SEQUENCE_SD, (2, _HELD_OUT))
        for m, model in enumerate(("narrow", "wide")):
            document_U = rng.choice(_HELD_OUT, sequences, p=share_D)
            effect_MD = shared_MD + rng.normal(0, own * _SEQUENCE_SD, (2, _HELD_OUT))
            own_MU = effect_MD[:, document_U] + rng.normal(0, _SEQUENCE_SD, (2, sequences))
            orig_U, sst_U = losses(rng, sequences), rng.gamma(11.0, 1.0, size=sequences)
            for seed in range(seeds):
                value_MU = own_MU + rng.normal(0, _SEQUENCE_SD / 2, (2, sequences)) + rng.normal(0, seed_sd, (2, 1))
                recon_U = orig_U * (2 - _CE - value_MU[0])
                table = sequence_table(orig_U, recon_U, sst_U * (1 - _R2 - value_MU[1] / 3), sst_U)
                tables.append(table.assign(document=document_U))
                rows.append((model, 8 * (m + 1), k, seed))
    return _grid(rows, tables)


def other_tokenizers_coverage(
    rng: np.random.Generator, trials: int, *, seeds: int, sequences: int, seed_noise: float, own: float
) -> Tally:
    counts = _Counts()
    for some in chunks(trials // 2, 50):
        found = model_deltas(configuration_means(*_other_tokenizers(rng, some, seeds, sequences, seed_noise, own)))
        for metric in METRICS:
            counts.add(found[f"delta_{metric}_lo"], found[f"delta_{metric}_hi"], 0.0, math.nan)
    return counts.tally()


def _families(
    rng: np.random.Generator, trials: int, comparisons: int, count: Callable[[pd.DataFrame], bool], **how: object
) -> Tally:
    hits = 0
    for _ in range(trials):
        cells, tables = _models(rng, comparisons, sequences=48, **how)  # type: ignore[arg-type]
        hits += count(model_deltas(configuration_means(cells, tables)))
    return Tally(hits, trials)


def false_directions(
    rng: np.random.Generator, trials: int, *, seeds: int, comparisons: int, seed_noise: float, ratio: float
) -> Tally:
    """ΔR² is far from 0 and ΔCE_rec is 0 everywhere: whatever direction is stated, is stated without ground."""

    def any_stated(deltas: pd.DataFrame) -> bool:
        return any(direction(row) != "undetermined" for _, row in deltas.iterrows())

    how = {"seeds": (seeds, seeds), "seed_noise": seed_noise, "ratio": ratio, "gap": (0.0, 1.0)}
    return _families(rng, trials, comparisons, any_stated, **how)


def found_directions(rng: np.random.Generator, trials: int, *, seeds: int, comparisons: int, gap: float) -> Tally:
    """Both differences are `gap`, in standard errors of the sequences' part: the first comparison's is stated."""

    def stated(deltas: pd.DataFrame) -> bool:
        return direction(deltas.iloc[0]) == "same"

    size = gap * _SEQUENCE_SD / math.sqrt(48)
    return _families(rng, trials, comparisons, stated, seeds=(seeds, seeds), seed_noise=1.0, gap=(size, size / 3))


_KS = (8, 16, 32, 64, 128)


def k_star_coverage(rng: np.random.Generator, trials: int, *, seeds: int, seed_noise: float, target: float) -> Tally:
    """A curve that rises by .1 with each doubling of k; every k has its own trainings, all the same sequences."""
    curve: Floats = _CE + 0.1 * np.arange(len(_KS), dtype=np.float64)
    truth = k_star(_KS, curve, target)
    counts = _Counts()
    for some in chunks(trials, 25):
        means = configuration_means(*_curves(rng, some, seeds, seed_noise, curve)).table
        found = [
            k_star_interval(_KS, part["ce_rec"], part["ce_rec_lo"], part["ce_rec_hi"], target)
            for _, part in means.groupby("model")
        ]
        lo, hi = (pd.Series([_place(k) for k in side]) for side in ([f.lo for f in found], [f.hi for f in found]))
        counts.add(lo, hi, _place(truth), math.nan)
    return counts.tally()


def _curves(
    rng: np.random.Generator, trials: int, seeds: int, seed_noise: float, curve: Floats
) -> tuple[pd.DataFrame, SequenceTables]:
    """A model per trial, with that curve over the grid of k."""
    rows, tables, sequences = [], [], 48
    for trial in range(trials):
        orig_U, sst_U = losses(rng, sequences), np.ones(sequences)
        shared_U = rng.normal(0, _SEQUENCE_SD, sequences)
        for k, level in zip(_KS, curve, strict=True):
            for seed in range(seeds):
                value_U = level + shared_U + rng.normal(0, seed_noise * _SEQUENCE_SD / math.sqrt(sequences))
                tables.append(sequence_table(orig_U, orig_U * (2 - value_U), sst_U / 5, sst_U))
                rows.append((f"m{trial}", 8, k, seed))
    return _grid(rows, tables)


def _place(value: KStar) -> float:
    if isinstance(value, Censored):
        return math.inf if value.side == ">" else -math.inf
    return value


_FEW_SEEDS = (
    "Two seeds leave one degree of freedom (t = 12.7): such an interval is about five times the ideal one; no method "
    "can do better without borrowing the seeds of other configurations, which vary differently."
)
_OWN = (
    "The two models' seed variances are not pooled (R² of a wide model varies less than that of a narrow one); Welch's "
    "degrees of freedom are cautious at two seeds. Where seeds and sequences matter alike, adding the components' own "
    "t quantiles costs up to a third of width."
)
_TRAINED: Sequence[Setting] = [
    *grid(metric=METRICS, sequences=(10, 16, 48, 200, 512), damage=("even", "skewed")),
    *grid(metric=METRICS, sequences=(16, 48, 96), damage=("skewed",), alike=(0.2, 0.5)),
]
_DELTAS: Sequence[Setting] = [
    *grid(seeds=((2, 2), (3, 3), (5, 5)), sequences=(48,), seed_noise=(0.1, 1.0, 5.0), ratio=(1.0, 3.0)),
    *grid(seeds=((2, 4),), sequences=(48,), seed_noise=(5.0,), ratio=(1 / 3, 3.0)),
    *grid(seeds=((3, 3),), sequences=(10, 200), seed_noise=(1.0,), ratio=(1.0,)),
]
_PRINTED = "proxy_gap report"

STATEMENTS: Sequence[Statement] = (
    Statement(
        name="95% interval of one trained SAE over sequences",
        printed=f"{_PRINTED}: CE_rec per cell, means of one seed",
        kind="coverage",
        simulate=trained_coverage,
        settings=_TRAINED,
        quick=(
            {"metric": "ce_rec", "sequences": 16, "damage": "skewed"},
            {"metric": "ce_rec", "sequences": 48, "damage": "skewed", "alike": 0.5},
        ),
        trials=1_000,
        quick_trials=500,
        note=(
            "Widened for the units' skewness, so that few of them give wide limits. alike: the share of a sequence's "
            "deviations that all sequences of its document have; documents are then known, and are the units."
        ),
    ),
    Statement(
        name="95% interval of a mean over seeds",
        printed=f"{_PRINTED}: headline, budget tables, figures",
        kind="coverage",
        simulate=mean_coverage,
        settings=[
            *grid(seeds=(2, 3, 5), sequences=(48,), seed_noise=(0.1, 1.0, 5.0)),
            *grid(seeds=(3,), sequences=(10,), seed_noise=(0.1,)),
        ],
        quick=({"seeds": 2, "sequences": 48, "seed_noise": 5.0},),
        trials=1_000,
        quick_trials=600,
        note=_FEW_SEEDS,
    ),
    Statement(
        name="95% interval of a difference between two models",
        printed=f"{_PRINTED}: ΔR² and ΔCE_rec",
        kind="coverage",
        simulate=delta_coverage,
        settings=_DELTAS,
        quick=(
            {"seeds": (2, 2), "sequences": 48, "seed_noise": 5.0, "ratio": 1.0},
            {"seeds": (3, 3), "sequences": 48, "seed_noise": 5.0, "ratio": 3.0},
        ),
        trials=500,
        quick_trials=400,
        note=_OWN,
    ),
    Statement(
        name="95% interval of a difference between two models of different tokenizers",
        printed=f"{_PRINTED}: ΔR² and ΔCE_rec",
        kind="coverage",
        simulate=other_tokenizers_coverage,
        settings=[
            *grid(seeds=(3,), sequences=(12, 24), seed_noise=(0.1,), own=(1.0,)),
            *grid(seeds=(2, 3), sequences=(32, 48), seed_noise=(0.1,), own=(0.0, 1.0)),
            *grid(seeds=(3,), sequences=(48, 200), seed_noise=(1.0,), own=(1.0,)),
        ],
        quick=({"seeds": 3, "sequences": 48, "seed_noise": 0.1, "own": 1.0},),
        trials=400,
        quick_trials=300,
        note="Paired by document: the sequences of a document count as one unit.",
    ),
    Statement(
        name="“opposite” or “same” directions of two models",
        printed=f"{_PRINTED}: directions, At a glance",
        kind="family-wise error",
        simulate=false_directions,
        settings=[
            *grid(seeds=(2, 3, 5), comparisons=(6,), seed_noise=(5.0,), ratio=(1.0, 3.0)),
            *grid(seeds=(3,), comparisons=(18,), seed_noise=(0.1,), ratio=(1.0,)),
        ],
        quick=({"seeds": 3, "comparisons": 6, "seed_noise": 5.0, "ratio": 1.0},),
        trials=300,
        quick_trials=60,
        note="ΔR² is real and ΔCE_rec is 0 in all comparisons of the report.",
    ),
    Statement(
        name="“opposite” or “same” directions that are true",
        printed=f"{_PRINTED}: directions, At a glance",
        kind="power",
        simulate=found_directions,
        settings=grid(seeds=(2, 3, 5), comparisons=(6,), gap=(5.0, 10.0)),
        quick=(),
        trials=120,
        note="gap: both differences in standard errors of a mean over sequences; seeds vary as much as that.",
    ),
    Statement(
        name="95% interval of k*",
        printed=f"{_PRINTED}: k*",
        kind="coverage",
        simulate=k_star_coverage,
        settings=[
            *grid(seeds=(1,), seed_noise=(0.0,), target=(0.45, 0.6, 0.75)),
            *grid(seeds=(2, 3), seed_noise=(0.1, 5.0), target=(0.45, 0.6, 0.75)),
        ],
        quick=({"seeds": 3, "seed_noise": 5.0, "target": 0.6},),
        trials=200,
        quick_trials=100,
        note="With one seed it speaks of the trained SAEs at hand.",
    ),
)
