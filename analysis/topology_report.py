"""The topology audit's report: tables in the shape of the paper, diagrams, ratios with intervals, verdicts by rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import plots
from analysis.topology_tables import FULL_TABLE, Audit, Unit

_MAX_PANELS = 12
PUBLISHED = {("curated", "bits_r4", "jaccard", "direct", "top1_ratio"): 2.445}


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
) -> None:
    """Write report.md, cells.parquet, cells.csv and figures into `out`.

    `members` has columns table, member, auroc_test, auroc_val; `correlations` a, b, spearman; `utility` table,
    representation, metric, split, neighbours_in_training, target, family, r2_geometry, r2_both, delta, delta_lo,
    delta_hi, p. Empty frames leave their sections out.
    """
    out.mkdir(parents=True, exist_ok=True)
    result.cells.to_parquet(out / "cells.parquet", index=False)
    result.cells.to_csv(out / "cells.csv", index=False)
    text = [f"# Topology audit: {preset}", "", *[f"- {fact}" for fact in facts], ""]
    if units:
        text += ["## Verdicts", "", *([_PUBLISHED_RULE, ""] if result.published_rule else []), *_verdicts(result), ""]
        text += ["## Ratios and tests", "", _RATIO_NOTE, "", _markdown(_ratio_table(result.cells)), ""]
        text += ["![ratios](ratios.png)", "", "![nulls](nulls.png)", ""]
        text += ["## Stability over runs", "", _markdown(_stability_table(result.cells)), ""]
        text += ["## Diagrams", "", "![diagrams](diagrams.png)", "", "![barcodes](barcodes.png)", ""]
        _ratio_figure(result.cells, out / "ratios.png")
        _null_figure(units, out / "nulls.png")
        _diagram_figure(units, out / "diagrams.png")
        _barcode_figure(units, out / "barcodes.png")
    if result.advice:
        text += ["## How far these numbers of runs and draws reach", "", *[f"- {line}" for line in result.advice], ""]
    if not members.empty:
        text += ["## Own odor model (not OpenPOM)", "", _markdown(members), ""]
    if not correlations.empty:
        text += ["## Agreement of the members' distances", "", _markdown(correlations), ""]
        _ensemble_figure(correlations, out / "ensemble.png")
        text += ["![ensemble](ensemble.png)", ""]
    if not utility.empty:
        text += ["## Utility of local topology", "", _UTILITY_NOTE, "", _markdown(utility), ""]
        _utility_figure(utility, out / "utility.png")
        text += ["![utility](utility.png)", ""]
    (out / "report.md").write_text("\n".join(text))


_RATIO_NOTE = (
    "Top-1 ratio: mean over runs of the largest finite H1 persistence, divided by the largest over nulls of the 95th "
    "percentile of the nulls' largest persistence; interval over null draws. p: Monte-Carlo, the largest over the "
    "nulls; Holm: adjusted over the representations of a table, one test each."
)
_PUBLISHED_RULE = (
    "These draws are too few for any Holm-adjusted p below 0.05, so “above its nulls” here is the study's own rule, a "
    "top-1 ratio above 1, which is biased upward; `--preset audit` tests it."
)
_UTILITY_NOTE = (
    "ΔR² of geometry + topology over geometry, out of sample, 5 × 3 folds; p by permuting the topology block in runs "
    "of similar rows. Random folds are the study's; they leave near-copies of a test patch in training, which flatters "
    "flexible models (trees). Grouped folds never have one skeleton (Bemis-Murcko frame without atom types, or the "
    "graph of a molecule without rings) on both sides. neighbours_in_training: share of a test row's neighbours that "
    "lie in its training set."
)


def _markdown(frame: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if np.isnan(value) else f"{value:.4g}"
        return "" if value is None else str(value)

    head = "| " + " | ".join(map(str, frame.columns)) + " |"
    rule = "|" + "---|" * len(frame.columns)
    return "\n".join([head, rule, *("| " + " | ".join(map(cell, row)) + " |" for row in frame.itertuples(index=False))])


def _verdicts(result: Audit) -> list[str]:
    lines = []
    for (table, name), verdict in result.verdicts.items():
        lines.append(f"- **{table}, {name}: {verdict.label}.** {verdict.sentence}.")
    return lines


def _places(cells: pd.DataFrame) -> pd.DataFrame:
    return cells[["table", "representation", "metric", "route"]].drop_duplicates()


def _pick(cells: pd.DataFrame, place: pd.Series, statistic: str) -> pd.Series | None:
    same = (cells[list(place.index)] == place).all(axis=1) & (cells["statistic"] == statistic)
    return cells[same].iloc[0] if same.any() else None


def _ratio_table(cells: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for _, place in _places(cells).iterrows():
        ratio = _pick(cells, place, "top1_ratio")
        test, adjusted = _pick(cells, place, "p_max_over_nulls"), _pick(cells, place, "p_holm")
        observed, full = _pick(cells, place, "observed_top1_mean"), _pick(cells, place, "observed_top1_full")
        share = _pick(cells, place, "share_above_p95")
        key = (*place, "top1_ratio")
        rows.append(
            {
                **place.to_dict(),
                "observed mean": _value(observed),
                "full table": _value(full),
                "top-1 ratio": _value(ratio),
                "95% CI": "" if ratio is None else f"[{ratio.lo:.3f}, {ratio.hi:.3f}]",
                "hardest null": "" if ratio is None else ratio["null"],
                "runs above": _value(share),
                "p": _value(test),
                "p Holm": _value(adjusted),
                "published ratio": PUBLISHED.get(key, float("nan")),
            }
        )
    return pd.DataFrame(rows)


def _value(row: pd.Series | None) -> float:
    return float("nan") if row is None else float(row["value"])


def _stability_table(cells: pd.DataFrame) -> pd.DataFrame:
    wanted = (
        *("birth_spread", "death_spread", "bottleneck_relative", "bottleneck_recurrence"),
        *("wasserstein_relative", "image_cosine", "universal_significant_bonferroni", "universal_significant_bh"),
    )
    rows = [
        {**place.to_dict(), **{name: _value(_pick(cells, place, name)) for name in wanted}}
        for _, place in _places(cells).iterrows()
    ]
    return pd.DataFrame(rows)


def _label(place: Sequence[str]) -> str:
    table, representation, metric, route = place
    return f"{table} · {representation} · {metric}" + ("" if route == "direct" else f" · {route}")


def _ratio_figure(cells: pd.DataFrame, path: Path) -> None:
    ratios = cells[cells["statistic"] == "top1_ratio"].reset_index(drop=True)
    if ratios.empty:
        return
    with plots.style():
        figure, axes = plots.panels(1, 1, width=6.0, height=0.34 * len(ratios) + 1.0)
        axis = axes[0, 0]
        y = np.arange(len(ratios))[::-1]
        errors = plots.error_lengths(ratios["value"], ratios["lo"], ratios["hi"])
        axis.errorbar(ratios["value"], y, xerr=errors, fmt="o", color=plots.PALETTE[0])
        axis.axvline(1.0, color=plots.GREY, linestyle="--", linewidth=1)
        axis.set_yticks(
            y, [_label(p) for p in ratios[["table", "representation", "metric", "route"]].to_numpy().tolist()]
        )
        axis.set_xlabel("top-1 persistence / largest null p95\n(95% CI over null draws)")
        plots.save(figure, path)


def _null_figure(units: Sequence[Unit], path: Path) -> None:
    shown = [u for u in units if u.nulls][:_MAX_PANELS]
    if not shown:
        return
    with plots.style():
        figure, axes = plots.panels(-(-len(shown) // 3), 3, sharex=False, sharey=False)
        for axis, unit in zip(axes.flat, shown, strict=False):
            for i, (null, by_run) in enumerate(unit.nulls.items()):
                values = np.concatenate([np.asarray(v) for v in by_run.values()])
                axis.hist(values, bins=20, alpha=0.6, color=plots.PALETTE[i], label=null)
            axis.axvline(unit.top1(unit.runs).mean(), color="black", linewidth=1.5, label="observed mean")
            axis.set_title(_label(unit.place).replace(" · ", "\n", 1), fontsize=9)
            axis.legend(fontsize=7)
        for axis in list(axes.flat)[len(shown) :]:
            axis.set_visible(False)
        figure.supxlabel("largest H1 persistence of a draw")
        figure.supylabel("draws")
        plots.save(figure, path)


def _shown_run(unit: Unit) -> np.ndarray:
    return unit.observed[FULL_TABLE if FULL_TABLE in unit.observed else unit.runs[0]]


def _diagram_figure(units: Sequence[Unit], path: Path) -> None:
    shown = list(units)[:_MAX_PANELS]
    with plots.style():
        figure, axes = plots.panels(-(-len(shown) // 3), 3, sharex=False, sharey=False)
        for axis, unit in zip(axes.flat, shown, strict=False):
            pairs = _shown_run(unit)
            axis.scatter(pairs[:, 0], pairs[:, 1], s=8, color=plots.PALETTE[0])
            top = float(pairs.max(initial=1e-9)) * 1.05
            axis.plot([0, top], [0, top], color=plots.GREY, linewidth=1)
            axis.set_title(_label(unit.place).replace(" · ", "\n", 1), fontsize=9)
        for axis in list(axes.flat)[len(shown) :]:
            axis.set_visible(False)
        figure.supxlabel("birth (distance)")
        figure.supylabel("death (distance)")
        plots.save(figure, path)


def _barcode_figure(units: Sequence[Unit], path: Path, bars: int = 30) -> None:
    shown = list(units)[:_MAX_PANELS]
    with plots.style():
        figure, axes = plots.panels(-(-len(shown) // 3), 3, sharex=False, sharey=False)
        for axis, unit in zip(axes.flat, shown, strict=False):
            pairs = _shown_run(unit)
            longest = pairs[np.argsort(pairs[:, 0] - pairs[:, 1])[:bars]]
            axis.hlines(np.arange(len(longest))[::-1], longest[:, 0], longest[:, 1], color=plots.PALETTE[0])
            axis.set_yticks([])
            axis.set_title(_label(unit.place).replace(" · ", "\n", 1), fontsize=9)
        for axis in list(axes.flat)[len(shown) :]:
            axis.set_visible(False)
        figure.supxlabel(f"distance (the {bars} longest H1 bars)")
        plots.save(figure, path)


def _ensemble_figure(correlations: pd.DataFrame, path: Path) -> None:
    names = sorted({*correlations["a"], *correlations["b"]})
    square = np.eye(len(names))
    for a, b, value in correlations[["a", "b", "spearman"]].to_numpy().tolist():
        square[names.index(a), names.index(b)] = square[names.index(b), names.index(a)] = value
    with plots.style():
        figure, axes = plots.panels(1, 1, width=5.0, height=4.2)
        image = axes[0, 0].imshow(square, vmin=0, vmax=1, cmap="viridis")
        axes[0, 0].grid(visible=False)
        axes[0, 0].set_xticks(range(len(names)), names, rotation=90)
        axes[0, 0].set_yticks(range(len(names)), names)
        figure.colorbar(image, label="Spearman correlation of pairwise distances")
        plots.save(figure, path)


def _utility_figure(utility: pd.DataFrame, path: Path) -> None:
    targets = list(dict.fromkeys(utility["target"]))
    splits = list(dict.fromkeys(utility["split"]))
    places = list(dict.fromkeys(map(tuple, utility[["representation", "metric"]].to_numpy().tolist())))
    with plots.style():
        figure, axes = plots.panels(
            len(splits), len(targets), width=3.0, height=0.4 * len(places) + 1.1, sharex=True, sharey=True
        )
        for axis, (split, target) in zip(axes.flat, product(splits, targets), strict=True):
            chosen = utility[(utility["split"] == split) & (utility["target"] == target)]
            for i, (family, part) in enumerate(chosen.groupby("family")):
                place = [places.index(p) for p in map(tuple, part[["representation", "metric"]].to_numpy().tolist())]
                y = len(places) - 1 - np.array(place) + 0.12 * (1 - 2 * i)
                errors = plots.error_lengths(part["delta"], part["delta_lo"], part["delta_hi"])
                axis.errorbar(part["delta"], y, xerr=errors, fmt="o", color=plots.PALETTE[i], label=str(family))
            axis.set_yticks(np.arange(len(places))[::-1], [f"{r} · {m}" for r, m in places])
            axis.axvline(0, color=plots.GREY, linestyle="--", linewidth=1)
            axis.set_title(f"{target}\n{split} folds", fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
        figure.supxlabel("ΔR² of geometry + topology over geometry (95% interval)")
        plots.save(figure, path)
