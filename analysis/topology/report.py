"""The topology audit's report: tables in the shape of the paper, diagrams, ratios with intervals, verdicts by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.markdown import table
from analysis.topology import plots
from analysis.topology.tables import Audit
from analysis.topology.unit import Unit
from analysis.topology.utility_report import agreement_lines, utility_findings, utility_section
from analysis.topology.verdict import LABELS

_LISTED = 4  # representations that the findings name of each verdict
PUBLISHED = {  # top-1 ratios of the study's own texts, by place
    ("curated", "bits_r4", "jaccard", "direct"): "2.445",
    ("curated", "bits_r4", "jaccard", "landmark"): "1.67",
    ("curated", "counts_r4", "tanimoto", "direct"): "0.93",
    ("curated", "counts_r4", "tanimoto", "landmark"): "1.23",
    ("curated", "physchem", "euclidean", "direct"): "1.39",
    ("curated", "physchem", "euclidean", "landmark"): "1.25",
    ("nonoverlap", "bits_r4", "jaccard", "direct"): "3.1 to 4.1",
    ("nonoverlap", "bits_r4", "jaccard", "landmark"): "1.78",
}


def write_report(
    units: Sequence[Unit],
    result: Audit,
    out: Path,
    *,
    preset: str,
    facts: Sequence[str],
    members: pd.DataFrame,
    correlations: pd.DataFrame,
    utility: pd.DataFrame,
) -> list[str]:
    """Write report.md, cells.parquet, cells.csv, universal.parquet and figures into `out`; returns the findings.

    `members` has columns table, member, auroc_test, auroc_val; `correlations` a, b, spearman, pearson;
    `utility` those of `utility_section`. Empty frames leave their sections out.
    """
    out.mkdir(parents=True, exist_ok=True)
    result.cells.to_parquet(out / "cells.parquet", index=False)
    result.cells.to_csv(out / "cells.csv", index=False)
    result.universal.to_parquet(out / "universal.parquet", index=False)
    text = [f"# Topology audit: {preset}", "", *[f"- {fact}" for fact in facts], ""]
    findings = glance(result, members, correlations, utility)
    text += ["## At a glance", "", *[f"- {line}" for line in findings], ""] if findings else []
    if units:
        text += ["## Verdicts", "", *([_FEW_DRAWS, ""] if result.few_draws else []), *_verdicts(result), ""]
        text += ["## Ratios and tests", "", _RATIO_NOTE, "", _markdown(_ratio_table(result.cells)), ""]
        text += ["![ratios](ratios.png)", "", "![nulls](nulls.png)", ""]
        text += ["## Stability over runs", "", _markdown(_wide(_own(result.cells), _STABILITY)), ""]
        if not (matched := _wide(result.cells, _CHECKPOINTS)).empty:
            text += ["## Matching over checkpoints", "", _CHECKPOINT_NOTE, "", _markdown(matched), ""]
        if not (loops := _wide(result.cells, _UNIVERSAL)).empty:
            text += ["## Universal null", "", _UNIVERSAL_NOTE, "", _markdown(loops), ""]
        text += ["## Diagrams", "", "![diagrams](diagrams.png)", "", "![barcodes](barcodes.png)", ""]
        plots.ratios(result.cells, out / "ratios.png")
        plots.nulls(units, out / "nulls.png")
        plots.diagrams(units, out / "diagrams.png")
        plots.barcodes(units, out / "barcodes.png")
    if result.advice:
        text += ["## How far these numbers of runs and draws reach", "", *[f"- {line}" for line in result.advice], ""]
    if not members.empty:
        text += ["## Own odor model (not OpenPOM)", "", _markdown(members), ""]
    if not correlations.empty:
        text += ["## Agreement of the members' distances", "", *agreement_lines(correlations)]
        text += [_markdown(correlations), ""]
        plots.ensemble(correlations, out / "ensemble.png")
        text += ["![ensemble](ensemble.png)", ""]
    if not utility.empty:
        text += utility_section(utility)
        if (scored := utility[utility["target"].notna()]).size:
            plots.utility(scored, out / "utility.png")
            text += ["![utility](utility.png)", ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    return findings


def glance(result: Audit, members: pd.DataFrame, correlations: pd.DataFrame, utility: pd.DataFrame) -> list[str]:
    """The findings in sentences, from the tables below them: representations by verdict, then what else was measured.

    Frames as `write_report` takes them.
    """
    by_label: dict[str, list[str]] = {}
    for (molecules, name), verdict in result.verdicts.items():
        by_label.setdefault(verdict.label, []).append(f"{molecules} {name}{_numbers(result.cells, molecules, name)}")
    lines = []
    for label in (label for label in LABELS if label in by_label):
        named = by_label[label]
        rest = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
        lines.append(f"{label}: {', '.join(named[:_LISTED])}{rest}.")
    if not members.empty:
        scores = members["auroc_test"]
        lines.append(
            f"{len(members)} members of the own odor model: test AUROC {scores.mean():.3f} on average, from "
            f"{scores.min():.3f} to {scores.max():.3f}."
        )
    if not correlations.empty:
        lines.append(
            f"Distances of {len(correlations)} pairs of embeddings: Pearson {correlations['pearson'].mean():.3f} on "
            f"average, from {correlations['pearson'].min():.3f} to {correlations['pearson'].max():.3f}."
        )
    return [*lines, *utility_findings(utility)]


def _numbers(cells: pd.DataFrame, molecules: str, name: str) -> str:
    """` (top-1 ratio 2.45, p Holm 0.025)` of a representation, of its first place that has both."""
    own = cells[(cells["table"] == molecules) & (cells["representation"] == name)]
    for _, place in _places(_own(own)).iterrows():
        ratio, p = _pick(own, place, "top1_ratio"), _pick(own, place, "p_holm")
        if ratio is not None and p is not None:
            return f" (top-1 ratio {ratio['value']:.2f}, p Holm {p['value']:.3g})"
    return ""


_RATIO_NOTE = (
    "Top-1 ratio: mean over runs of the largest finite H1 persistence, divided by the largest over nulls of the 95th "
    "percentile of the nulls' largest persistence; its interval covers both the runs (other subsamples of this table) "
    "and the null draws. A limit that the draws cannot give is –, and `needs` says what it takes. p: Monte-Carlo, the "
    "largest over the nulls; `p subsamples` tests the mean over the subsamples, `p full table` all rows at once; a "
    "verdict rests on the latter where it was drawn for. Holm: adjusted over the representations of a table, one test "
    "each. Pooled ratio: over the 95th percentile of all loops of a null together, a far lower bar. Ratios depend on "
    "the scale of a metric (d → d^q changes them), so they are not compared across metrics; `top quantile` may be: the "
    "largest share of the pairwise distances that lies within one loop's life (full table, else mean over runs), the "
    "same for every monotone map of the distances."
)
_CHECKPOINT_NOTE = (
    "The same rows under each checkpoint of a model: the full table where all have it, else the mean over the runs "
    "that all have. *_relative: distance between the ten largest loops of two checkpoints over their mean top "
    "persistence; *_recurrence: how often the largest loop of one has a partner in the other; spreads of the largest "
    "loop's birth and death over its persistence."
)
_UNIVERSAL_NOTE = (
    "Each loop against the loops of its own diagram (Bobrowski & Skraba 2023), which is another question than whether "
    "the largest loop beats its matched nulls. On clouds of noise it calls any loop significant in 0 to 5% of cases "
    "(nominal 5%), the more rarely the more points there are. Loops born at 0 have no p-value and are left out. Every "
    "loop's p: universal.parquet."
)
_STABILITY = (
    *("birth_spread", "death_spread", "bottleneck_relative", "bottleneck_recurrence"),
    *("wasserstein_relative", "wasserstein_recurrence", "image_cosine"),
)
_CHECKPOINTS = ("checkpoint_count", *(f"checkpoint_{name}" for name in _STABILITY))
_UNIVERSAL = tuple(f"universal_{name}" for name in ("loops", "left_out", "significant_bonferroni", "significant_bh"))
_FEW_DRAWS = (
    "Some representations have too few null draws for any Holm-adjusted p below 0.05 and get no verdict. The study's "
    "own rule, a top-1 ratio above 1, is no test: it has no error rate, and from few draws the ratio lies high."
)


def _markdown(frame: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "–" if np.isnan(value) else f"{value:.4g}"
        return "" if value is None else str(value)

    return table(list(map(str, frame.columns)), [list(map(cell, row)) for row in frame.itertuples(index=False)])


def summary(result: Audit) -> dict[str, float | str]:
    """The answer by names that sort: `ratio/TABLE REPRESENTATION METRIC ROUTE` the top-1 ratio (left out where it is
    not known), `verdict/TABLE REPRESENTATION` the verdict's word."""
    found: dict[str, float | str] = {}
    for _, place in _places(_own(result.cells)).iterrows():
        value = _value(_pick(result.cells, place, "top1_ratio"))
        if np.isfinite(value):
            found[f"ratio/{' '.join(map(str, place))}"] = value
    return found | {f"verdict/{table} {name}": v.label for (table, name), v in result.verdicts.items()}


