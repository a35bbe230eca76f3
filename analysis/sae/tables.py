"""The source study's tables in the proxy-gap report, its published numbers next to ours.

Every function takes the `Study` and returns a `Section`. A section whose cells are missing says which
cells it needs instead of a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.markdown import table as pipe_table
from analysis.multiplicity import ALPHA
from analysis.sae import published
from analysis.sae.budget import format_k_star, k_star, k_star_interval
from analysis.sae.cells import depths_of, tokens_label
from analysis.sae.measured import Study, interval, limited, measured, number, study_name
from analysis.sae.rungs import cost_of


def _source(study: Study, sweep: str) -> list[str]:
    return [f"Published: the study's sweep {sweep}."] if study.published else []


def headline(study: Study) -> Section:
    """R² and CE_rec of every model at the reference depth, smallest k and smallest budget."""
    rows = []
    for row in each(study.headline_means()):
        key = (study_name(row["model"]), row["depth"], row["k"], row["tokens"])
        known = published.HEADLINE.get(key) if study.published else None
        r2, ce, limits = known or (math.nan, math.nan, (math.nan, math.nan))
        rows.append(
            identity(row)
            | {
                "R² [95% CI]": measured(row, "r2"),
                "R² published": number(r2),
                "CE_rec [95% CI]": measured(row, "ce_rec"),
                "CE_rec published": interval(ce, *limits),
            }
        )
    return Section("Headline", rows, ["The smallest k and budget at the reference depth.", *missing_limits(study)])


def missing_limits(study: Study) -> list[str]:
    """A line on the means' limits that the data do not support; empty where all are there."""
    found = {needs for name in ("ce_rec", "r2") for needs in study.means[f"{name}_needs"] if needs}
    return [f"[–]: {'; '.join(sorted(found))}."] if found else []


def direction(row: pd.Series) -> str:
    """Whether ΔR² and ΔCE_rec agree in sign: "same", "opposite", or "undetermined".

    Both differences must pass 5% after Holm's correction over all deltas of the study, both metrics together.
    """
    if not max(row["delta_r2_p_holm"], row["delta_ce_rec_p_holm"]) < ALPHA:  # NaN: not tested
        return "undetermined"
    return "same" if row["delta_r2"] * row["delta_ce_rec"] > 0 else "opposite"


def _direction_cell(row: pd.Series) -> str:
    needs = row["delta_ce_rec_needs"] or row["delta_r2_needs"]
    return f"{direction(row)} ({needs})" if needs else direction(row)


def _delta_cells(row: pd.Series) -> dict[str, str]:
    return {
        "ΔR² [95% CI]": measured(row, "delta_r2", sign=True),
        "ΔCE_rec [95% CI]": measured(row, "delta_ce_rec", sign=True),
        "directions": _direction_cell(row),
    }


def model_deltas(study: Study) -> Section:
    """Widest minus narrowest model by depth and k at the smallest budget."""
    title = "Widest minus narrowest model, by k"
    part = study.deltas[study.deltas["tokens"] == study.budgets[0]]
    if part.empty:
        return Section(title, needs="the widest and the narrowest of two or more models at one depth, k and budget")
    rows = []
    for row in each(part.sort_values("depth", key=_depth_rank(study), kind="stable")):
        matches = study.is_study_pair(row["small"], row["large"])
        known = published.DELTA.get((row["depth"], row["k"], row["tokens"])) if matches else None
        rows.append(
            {"depth": row["depth"], "k": str(row["k"]), "tokens": tokens_label(row["tokens"])}
            | {"seeds": str(row["n_seeds"])}
            | _delta_cells(row)
            | {"ΔR² published": number(known[0] if known else None, sign=True)}
            | {"ΔCE_rec published": number(known[1] if known else None, sign=True)}
        )
    pair = part.iloc[0]
    line = (
        f"{pair['large']} minus {pair['small']} at {tokens_label(study.budgets[0])} tokens. Directions are opposite "
        "when R² calls one model's SAE better and the patched loss the other's, and same when they agree: counted only "
        f"where both differences pass 5% after Holm's correction over the {2 * len(study.deltas)} differences of this "
        "report (deltas.csv has the p-values). An interval is of its own difference alone."
    )
    return Section(title, rows, [line, *_source(study, "fast2")])


def _depth_rank(study: Study) -> Callable[[pd.Series], pd.Series]:
    order = study.depths
    return lambda column: column.map(order.index)


