"""Tables of the proxy-gap report on what was measured: proxies, geometry, conventions, rates, definitions."""

from __future__ import annotations

import pandas as pd

from analysis import published
from analysis.proxy_gap_study import Section, Study, each, identity, limited, measured, number, study_name


def leaderboard(study: Study) -> Section:
    """Every proxy's correlation with CE_rec over all cells, with its paired difference from R²."""
    title = "Proxy leaderboard (all cells)"
    table = study.board.table
    table = table[table["scope"] == "all cells"]
    if table.empty:
        return Section(title, needs="at least three cells", lines=[f"Left out: {d}." for d in study.board.dropped])
    rows = [_leaderboard_row(row) for row in each(table)]
    lines = [
        f"{len(study.cells)} cells. Ranks follow the values and are no verdict: see the differences. Pooled: over all "
        "cells of this grid; the interval speaks of other trainings of these configurations and other sequences, not "
        "of other models, layers or k (a jackknife over trajectories, each with its seeds and budgets). Within k: both "
        "sides minus their mean over the cells of the same k; the interval speaks of other k (a jackknife over k). "
        "Differences are paired and each has an interval of its own. Pearson's correlation has none, since it hangs on "
        "how the cells are spread."
    ]
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
    """Bits a token under both rate proxies beside the distortion they buy."""
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