def _verdicts(result: Audit) -> list[str]:
    lines = []
    for (molecules, name), verdict in result.verdicts.items():
        lines.append(f"- **{molecules}, {name}: {verdict.label}.** {verdict.sentence}.")
    return lines


def _own(cells: pd.DataFrame) -> pd.DataFrame:
    """Without the rows of a model's checkpoints together, which have no diagrams of their own."""
    return cells[~cells["statistic"].isin(_CHECKPOINTS)]


def _places(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[["table", "representation", "metric", "route"]].drop_duplicates()


def _pick(cells: pd.DataFrame, place: pd.Series, statistic: str) -> pd.Series | None:
    same = (cells[list(place.index)] == place).all(axis=1) & (cells["statistic"] == statistic)
    return cells[same].iloc[0] if same.any() else None


def _ratio_table(cells: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, place in _places(_own(cells)).iterrows():
        ratio, whole = _pick(cells, place, "top1_ratio"), _pick(cells, place, "top1_ratio_full")
        wide = _pick(cells, place, "observed_top1_quantile_full")
        share = wide if wide is not None else _pick(cells, place, "observed_top1_quantile_mean")
        picked = {name: _pick(cells, place, statistic) for name, statistic in _SHOWN.items()}
        row: dict[str, object] = {str(name): value for name, value in place.items()}
        rows.append(
            row
            | {
                **{name: _value(picked[name]) for name in list(_SHOWN)[:2]},
                "top quantile": _value(share),
                "top-1 ratio": _value(ratio),
                "95% interval": _interval(ratio),
                "ratio, full table": _value(whole),
                "its 95% interval": _interval(whole),
                "hardest null": "–" if ratio is None else ratio["null"],
                **{name: _value(picked[name]) for name in list(_SHOWN)[2:]},
                "published ratio": PUBLISHED.get(tuple(place), ""),
                "needs": "; ".join(dict.fromkeys(n for row in (ratio, picked["p Holm"]) if (n := _needs(row)))),
            }
        )
    return pd.DataFrame(rows)


_SHOWN = {
    "observed mean": "observed_top1_mean",
    "full table": "observed_top1_full",
    "pooled ratio": "pooled_ratio",
    "runs above": "share_above_p95",
    "p subsamples": "p_subsamples",
    "p full table": "p_full_table",
    "p Holm": "p_holm",
}


def _interval(row: pd.Series | None) -> str:
    if row is None:
        return "–"
    return "[{}, {}]".format(*("–" if np.isnan(limit) else f"{limit:.3f}" for limit in (row.lo, row.hi)))


def _needs(row: pd.Series | None) -> str:
    return row["needs"] if row is not None and isinstance(row["needs"], str) else ""


def _value(row: pd.Series | None) -> float:
    return float("nan") if row is None else float(row["value"])


def _wide(cells: pd.DataFrame, statistics: Sequence[str]) -> pd.DataFrame:
    """A row per place that has any of these statistics, a column per statistic."""
    places = _places(cells[cells["statistic"].isin(statistics)])
    return pd.DataFrame(
        [
            {**place.to_dict(), **{name: _value(_pick(cells, place, name)) for name in statistics}}
            for _, place in places.iterrows()
        ]
    )