def by_model_and_k(study: Study) -> Section:
    """R², CE_rec, cosine and features alive at the reference depth and smallest budget, by k and model."""
    part = study.means_at(depth=study.reference_depth, tokens=study.budgets[0]).sort_values("k", kind="stable")
    rows = []
    for row in each(part):
        matches = study.published and (row["depth"], row["tokens"]) == ("mid", published.TEN)
        known = published.FAST3.get((study_name(row["model"]), row["k"])) if matches else None
        text = {"k": str(row["k"]), "model": str(row["model"]), "seeds": str(row["n_seeds"])}
        measured = (row["r2"], row["ce_rec"], row["cosine"], 100 * row["alive"])
        for i, (name, digits) in enumerate((("R²", 3), ("CE_rec", 3), ("cosine", 3), ("alive %", 1))):
            text[name] = number(measured[i], digits)
            text[f"{name} published"] = number(known[i] if known else None, digits)
        rows.append(text)
    where = f"{study.reference_depth}, {tokens_label(study.budgets[0])} tokens"
    return Section(f"Scale ladder ({where})", rows, _source(study, "fast3"))


def correlation_scopes(cells: pd.DataFrame) -> dict[str, np.ndarray]:
    """The leaderboard's scopes: all cells, each depth, and each depth at each budget."""
    scopes = {"all cells": np.ones(len(cells), dtype=bool)}
    for depth in depths_of(cells):
        at_depth = (cells["depth"] == depth).to_numpy()
        for tokens in sorted(cells["tokens"].unique()):
            scopes[f"{depth}, {tokens_label(tokens)}"] = at_depth & (cells["tokens"] == tokens).to_numpy()
    return scopes


def correlations(study: Study) -> Section:
    """Correlations of R² and CE_rec per depth and budget, pooled and within fixed k."""
    title = "Correlation of R² with CE_rec, per depth"
    table = study.board.table
    table = table[(table["proxy"] == "r2") & (table["scope"] != "all cells")]
    if table.empty:
        return Section(title, needs="at least three cells at one depth and budget")
    rows = []
    for scope, part in table.groupby("scope", sort=False):
        depth, tokens = str(scope).split(", ")
        matches = study.published and tokens == tokens_label(published.TEN)
        known = published.CORRELATION.get(depth) if matches else None
        text = {"depth": depth, "tokens": tokens, "cells": str(part["n_cells"].iloc[0])}
        for i, relation in enumerate(("pooled", "within k")):
            row = {r["statistic"]: r for r in each(part[part["relation"] == relation])}
            text[f"Pearson, {relation}"] = number(row["pearson"]["value"], sign=True) or "undefined (one cell per k)"
            text[f"{relation} published"] = number(known[i] if known else None, sign=True)
            spearman = measured(row["spearman"], "value", ("lo", "hi"), sign=True)
            text[f"Spearman, {relation} [95% CI]"] = spearman or "undefined"
        rows.append(text)
    line = "Intervals are of rank correlations alone, as in the leaderboard below; [–]: too few trajectories or k."
    return Section(title, rows, [line, *_source(study, "fast2")])


def k_stars(study: Study) -> Section:
    """k*(t) by depth, target, model and budget, censored at the grid's ends."""
    grid_size = study.means.groupby(["model", "depth", "tokens"])["k"].nunique().max()
    title = "k*: the smallest k that reaches a CE_rec"
    if grid_size < 2:
        return Section(title, needs="at least two k at the same model, depth and budget")
    rows = []
    for (depth, target), tokens, model in itertools.product(
        [(d, t) for d in study.depths for t in published.K_STAR_TARGETS],
        study.budgets,
        study.models,
    ):
        curve = study.means_at(model=model, depth=depth, tokens=tokens)
        if len(curve) < 2:
            continue
        matches = study.published and tokens == published.TEN
        known = published.K_STAR.get((study_name(model), depth, target)) if matches else None
        rows.append(
            {"depth": depth, "target": f"{target:.2f}", "tokens": tokens_label(tokens), "model": model}
            | {"seeds": str(curve["n_seeds"].min()), "k* [95% CI]": _k_star(curve, target)}
            | {"published": number(known, 1)}
        )
    line = (
        "Of the means over seeds. Linear interpolation on the grid, never extrapolation: “> 256” means that the grid's "
        "largest k, 256, stays below the target, “<= 8” that its smallest already reaches it. The limits are where the "
        "limits of CE_rec cross the target."
    )
    return Section(title, rows, [line, *_source(study, "fast2")], needs="" if rows else "a grid of k for one model")


def _k_star(curve: pd.DataFrame, target: float) -> str:
    k, ce_rec, lo, hi = (curve[c].to_numpy(float) for c in ("k", "ce_rec", "ce_rec_lo", "ce_rec_hi"))
    if not np.isfinite([lo, hi]).all():
        return f"{format_k_star(k_star(k, ce_rec, target))} [–]"
    return str(k_star_interval(k, ce_rec, lo, hi, target))


