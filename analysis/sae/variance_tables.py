"""Tables of the proxy-gap report on what owns the variance: which tokens and directions R² and PR measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.sae import published
from analysis.sae.cells import tokens_label
from analysis.sae.columns import AUDIT_COLUMNS, DIRECTIONS, LAYER_COLUMNS, SINK_NORM, SINK_SHARE, TOP_SHARE
from analysis.sae.leaderboard import MIN_CELLS
from analysis.sae.measured import Study, limited, number, study_name
from analysis.sae.tables import Section, each, identity

OWNED = 0.5  # the share of Σ‖a − ā‖² from which the report says in words whose variance it is
_OLDER = "cells of a ledger that is older than this audit; a new ledger (another --storage) has it"


def flags(study: Study) -> list[str]:
    """One sentence for each hooked layer where at most 1% of the tokens hold half of Σ‖a − ā‖² or more."""
    lines = []
    layers = study.geometry[study.geometry["sst_share_top1pct"] >= OWNED]
    for row in each(layers):
        cells = study.cells[(study.cells["model"] == row["model"]) & (study.cells["layer"] == row["layer"])]
        if cells.empty:
            continue
        below = int((cells["r2"] < row["r2_constant"]).sum())
        lines.append(
            f"{row['model']}, {cells['depth'].iloc[0]} (layer {row['layer']}): {TOP_SHARE:.0%} of the tokens hold "
            f"{row['sst_share_top1pct']:.1%} of Σ‖a − ā‖² (the first tokens alone {row['sst_share_first']:.1%}), so R² "
            f"and PR there tell of these tokens. The sinks ({row['sink_share']:.2%} of the tokens) exact and ONE "
            f"constant for all others give R² {row['r2_constant']:.4f}; {below} of {len(cells)} trained SAEs have "
            "less."
        )
    return lines


def _ranges(layers: Sequence[int]) -> str:
    """5, 11 to 27."""
    runs = np.split(np.array(layers), np.flatnonzero(np.diff(layers) > 1) + 1)
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)


def layers(study: Study) -> Section:
    """Shares of Σ‖a − ā‖² by token and direction, PR with and without sinks, the constant code: every layer."""
    title = "What owns the variance, every layer"
    known = study.geometry.dropna(subset=list(LAYER_COLUMNS), how="all")
    if known.empty:
        needs = "the activations of the models' layers" if study.geometry.empty else f"more than the {_OLDER}"
        return Section(title, needs=needs)
    depth_of = study.cells.drop_duplicates(["model", "layer"]).set_index(["model", "layer"])["depth"].to_dict()
    rows = [
        {"model": row["model"], "layer": str(row["layer"])}
        | {"hooked as": depth_of.get((row["model"], row["layer"]), "")}
        | {"first token %": _percent(row["sst_share_first"]), "first four %": _percent(row["sst_share_first4"])}
        | {"longest 1% of tokens %": _percent(row["sst_share_top1pct"]), "sinks %": _percent(row["sst_share_sinks"])}
        | {"sinks, % of tokens": number(100 * row["sink_share"], 2)}
        | {f"top {_vectors(m)} %": _percent(row[f"sst_share_eig{m}"]) for m in DIRECTIONS}
        | {"R² of sinks + one constant": number(row["r2_constant"], 4) or "–"}
        | {"PR": number(row["pr"], 2), "PR without sinks": number(row["pr_no_sinks"], 2) or "–"}
        | {"SST/token": number(row["sst_token"], 1), "E‖a‖²/token": number(row["energy_token"], 1)}
        for row in each(known)
    ]
    lines = [
        "Percentages of Σ‖a − ā‖² over the evaluated tokens. Sinks: the first token of each sequence, and tokens whose "
        f"norm exceeds {SINK_NORM:g} times the layer's median norm (of the later tokens at most the longest "
        f"{SINK_SHARE:.0%} of all). R² of sinks + one constant: of a code that gives the sinks exactly and every other "
        "token as the mean of these others, from the sums alone."
    ]
    for model, part in known[known["sst_share_top1pct"] >= OWNED].groupby("model", sort=False):
        lines.append(
            f"In {model} {TOP_SHARE:.0%} of the tokens hold half of Σ‖a − ā‖² or more at layers "
            f"{_ranges(sorted(part['layer']))}."
        )
    return Section(title, rows, lines)


def controls(study: Study) -> Section:
    """R² of every configuration without sinks, first positions and leading directions; whitened; around the origin."""
    title = "R² without what owns the variance"
    if study.means[list(AUDIT_COLUMNS)].isna().all(axis=None):
        return Section(title, needs=f"more than the {_OLDER}")
    part, lines = limited(study)
    columns = {
        "without first token": "r2_no_first",
        "without first four": "r2_no_first4",
        f"without > {SINK_NORM:g} × median norm": "r2_no_huge",
        "without sinks": "r2_no_sinks",
        **{f"without top {_vectors(m)}": f"r2_deflated{m}" for m in DIRECTIONS},
        "whitened": "r2_whitened",
    }
    rows = [
        identity(row)
        | {"R²": number(row["r2"])}
        | {label: number(row[column]) or "–" for label, column in columns.items()}
        | {"1 − NMSE (around 0)": number(1 - row["nmse"]), "CE_rec": number(row["ce_rec"])}
        for row in each(part)
    ]
    text = (
        "Means over seeds. Without tokens: both sums over the others, ā their mean. Without eigenvectors: both sums in "
        "the coordinates that are left. Whitened: 1 − tr(Σ⁻¹E) / d, E the mean of δδᵀ and Σ the covariance. 1 − NMSE = "
        "1 − Σ‖a − â‖² / Σ‖a‖² is about what SAELens called explained variance between its pull requests 443 and 665."
    )
    return Section(title, rows, [text, *_ranking(study, {"R²": "r2", **columns}), *lines])


def answer(study: Study) -> str:
    """The sweep's question in one line: how R² orders the largest budget's configurations, compared with CE_rec."""
    columns = {"R²": "r2", "R² without attention sinks": "r2_no_sinks"}
    known = {label: column for label, column in columns.items() if study.means[column].notna().any()}
    lines = _ranking(study, known)
    return lines[-1] if lines else f"– (a rank correlation needs ≥ {MIN_CELLS} configurations of one budget)"


def _ranking(study: Study, columns: Mapping[str, str]) -> list[str]:
    """How each R² ranks a budget's configurations as CE_rec does, for budgets where MIN_CELLS or more have them all.

    One sentence per budget, the largest last.
    """
    lines = []
    for tokens, known in study.means.dropna(subset=["ce_rec", *columns.values()]).groupby("tokens"):
        if len(known) < MIN_CELLS:
            continue
        values = {label: known[column].corr(known["ce_rec"], method="spearman") for label, column in columns.items()}
        listed = ", ".join(f"{label} {number(value, 2, sign=True)}" for label, value in values.items())
        lines.append(
            f"Spearman correlation with CE_rec over the {len(known)} configurations of "
            f"{tokens_label(float(str(tokens)))} tokens, point estimates: {listed}."
        )
    return lines


def scale_parts(study: Study) -> Section:
    """Δ log(1 − R²) between models, split into the part from SSE and the part from SST."""
    title = "Is ΔR² between models from the error or from the variance?"
    if study.deltas.empty:
        return Section(title, needs="the widest and the narrowest of two or more models at one depth, k and budget")
    cells = study.cells.assign(
        log_miss=np.log(1.0 - study.cells["r2"]), log_sse=np.log(study.cells["mse"] * study.cells["d_model"])
    )
    cells["log_sst"] = cells["log_sse"] - cells["log_miss"]
    means = cells.groupby(["model", "depth", "k", "tokens"])[["r2", "log_miss", "log_sse", "log_sst"]].mean()
    rows = []
    for delta in each(study.deltas):
        place = (delta["depth"], delta["k"], delta["tokens"])
        small, large = (means.loc[means.index == (delta[model], *place)].iloc[0] for model in ("small", "large"))
        change = large - small
        rows.append(
            {"depth": delta["depth"], "k": str(delta["k"]), "tokens": tokens_label(delta["tokens"])}
            | {f"R² {delta['small']}": number(small["r2"]), f"R² {delta['large']}": number(large["r2"])}
            | {"Δ log(1 − R²)": number(change["log_miss"], sign=True)}
            | {"from SSE": number(change["log_sse"], sign=True), "from SST": number(-change["log_sst"], sign=True)}
            | {"read": _reading(change)}
        )
    text = (
        "log(1 − R²) = log SSE − log SST, both per token; the widest minus the narrowest model, means over seeds, "
        "without intervals. A negative part raises the wider model's R². Where SSE rises and SST rises more, the "
        "wider model's R² is higher although its error is larger."
    )
    return Section(title, rows, [text])


def _reading(change: pd.Series) -> str:
    if change["log_miss"] >= 0:
        return "R² not higher"
    return "R² higher, error larger" if change["log_sse"] > 0 else "R² higher, error smaller"


def definition_check(study: Study) -> Section:
    """mse·d_model, SST and Σ‖a‖² a token, whose ratios are 1 − R² and NMSE: tells a definition apart from a result."""
    rows = []
    for row in each(study.headline_means()):
        sse = row["mse"] * row["d_model"]
        matches = study.published and (row["depth"], row["k"], row["tokens"]) == ("mid", 8, published.TEN)
        known = published.DEFINITION_CHECK.get(study_name(row["model"])) if matches else None
        measured = (("mse·d_model", sse, 1), ("SST/token", sse / (1 - row["r2"]), 1), ("R² = 1 − ratio", row["r2"], 3))
        text = identity(row)
        for i, (name, value, digits) in enumerate(measured):
            text[name] = number(value, digits)
            text[f"{name} published"] = number(known[i] if known else None, digits)
        text |= {"E‖a‖²/token": number(sse / row["nmse"], 1), "1 − NMSE": number(1 - row["nmse"])}
        rows.append(text)
    lines = ["SST/token = Σ‖a − ā‖² over the number of tokens; E‖a‖²/token is around the origin instead of the mean."]
    if study.published:
        lines.append(
            "SAELens' explained variance was about 1 − NMSE for a year. Which of the two columns meets the published "
            "SST/token (226.7 and 4131.1) tells which quantity was published."
        )
    return Section("Check on definitions", rows, lines)


def _vectors(m: int) -> str:
    return "eigenvector" if m == 1 else f"{m} eigenvectors"


def _percent(share: float) -> str:
    return number(100 * share, 1) or "–"
