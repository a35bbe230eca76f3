"""Figures of the topology audit. Each function writes one PNG; nothing to show writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis import plots
from analysis.multiplicity import ALPHA
from analysis.topology.unit import FULL_TABLE, Unit

_MAX_PANELS = 12
_PLACE = ["table", "representation", "metric", "route"]
_NULL_COLOUR = dict(
    zip(("fixed_margin", "bernoulli", "permute_columns", "multinomial", "gaussian"), plots.PALETTE, strict=False)
)


def _label(place: Sequence[str]) -> str:
    table, representation, metric, route = place
    return f"{table} · {representation} · {metric}" + ("" if route == "direct" else f" · {route}")


def _panels(units: Sequence[Unit]) -> tuple[Figure, list[tuple[Axes, Unit]]]:
    """One panel for each of the first _MAX_PANELS units, titled with its place."""
    shown = list(units)[:_MAX_PANELS]
    figure, axes = plots.panel_each(len(shown), 3, height=2.3, sharex=False, sharey=False)
    for axis, unit in zip(axes.flat, shown, strict=False):
        axis.set_title(_label(unit.place).replace(" · ", "\n", 1), fontsize=9)
    return figure, list(zip(axes.flat, shown, strict=False))


def ratios(cells: pd.DataFrame, path: Path) -> None:
    """Top-1 ratios with intervals and the line at 1; filled where the Monte-Carlo p is below ALPHA.

    An interval without a lower limit reaches to 0.
    """
    chosen = cells[cells["statistic"] == "top1_ratio"].reset_index(drop=True)
    if chosen.empty:
        return
    tests = cells[cells["statistic"] == "p_max_over_nulls"].set_index(_PLACE)["value"]
    p = np.array([tests.get(tuple(place), np.nan) for place in chosen[_PLACE].to_numpy().tolist()], dtype=float)
    with plots.style():
        figure, axes = plots.panels(1, 1, width=6.0, height=0.34 * len(chosen) + 1.2)
        axis = axes[0, 0]
        y = np.arange(len(chosen))[::-1]
        for low, face in ((p < ALPHA, plots.PALETTE[0]), (~(p < ALPHA), "white")):
            part = chosen[low]
            known = part["lo"].notna() | part["hi"].isna()
            errors = plots.error_lengths(part["value"], part["lo"].where(known, 0.0), part["hi"])
            axis.errorbar(part["value"], y[low], xerr=errors, fmt="o", color=plots.PALETTE[0], mfc=face)
        axis.axvline(1.0, color=plots.GREY, linestyle="--", linewidth=1)
        axis.set_yticks(y, [_label(place) for place in chosen[_PLACE].to_numpy().tolist()])
        axis.set_xlabel(
            "top-1 persistence / largest null p95 (95% interval over runs and null draws)\n"
            f"filled: Monte-Carlo p over all nulls < {ALPHA:g}, not adjusted"
        )
        plots.save(figure, path)


def nulls(units: Sequence[Unit], path: Path) -> None:
    """Histograms of the nulls' largest persistence in subsamples, and the observed mean over runs."""
    shown = [u for u in units if u.tested_runs()]
    if not shown:
        return
    used: dict[str, None] = {}
    with plots.style():
        figure, panels = _panels(shown)
        for axis, unit in panels:
            drawn = {n: null_RB.ravel() for n, null_RB in unit.null_RB(unit.tested_runs()).items()}
            bins = np.histogram_bin_edges(np.concatenate(list(drawn.values())), bins=30)
            for null, values in drawn.items():
                used[null] = None
                axis.hist(values, bins=bins.tolist(), alpha=0.6, color=_NULL_COLOUR[null])
            axis.axvline(unit.top1(unit.runs).mean(), color="black", linewidth=1.5)
        handles = [Patch(color=_NULL_COLOUR[null], alpha=0.6, label=null) for null in used]
        plots.legend_below(figure, [*handles, Line2D([], [], color="black", label="observed, mean over runs")])
        for axis, _ in panels[-3:]:  # the legend is where a common label would be
            axis.set_xlabel("largest H1 persistence of a draw")
        figure.supylabel("draws", fontsize=10)
        plots.save(figure, path)


def _shown_run(unit: Unit) -> np.ndarray:
    return unit.observed[FULL_TABLE if FULL_TABLE in unit.observed else unit.runs[0]]