def budget_deltas(study: Study) -> Section:
    """Widest minus narrowest model at the reference depth, by k and training budget."""
    title = "Budget: does the gap between models close with training?"
    part = study.deltas[study.deltas["depth"] == study.reference_depth]
    if part.groupby("k")["tokens"].nunique().max() < 2 or part.empty:
        return Section(title, needs="two models at two or more training budgets (same depth and k)")
    rows = []
    for row in each(part.sort_values(["k", "tokens"])):
        key = (row["depth"], row["k"], row["tokens"])
        known = published.BUDGET_DELTA.get(key) if study.is_study_pair(row["small"], row["large"]) else None
        text = {"k": str(row["k"]), "tokens": tokens_label(row["tokens"]), "seeds": str(row["n_seeds"])}
        text |= _delta_cells(row)
        text["ΔCE_rec published"] = text["ΔR² published"] = ""
        if known:
            seeds, ce, limits, r2 = known
            value = interval(ce, *(limits or (math.nan, math.nan)), sign=True)
            text["ΔCE_rec published"] = f"{value} ({seeds} seed{'s' if seeds > 1 else ''})"
            text["ΔR² published"] = number(r2, sign=True)
        rows.append(text)
    return Section(title, rows, _source(study, "phase2"))


def budget_cells(study: Study) -> Section:
    """CE_rec, R² and features alive of each model by k and budget, at the reference depth."""
    title = f"Budget: each model ({study.reference_depth})"
    part = study.means_at(depth=study.reference_depth)
    if len(study.budgets) < 2:
        return Section(title, needs="two or more training budgets")
    rows = []
    for row in each(part.sort_values(["k", "d_model", "tokens"])):
        matches = study.published and row["depth"] == "mid"
        known = published.BUDGET_CELL.get((study_name(row["model"]), row["k"], row["tokens"]), {}) if matches else {}
        limits = (known.get("ce_rec_lo", math.nan), known.get("ce_rec_hi", math.nan))
        rows.append(
            {"k": str(row["k"]), "model": row["model"], "tokens": tokens_label(row["tokens"])}
            | {"seeds": str(row["n_seeds"])}
            | {"CE_rec [95% CI]": measured(row, "ce_rec")}
            | {"CE_rec published": interval(known.get("ce_rec", math.nan), *limits)}
            | {"R²": number(row["r2"]), "R² published": number(known.get("r2"))}
            | {"alive %": number(100 * row["alive"], 1), "alive % published": number(known.get("alive"), 1)}
        )
    return Section(title, rows, _source(study, "phase2 and budget_k32"))


@dataclass(frozen=True)
class Section:
    """A titled table, or what it needs; `lines` are paragraphs above it."""

    title: str
    rows: Sequence[Mapping[str, str]] = ()
    lines: Sequence[str] = ()
    needs: str = ""


def identity(row: pd.Series) -> dict[str, str]:
    """The leading columns of a table with one row a configuration."""
    text = {"model": str(row["model"]), "depth": str(row["depth"]), "layer": str(row["layer"]), "k": str(row["k"])}
    return text | {"tokens": tokens_label(row["tokens"]), "seeds": str(row["n_seeds"])}


def each(frame: pd.DataFrame) -> Iterator[pd.Series]:
    """The rows of a frame."""
    return (row for _, row in frame.iterrows())


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A pipe table; numbers right-aligned."""
    names = list(rows[0])
    cells = [[row[name] for name in names] for row in rows]
    numeric = [all(not row[i] or row[i][0] in "+-0123456789><" for row in cells) for i in range(len(names))]
    return pipe_table(names, cells, numeric)


def leaderboard(study: Study) -> Section:
    """Every proxy's correlation with CE_rec over all cells, with its paired difference from R²."""
    title = "Proxy leaderboard (all cells)"
    table = study.board.table
    table = table[table["scope"] == "all cells"]
    if table.empty:
        return Section(title, needs="at least three cells", lines=[f"Left out: {d}." for d in study.board.dropped])
    rows = [
        _leaderboard_row(row) | {"cost in forward passes": str(cost_of(row["proxy"], study.costs))}
        for row in each(table)
    ]
    lines = [
        f"{len(study.cells)} cells. Ranks follow the values and are no verdict: see the differences. Pooled: over all "
        "cells of this grid; the interval speaks of other trainings of these configurations and other sequences, not "
        "of other models, layers or k (a jackknife over trajectories, each with its seeds and budgets). Within k: both "
        "sides minus their mean over the cells of the same k; the interval speaks of other k (a jackknife over k). "
        "Differences are paired and each has an interval of its own. Pearson's correlation has none, since it hangs on "
        "how the cells are spread."
    ]
    lines.append(
        "Cost: measured, in forward passes of the whole model over the same tokens, beyond the pass that gives the "
        f"activations; “per model” is shared by all its SAEs. CE_rec itself takes {cost_of('ce_rec', study.costs)}."
    )
    lines += _missing(table)
    lines += [f"Left out: {reason}." for reason in study.board.dropped]
    return Section(title, rows, lines)


