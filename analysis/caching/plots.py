"""Figures of the memory-caching study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis import plots
from analysis.multiplicity import ALPHA

_FOREST = (
    ("worth", "val_nll with caches less control\n(nats per token; below 0: caches help)"),
    ("moved", "change of openness in training"),
    ("gate", "change of openness, less that of base"),
)
_STATES = (("openness", "openness"), ("cache_mass", "share of gate mass on caches"), ("contribution", "contribution"))


def effect_figure(effects: pd.DataFrame, path: Path) -> None:
    """Forest plot: one row per arm, one panel per effect, 95% intervals; filled where Holm's test decides."""
    chosen = effects[~effects["planted"]].reset_index(drop=True)
    place = np.arange(len(chosen))[::-1]
    with plots.style():
        figure, axes = plots.panels(1, len(_FOREST), width=3.5, height=0.32 * len(chosen) + 0.8, sharex=False)
        for axis, (name, title) in zip(axes[0], _FOREST, strict=True):
            axis.axvline(0.0, color=plots.GREY, linewidth=1)
            for y, row in zip(place, chosen.to_dict("records"), strict=True):
                if not np.isfinite(row[name]):
                    continue
                decided = row[f"{name}_holm"] < ALPHA
                color = plots.PALETTE[1 if row[name] > 0 else 0] if decided else plots.GREY
                ends = plots.error_lengths([row[name]], [row[f"{name}_lo"]], [row[f"{name}_hi"]])
                face = color if decided else "white"
                axis.errorbar([row[name]], [y], xerr=ends, fmt="o", color=color, markerfacecolor=face)
            axis.set_xlabel(title)
        axes[0, 0].set_yticks(place, chosen["arm"])
        plots.save(figure, path)


def layer_figure(layers: pd.DataFrame, order: list[str], path: Path) -> None:
    """One row per arm, one mark per layer (mean over seeds), after training; hollow: before it.

    layers: columns arm, weights (start, ema), seed, layer, openness, cache_mass, contribution.
    """
    place = {name: y for y, name in enumerate(reversed(order))}
    means = layers.groupby(["arm", "weights", "layer"])[[name for name, _ in _STATES]].mean().reset_index()
    numbers = sorted(means["layer"].unique())
    with plots.style():
        figure, axes = plots.panels(1, len(_STATES), width=3.5, height=0.34 * len(order) + 0.8, sharex=False)
        for axis, (name, title) in zip(axes[0], _STATES, strict=True):
            for i, layer in enumerate(numbers):
                some = means[means["layer"] == layer]
                shift = 0.5 * (i / max(1, len(numbers) - 1) - 0.5)
                for weights, face in (("start", "none"), ("ema", plots.PALETTE[i % len(plots.PALETTE)])):
                    points = some[some["weights"] == weights]
                    y = [place[arm] - shift for arm in points["arm"]]
                    axis.plot(
                        points[name],
                        y,
                        plots.MARKERS[i % len(plots.MARKERS)],
                        color=plots.PALETTE[i % len(plots.PALETTE)],
                        markerfacecolor=face,
                    )
            axis.set_xlabel(title)
            if name == "contribution":
                axis.set_xscale("log")
            else:
                axis.set_xlim(-0.03, 1.03)
        axes[0, 0].set_yticks([place[name] for name in order], order)
        handles = [
            Line2D(
                [], [], marker=plots.MARKERS[i % len(plots.MARKERS)], linestyle="", label=f"layer {layer}",
                color=plots.PALETTE[i % len(plots.PALETTE)],
            )
            for i, layer in enumerate(numbers)
        ]  # fmt: skip
        handles.append(
            Line2D([], [], marker="o", linestyle="", color="k", markerfacecolor="none", label="at the start")
        )
        plots.legend_below(figure, handles)
        plots.save(figure, path)


def step_figure(curves: pd.DataFrame, arms: pd.DataFrame, metric: str, title: str, path: Path) -> None:
    """A panel a variable: the metric (mean over layers and seeds) over training steps, the base setting in grey.

    curves: columns arm, seed, layer, metric, step, value, of the averaged weights. arms: arm, variable, planted.
    """
    chosen = curves[curves["metric"] == metric].groupby(["arm", "step"])["value"].mean().reset_index()
    variables = [v for v in dict.fromkeys(arms.loc[~arms["planted"], "variable"]) if v]
    panels: list[tuple[str, list[str]]] = [
        (v, ["base", *arms.loc[(arms["variable"] == v) & ~arms["planted"], "arm"]]) for v in variables
    ]
    if arms["planted"].any():
        panels.append(("planted recall task", arms.loc[arms["planted"], "arm"].tolist()))
    with plots.style():
        figure, axes = plots.panel_each(len(panels), 4, width=2.7, height=2.3, sharex=False, sharey=False)
        for axis, (name, members) in zip(axes.ravel(), panels, strict=False):
            _lines(axis, chosen, members)
            axis.margins(y=0.35)  # room for the legend
            axis.set_title(name)
            axis.legend(fontsize=7.5, loc="best")
        plots.outer_labels(axes, "step", title)
        plots.save(figure, path)


def likelihood_figure(curves: pd.DataFrame, arms: pd.DataFrame, path: Path) -> None:
    """A panel a control: held-out NLL of the control (black) and of the arms that are compared with it.

    curves: columns arm, role (mc, control), seed, metric, step, value of the averaged weights. arms: arm, control (id).
    """
    chosen = curves[curves["metric"] == "val_nll"].groupby(["arm", "role", "step"])["value"].mean().reset_index()
    groups = list(arms.groupby("control", sort=False)["arm"].apply(list))
    with plots.style():
        figure, axes = plots.panel_each(len(groups), 3, width=3.4, height=2.8, sharex=False, sharey=False)
        for axis, members in zip(axes.ravel(), groups, strict=False):
            _lines(axis, chosen[chosen["role"] == "mc"], members)
            own = chosen[(chosen["role"] == "control") & (chosen["arm"] == members[0])].sort_values("step")
            axis.plot(own["step"], own["value"], color="k", linestyle="--", marker="x", label="control (no caches)")
            axis.legend(fontsize=7.5, loc="best")
        plots.outer_labels(axes, "step", "held-out NLL (nats per token)")
        plots.save(figure, path)


def _lines(axis: Axes, points: pd.DataFrame, members: list[str]) -> None:
    others = [name for name in members if name != "base"]
    for name in members:
        line = points[points["arm"] == name].sort_values("step")
        i = others.index(name) if name in others else 0
        color = plots.GREY if name == "base" else plots.PALETTE[i % len(plots.PALETTE)]
        axis.plot(line["step"], line["value"], color=color, marker=plots.MARKERS[i % len(plots.MARKERS)], label=name)
