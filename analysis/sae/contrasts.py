"""Means over seeds and differences between models, with intervals over seeds crossed with evaluated sequences.

Shape suffixes: S seeds, U units (the documents of the evaluated sequences, or the sequences where their documents are
not known), G configurations (model, layer, k, tokens), N statements.

CE_rec and R² are ratios of sums over units; each enters by its influence on the ratio (`crossed.ratio_influence`). The
variance of a mean over seeds then has two components, seeds and sequences, and the interval adds them as
`analysis.crossed` says. A single seed says nothing about other trainings: the interval of its mean speaks of that
trained SAE over sequences, and a difference between models has none.

Seeds of two models are different trainings, and SAEs of a wide and of a narrow model vary differently from seed to
seed, as do those of different k and budgets: their variances are not pooled. A difference takes each configuration's
own variance, with Welch's degrees of freedom (1947, "The generalization of 'Student's' problem when several different
population variances are involved") where both have equally many seeds. With unequal numbers Welch's approximation is
too narrow when the rarer seeds vary more (coverage down to .90 at 2 against 4 seeds): each model's seeds are then a
component of their own. Budgets of one trajectory are separate configurations, so that no trajectory counts twice.
Models evaluated on the same sequences are paired by sequence. Models of different tokenizers have other sequences of
the same documents: they are paired by document, the document being the unit (`_by_document`). Where the tables do not
tell the documents, models with other sequences have a component of sequences each. Sequences
are skewed (a few long damages): their component is widened by `crossed.skew_factor`, and with too few of them
(`cells.MIN_UNITS`) no interval is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.bootstrap import Floats
from analysis.crossed import NEEDS_SEEDS, Component, Effect, effects, residual
from analysis.multiplicity import holm_list
from analysis.sae.cells import SequenceTables, compared_models, configurations, needs_units, sequence_component

METRICS = ("ce_rec", "r2")


@dataclass(frozen=True)
class Measured:
    """A configuration's trained SAEs: influences on a metric of the sequences that all of them were evaluated on.

    sequences: the number of their set of sequences. `needs`: what an interval would need of the sequences.
    documents_U: the document that each unit is, where all tables tell.
    """

    table_SU: Floats
    sequences: int
    needs: str = ""
    documents_U: npt.NDArray[np.int64] | None = None

    @cached_property
    def mean_U(self) -> Floats:
        return np.asarray(self.table_SU.mean(axis=0))

    @cached_property
    def residual_variance(self) -> float:
        """The part of `mean_U`'s variance that is seed × sequence, divided by the number of sequences."""
        return residual([self.table_SU]) / self.table_SU.size

    def seeds_component(self) -> Component:
        seeds = len(self.table_SU)
        return Component(float(self.table_SU.mean(axis=1).var(ddof=1)) / seeds, seeds - 1)


@dataclass(frozen=True)
class ConfigurationMeans:
    """One row per configuration: its metrics' means over seeds, `<metric>_lo`, `<metric>_hi` and `<metric>_needs`."""

    table: pd.DataFrame
    measured: dict[str, list[Measured]]  # metric → one per configuration, in the table's row order


def configuration_means(cells: pd.DataFrame, tables: SequenceTables) -> ConfigurationMeans:
    """Mean over seeds of CE_rec and R² (with 95% intervals) and of every other numeric column.

    Limits are NaN where `<metric>_needs` says what they would need. With one seed they are those of that trained SAE
    over sequences.
    """
    table, rows = configurations(cells)
    numeric = [c for c in cells.select_dtypes("number").columns if c not in (*table.columns, "seed")]
    for column in numeric:
        values = cells[column].to_numpy(float)
        table[column] = [float(values[r].mean()) for r in rows]
    measured: dict[str, list[Measured]] = {}
    for metric in METRICS:
        measured[metric] = _measured(metric, tables, rows)
        found = _effects(table[metric].tolist(), [_mean_components(m) for m in measured[metric]])
        table[f"{metric}_lo"] = [e.lo for e in found]
        table[f"{metric}_hi"] = [e.hi for e in found]
        table[f"{metric}_needs"] = [e.needs for e in found]
    return ConfigurationMeans(table, measured)


def _measured(metric: str, tables: SequenceTables, rows: Sequence[npt.NDArray[np.int64]]) -> list[Measured]:
    influence, sets_C = tables.influence(metric), tables.sequence_set
    found = []
    for r in rows:
        if len(set(sets_C[r].tolist())) > 1:
            means = np.array([[influence[i].mean()] for i in r])
            found.append(Measured(means, -1, "needs the same evaluated sequences for all seeds"))
            continue
        table_SU = np.stack([influence[i] for i in r])
        needs = needs_units(table_SU.shape[1], tables.unit) if tables.given or len(r) < 2 else ""
        found.append(Measured(table_SU, int(sets_C[r[0]]), needs, tables.documents(int(r[0]))))
    return found


def _effects(values: Sequence[float], components: Sequence[list[Component] | str]) -> list[Effect]:
    """Effects from components, or without limits where a text says what they need."""
    some = [(v, c) for v, c in zip(values, components, strict=True) if not isinstance(c, str)]
    found = iter(effects([v for v, _ in some], [c for _, c in some]))
    return [
        Effect(v, math.nan, math.nan, math.nan, c) if isinstance(c, str) else next(found)
        for v, c in zip(values, components, strict=True)
    ]


