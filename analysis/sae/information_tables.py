"""Table of the proxy-gap report on the task-relevant dimension of the layers, compared with the participation ratio."""

from __future__ import annotations

import math

import pandas as pd

from analysis.sae.columns import INFORMATION_COLUMNS
from analysis.sae.measured import number
from analysis.sae.tables import Section, each
from analysis.sae.task_dimension import AT_CEILING, TOLERANCE, at_ceiling

_VIEW = (
    "X is a token's activation at the hook, Y the logits at that token in their leading principal directions (at most "
    "500). InfoNCE in nats on held-out sequences, hybrid critic; its ceiling is log N for batches of N. k_MI*: the "
    f"smallest k_z whose estimate is within {TOLERANCE:.0%} of the largest; brackets: 95%, for other seeds and splits "
    "of these sequences, not for other texts. One-shot: participation ratio of the singular values of the "
    "cross-covariance of f(x) and g(y) at the largest k_z, without an interval."
)


def information(cells: pd.DataFrame, geometry: pd.DataFrame) -> Section:
    """k_MI* with its interval, information with its ceiling, the one-shot estimate, and PR raw, deflated, sink-free.

    Args:
        cells: columns model, layer, depth.
        geometry: one row per model and layer, with INFORMATION_COLUMNS where they were measured.
    """
    title = "Task-relevant dimension by mutual information"
    known = measured_layers(geometry)
    if known.empty:
        return Section(title, needs="cells that measure it (`--set information=on`)")
    depth_of = cells.drop_duplicates(["model", "layer"]).set_index(["model", "layer"])["depth"].to_dict()
    rows = [
        {"model": row["model"], "layer": str(row["layer"])}
        | {"hooked as": depth_of.get((row["model"], row["layer"]), "")}
        | {"k_MI*": dimension(row), "one-shot": number(row["k_mi_one_shot"], 1)}
        | {"information": number(row["mi_nats"], 2), "ceiling": number(row["mi_ceiling"], 2)}
        | {"PR": number(row["pr"], 1), "PR, top eigenvector removed": number(row["pr_deflated"], 1)}
        | {"PR without sinks": number(row["pr_no_sinks"], 1) or "–"}
        | {"(k_MI* − PR) / PR": number((row["k_mi"] - row["pr"]) / row["pr"], 2, sign=True) or "–"}
        for row in each(known)
    ]
    lines = [_VIEW]
    capped = [row for row in rows if row["k_MI*"].startswith("≥")]
    if capped:
        lines.append(
            f"In {len(capped)} of {len(rows)} layers the information is within {AT_CEILING:.0%} of the ceiling, which "
            "may hide what more dimensions would add: k_MI* is a lower bound there (≥)."
        )
    return Section(title, rows, lines)


def measured_layers(geometry: pd.DataFrame) -> pd.DataFrame:
    """The layers whose information was measured, with all of INFORMATION_COLUMNS."""
    known = geometry.assign(**{c: math.nan for c in INFORMATION_COLUMNS if c not in geometry.columns})
    return known[known["mi_nats"].notna()]


def dimension(row: pd.Series) -> str:
    """k_MI* [lo, hi]: ≥ where the ceiling may hide more, "–" where no k_z of the grid reached a plateau."""
    if math.isnan(row["k_mi"]):
        beyond = "" if math.isnan(row["k_mi_lo"]) else f" (≥ {row['k_mi_lo']:.0f}; no plateau)"
        return f"–{beyond}"
    high = "open" if math.isnan(row["k_mi_hi"]) else f"{row['k_mi_hi']:.0f}"
    bound = "≥ " if at_ceiling(row["mi_nats"], row["mi_ceiling"]) else ""
    return f"{bound}{row['k_mi']:.0f} [{row['k_mi_lo']:.0f}, {high}]"