def _leaderboard_row(row: pd.Series) -> dict[str, str]:
    text = {name: str(row[name]) for name in ("relation", "statistic", "rank")} | {"proxy": row["label"]}
    if row["statistic"] == "pearson":
        values = number(row["value"], sign=True), number(row["minus_r2"], sign=True)
    else:
        values = measured(row, "value", ("lo", "hi"), sign=True), measured(row, "minus_r2", sign=True)
    return text | {"correlation with CE_rec [95% CI]": values[0] or "undefined", "minus R² [95% CI]": values[1]}


def _missing(table: pd.DataFrame) -> list[str]:
    """What missing intervals of rank correlations would need, a line each relation."""
    ranks = table[(table["statistic"] == "spearman") & table["value"].notna() & (table["needs"] != "")]
    return [
        f"[–], {relation}: {'; '.join(sorted(set(part['needs'])))}."
        for relation, part in ranks.groupby("relation", sort=False)
    ]


def participation_ratios(study: Study) -> Section:
    """PR raw, over d_model and deflated, for every layer of every model."""
    title = "Participation ratio, every layer"
    if study.geometry.empty:
        return Section(title, needs="the activation covariance of the models' layers")
    depth_of = study.cells.drop_duplicates(["model", "layer"]).set_index(["model", "layer"])["depth"].to_dict()
    rows = []
    for row in each(study.geometry.sort_values(["d_model", "model", "layer"])):
        key = (study_name(row["model"]), row["layer"])
        known = published.PARTICIPATION_RATIO.get(key) if study.published else None
        rows.append(
            {"model": row["model"], "layer": str(row["layer"])}
            | {"hooked as": depth_of.get((row["model"], row["layer"]), "")}
            | {"PR": number(row["pr"]), "PR published": number(known[0] if known else None)}
            | {"PR/d_model": number(row["pr"] / row["d_model"], 4)}
            | {"PR/d_model published": number(known[1] if known else None)}
            | {"PR, top eigenvector removed": number(row["pr_deflated"])}
            | {"PR without sinks": number(row["pr_no_sinks"]) or "–"}
        )
    return Section(title, rows, ["Sinks: see “What owns the variance, every layer”."])


def conventions(study: Study) -> Section:
    """The three R² conventions side by side; CE_rec and ce_loss_score side by side; the losses they come from."""
    part, lines = limited(study)
    rows = [
        identity(row)
        | {"R² (ratio of sums)": number(row["r2"], 4)}
        | {"R² legacy (mean of token ratios)": number(row["r2_legacy"], 4)}
        | {"R² energy (E‖a‖² − ‖E a‖²)": number(row["r2_energy"], 4)}
        | {"CE_rec": number(row["ce_rec"], 4), "ce_loss_score": number(row["ce_loss_score"], 4)}
        | {"L_orig": number(row["loss_orig"]), "L_recon": number(row["loss_recon"]), "L_zero": number(row["loss_zero"])}
        for row in each(part)
    ]
    text = (
        "R² = 1 − Σ‖a − â‖² / Σ‖a − ā‖². Legacy averages 1 − ‖a_t − â_t‖² / ‖a_t − ā‖² over tokens. Energy divides by "
        "E‖a‖² − ‖E a‖²: the same number as R² unless float64 cancels. CE_rec = 2 − L_recon / L_orig; ce_loss_score = "
        "(L_zero − L_recon) / (L_zero − L_orig); one is never converted into the other. Losses in nats a token, "
        "means over seeds."
    )
    return Section("Conventions side by side", rows, [text, *lines])


def rates(study: Study) -> Section:
    """Bits per token under both rate proxies, with the distortion at that rate."""
    part, lines = limited(study)
    rows = [
        identity(row)
        | {"bits/token, uniform bound": number(row["rate_bits"], 1)}
        | {"bits/token, entropy-coded": number(row["rate_bits_entropy"], 1)}
        | {"R²": number(row["r2"]), "CE_rec": number(row["ce_rec"]), "alive %": number(100 * row["alive"], 1)}
        | {"cosine": number(row["cosine"]), "relative error": number(row["relative_error"])}
        for row in each(part)
    ]
    text = (
        "Uniform bound: log2 C(d_sae, k) + 8k. Entropy-coded: k·H − log2 k! + 8k, H the measured entropy of the "
        "feature index. 8 bits a value in both."
    )
    return Section("Rate, distortion and feature use", rows, [text, *lines])