def _mean_components(of: Measured) -> list[Component] | str:
    """For other trainings and sequences; with one seed for other sequences alone."""
    if of.needs:
        return of.needs
    seeds, units = of.table_SU.shape
    some = [of.seeds_component()] if seeds > 1 else []
    return [*some, *([sequence_component(of.mean_U, of.residual_variance)] if units > 1 else [])]


def _difference_components(a: Measured, b: Measured) -> list[Component] | str:
    """Of the mean of a less that of b, for other trainings of both and other sequences."""
    if min(len(a.table_SU), len(b.table_SU)) < 2:
        return NEEDS_SEEDS
    if a.needs or b.needs:
        return a.needs or b.needs
    parts = [(m.mean_U, m.residual_variance) for m in (a, b)]
    together = a.residual_variance + b.residual_variance
    if a.sequences == b.sequences:
        parts = [(a.mean_U - b.mean_U, together)]
    elif a.documents_U is not None and b.documents_U is not None:
        by_document_D = _by_document(a, b)
        if needs := needs_units(len(by_document_D), "documents"):
            return needs
        parts = [(by_document_D, together)]
    units = [sequence_component(mean_U, twice) for mean_U, twice in parts if len(mean_U) > 1]
    return [*_seed_components(a.seeds_component(), b.seeds_component()), *units]


def _by_document(a: Measured, b: Measured) -> Floats:
    """[D] values whose mean is the mean of a less that of b: each document's part of the difference, times D.

    A document's part is what its sequences add to either mean around that mean. The variance over documents is then
    that of the difference, with all covariance between the sequences of a document, of one model or of both (the
    linearised variance for clusters, Cochran 1977, "Sampling Techniques", sec. 9A).
    """
    assert a.documents_U is not None
    assert b.documents_U is not None
    documents, place_U = np.unique(np.concatenate([a.documents_U, b.documents_U]), return_inverse=True)
    parts_U = np.concatenate([sign * (m.mean_U - m.mean_U.mean()) / len(m.mean_U) for sign, m in ((1.0, a), (-1.0, b))])
    difference = float(a.mean_U.mean() - b.mean_U.mean())
    return np.asarray(difference + len(documents) * np.bincount(place_U, weights=parts_U), np.float64)


def _seed_components(a: Component, b: Component) -> list[Component]:
    total = a.variance + b.variance
    if a.df != b.df or not total:
        return [a, b]
    return [Component(total, total**2 / (a.variance**2 / a.df + b.variance**2 / b.df))]


def combination(weights: npt.ArrayLike, of: Sequence[Measured]) -> Measured:
    """Σ weight · metric of trained SAEs that continue each other (budgets of a trajectory): seeds stay together."""
    table_SU = np.einsum("g,gsu->su", np.asarray(weights, float), np.stack([m.table_SU for m in of]))
    needs = next((m.needs for m in of if m.needs), "")
    return Measured(table_SU, of[0].sequences, needs, of[0].documents_U)


def difference_effects(pairs: Sequence[tuple[Measured, Measured]]) -> list[Effect]:
    """Each first less its second, for other trainings of both and other sequences."""
    values = [float(a.table_SU.mean() - b.table_SU.mean()) for a, b in pairs]
    return _effects(values, [_difference_components(a, b) for a, b in pairs])


def model_deltas(means: ConfigurationMeans) -> pd.DataFrame:
    """Widest minus narrowest of the compared models at each depth, k and budget that has both, with intervals.

    These are of one family where the grid has two of one (`cells.compared_models`): between families Δ is no question
    of scale alone.

    Columns: depth, k, tokens, small, large, n_seeds (the fewer of the two); delta_ce_rec and delta_r2, each with _lo,
    _hi (95%), _p (two-sided, against 0), _p_holm (adjusted for every delta of the table, both metrics together) and
    _needs (what NaN limits would need).
    """
    models = compared_models(means.table)
    records: list[dict[str, object]] = []
    pairs: list[tuple[int, int]] = []
    for (depth, k, tokens), group in means.table.groupby(["depth", "k", "tokens"], sort=True):
        rows = dict(zip(group["model"], group.index, strict=True))
        if len(models) < 2 or models[0] not in rows or models[-1] not in rows:
            continue
        small, large = int(rows[models[0]]), int(rows[models[-1]])
        seeds = min(int(group["n_seeds"][small]), int(group["n_seeds"][large]))
        pairs.append((large, small))
        records.append(
            {"depth": depth, "k": k, "tokens": tokens, "small": models[0], "large": models[-1], "n_seeds": seeds}
        )
    table = pd.DataFrame(records, columns=["depth", "k", "tokens", "small", "large", "n_seeds"])
    p: list[float] = []
    for metric in METRICS:
        mean, measured = means.table[metric].to_numpy(float), means.measured[metric]
        values = [float(mean[a] - mean[b]) for a, b in pairs]
        found = _effects(values, [_difference_components(measured[a], measured[b]) for a, b in pairs])
        columns = {"": values, "_lo": [e.lo for e in found], "_hi": [e.hi for e in found], "_p": [e.p for e in found]}
        for end, column in columns.items():
            table[f"delta_{metric}{end}"] = np.array(column, dtype=float)
        table[f"delta_{metric}_needs"] = [e.needs for e in found]
        p += [e.p for e in found]
    adjusted = np.array(holm_list(p), dtype=float).reshape(len(METRICS), len(table))
    for metric, p_N in zip(METRICS, adjusted, strict=True):
        table[f"delta_{metric}_p_holm"] = p_N
    return table