def diagrams(units: Sequence[Unit], path: Path) -> None:
    """Persistence diagrams of the full table where there is one, else of the first run; the largest loop marked."""
    with plots.style():
        figure, panels = _panels(units)
        for axis, unit in panels:
            pairs_P2 = _shown_run(unit)
            top = float(pairs_P2.max(initial=1e-9)) * 1.05
            axis.plot([0, top], [0, top], color=plots.GREY, linewidth=1)
            axis.scatter(pairs_P2[:, 0], pairs_P2[:, 1], s=8, color=plots.PALETTE[0], alpha=0.5, linewidths=0)
            if len(pairs_P2):
                birth, death = pairs_P2[np.argmax(pairs_P2[:, 1] - pairs_P2[:, 0])]
                axis.scatter([birth], [death], s=36, facecolors="none", edgecolors=plots.PALETTE[1], linewidths=1.4)
        figure.supxlabel("birth (distance); the loop of largest persistence is circled", fontsize=10)
        figure.supylabel("death (distance)", fontsize=10)
        plots.save(figure, path)


def barcodes(units: Sequence[Unit], path: Path, bars: int = 30) -> None:
    """The longest H1 bars of what `diagrams` shows, longest first."""
    with plots.style():
        figure, panels = _panels(units)
        for axis, unit in panels:
            pairs_P2 = _shown_run(unit)
            longest = pairs_P2[np.argsort(pairs_P2[:, 0] - pairs_P2[:, 1])[:bars]]
            axis.hlines(np.arange(len(longest))[::-1], longest[:, 0], longest[:, 1], color=plots.PALETTE[0])
            axis.set_yticks([])
        figure.supxlabel(f"distance from birth to death (the {bars} longest H1 bars)", fontsize=10)
        plots.save(figure, path)


def ensemble(correlations: pd.DataFrame, path: Path) -> None:
    """Matrix of the members' agreement, on a scale from just below the lowest value to 1."""
    names = list(dict.fromkeys([*correlations["a"], *correlations["b"]]))
    square = np.full((len(names), len(names)), np.nan)
    for a, b, value in correlations[["a", "b", "spearman"]].to_numpy().tolist():
        square[names.index(a), names.index(b)] = square[names.index(b), names.index(a)] = value
    with plots.style():
        figure, axes = plots.panels(1, 1, width=0.55 * len(names) + 1.6, height=0.5 * len(names) + 0.8)
        axis = axes[0, 0]
        low = np.floor(20 * np.nanmin(square)) / 20
        image = axis.imshow(square, vmin=low, vmax=1, cmap="Blues")
        middle = (low + 1) / 2
        for (row, column), value in np.ndenumerate(square):
            if np.isfinite(value):
                ink = "white" if value > middle else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
        axis.grid(visible=False)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        figure.colorbar(image, label="Spearman correlation of pairwise distances", shrink=0.8)
        plots.save(figure, path)


def utility(frame: pd.DataFrame, path: Path) -> None:
    """Gain of topology (points) over the control's mean and 95% band (grey), by target and way of cutting folds."""
    targets = list(dict.fromkeys(frame["target"]))
    splits = list(dict.fromkeys(frame["split"]))
    places = list(dict.fromkeys(map(tuple, frame[["representation", "metric"]].to_numpy().tolist())))
    with plots.style():
        figure, axes = plots.panels(
            len(splits), len(targets), width=3.0, height=0.4 * len(places) + 1.1, sharex=True, sharey=True
        )
        for axis, (split, target) in zip(axes.flat, product(splits, targets), strict=True):
            chosen = frame[(frame["split"] == split) & (frame["target"] == target)]
            for i, (family, part) in enumerate(chosen.groupby("family")):
                place = [places.index(p) for p in map(tuple, part[["representation", "metric"]].to_numpy().tolist())]
                y = len(places) - 1 - np.array(place) + 0.12 * (1 - 2 * i)
                errors = plots.error_lengths(part["control"], part["control_lo"], part["control_hi"])
                axis.errorbar(part["control"], y, xerr=errors, fmt="|", color=plots.GREY, label="patch noise")
                axis.plot(part["gain"], y, "o", color=plots.PALETTE[i], label=str(family))
            axis.set_yticks(np.arange(len(places))[::-1], [f"{r} · {m}" for r, m in places])
            axis.axvline(0, color=plots.GREY, linestyle="--", linewidth=1)
            axis.set_title(f"{target}\n{split} folds", fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        figure.legend(list(shown.values()), list(shown), loc="outside upper right", ncols=len(shown))
        figure.supxlabel("R² of geometry + topology minus R² of geometry", fontsize=10)
        plots.save(figure, path)
