"""The figures of the proxy-gap report, one function a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from analysis import published
from analysis.cells import depths_of, models_of, tokens_label
from analysis.plots import (
    GREY,
    MARKERS,
    PALETTE,
    dodge,
    error_lengths,
    legend_below,
    log2_ticks,
    outer_labels,
    panels,
    save,
    style,
)

_K_LABEL = "k (active features a token)"


@dataclass(frozen=True)
class PlotData:
    """What figures read: cells, means over seeds, model deltas, leaderboard table and layer geometry."""

    cells: pd.DataFrame
    means: pd.DataFrame
    deltas: pd.DataFrame
    board: pd.DataFrame
    geometry: pd.DataFrame
    published: bool

    @property
    def models(self) -> list[str]:
        return models_of(self.cells)

    @property
    def depths(self) -> list[str]:
        return depths_of(self.cells)

    @property
    def budgets(self) -> list[int]:
        return sorted(self.cells["tokens"].unique())

    @property
    def ks(self) -> list[int]:
        return sorted(self.cells["k"].unique())

    def color(self, model: str) -> str:
        names = [*self.models, *(m for m in self.geometry["model"].unique() if m not in self.models)]
        return PALETTE[names.index(model) % len(PALETTE)]

    def model_handles(self, **line: object) -> list[Line2D]:
        return [Line2D([], [], color=self.color(m), label=m, **({"marker": "o"} | line)) for m in self.models]  # type: ignore[arg-type]

    def curves(self, depth: str, tokens: int | None = None) -> Iterator[tuple[str, pd.DataFrame]]:
        """Each model's means at a depth (and budget), sorted by k."""
        for model in self.models:
            part = self.means[(self.means["model"] == model) & (self.means["depth"] == depth)]
            if tokens is not None:
                part = part[part["tokens"] == tokens]
            if len(part):
                yield model, part.sort_values(["tokens", "k"])


def _grid(data: PlotData, x: str, y: str) -> tuple[Figure, Iterator[tuple[Axes, str, int]]]:
    """Budgets down, depths across; titles name both."""
    figure, axes = panels(len(data.budgets), len(data.depths))
    outer_labels(axes, x, y)

    def walk() -> Iterator[tuple[Axes, str, int]]:
        for i, tokens in enumerate(data.budgets):
            for j, depth in enumerate(data.depths):
                axes[i, j].set_title(f"{depth}, {tokens_label(tokens)} tokens")
                yield axes[i, j], depth, tokens

    return figure, walk()


def r2_vs_ce(data: PlotData) -> Figure:
    """R² against CE_rec; grey lines join the models at equal k: a fall to the right is a misranking."""
    figure, walk = _grid(data, "R² of the reconstruction", "CE_rec = 2 − L_recon / L_orig")
    for axis, depth, tokens in walk:
        part = data.means[(data.means["depth"] == depth) & (data.means["tokens"] == tokens)]
        for _, same_k in part.sort_values("d_model").groupby("k"):
            axis.plot(same_k["r2"], same_k["ce_rec"], color=GREY, linewidth=0.9, zorder=1)
        for model, curve in data.curves(depth, tokens):
            axis.plot(curve["r2"], curve["ce_rec"], color=data.color(model), alpha=0.45, zorder=2)
            for k, r2, ce_rec in zip(curve["k"], curve["r2"], curve["ce_rec"], strict=True):
                marker = MARKERS[data.ks.index(k) % len(MARKERS)]
                axis.plot(r2, ce_rec, marker, color=data.color(model), zorder=3)
    handles = data.model_handles(marker="")
    handles += [
        Line2D([], [], color=GREY, marker=MARKERS[i % len(MARKERS)], linestyle="", label=f"k = {k}")
        for i, k in enumerate(data.ks)
    ]
    if len(data.models) > 1:
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="equal k"))
    legend_below(figure, handles)
    return figure


def ce_vs_k(data: PlotData) -> Figure:
    """CE_rec against k with 95% intervals; faint points are single seeds."""
    figure, walk = _grid(data, _K_LABEL, "CE_rec, 95% CI")
    several = bool((data.means["n_seeds"] > 1).any())
    for axis, depth, tokens in walk:
        for target in published.K_STAR_TARGETS:
            axis.axhline(target, color=GREY, linewidth=0.9, linestyle=":")
        for i, (model, curve) in enumerate(data.curves(depth, tokens)):
            shift = dodge(data.ks, i, len(data.models))
            error = error_lengths(curve["ce_rec"], curve["ce_rec_lo"], curve["ce_rec_hi"])
            axis.errorbar(curve["k"] * shift, curve["ce_rec"], error, color=data.color(model), marker="o")
            if several:
                same = (data.cells["model"] == model) & (data.cells["depth"] == depth)
                single = data.cells[same & (data.cells["tokens"] == tokens)]
                axis.plot(single["k"] * shift, single["ce_rec"], ".", color=data.color(model), alpha=0.35, zorder=1)
        log2_ticks(axis, data.ks)
    targets = " and ".join(f"{t:.2f}" for t in published.K_STAR_TARGETS)
    handles = [*data.model_handles(), Line2D([], [], color=GREY, linestyle=":", label=f"k* targets {targets}")]
    if several:
        handles.append(Line2D([], [], color=GREY, marker=".", linestyle="", label="single seeds"))
    legend_below(figure, handles)
    return figure


def delta(data: PlotData) -> Figure | None:
    """ΔR² and ΔCE_rec of the widest minus the narrowest model, by k and budget; None without two models."""
    if data.deltas.empty:
        return None
    depths = [d for d in data.depths if (data.deltas["depth"] == d).any()]
    figure, axes = panels(2, len(depths), sharey=False)
    labels = {"delta_r2": "ΔR²", "delta_ce_rec": "ΔCE_rec"}
    for row, metric in zip(axes, labels, strict=True):
        for axis, depth in zip(row, depths, strict=True):
            axis.axhline(0, color="black", linewidth=0.9)
            for i, tokens in enumerate(data.budgets):
                part = data.deltas[(data.deltas["depth"] == depth) & (data.deltas["tokens"] == tokens)]
                if part.empty:
                    continue
                error = error_lengths(part[metric], part[f"{metric}_lo"], part[f"{metric}_hi"])
                shift = dodge(data.ks, i, len(data.budgets))
                axis.errorbar(
                    part["k"] * shift,
                    part[metric],
                    error,
                    color=PALETTE[i % len(PALETTE)],
                    marker=MARKERS[i % len(MARKERS)],
                )
            if data.published:
                index = 0 if metric == "delta_r2" else 1
                known = [(k, v[index]) for (d, k, t), v in published.DELTA.items() if d == depth and t in data.budgets]
                known = [point for point in known if point[0] in data.ks]
                if known:
                    axis.plot(*zip(*known, strict=True), "x", color="black", markersize=7, zorder=4)
            log2_ticks(axis, data.ks)
            axis.set_title(depth)
        low = min(axis.get_ylim()[0] for axis in row)
        high = max(axis.get_ylim()[1] for axis in row)
        for axis in row:
            axis.set_ylim(low, high)
    pair = data.deltas.iloc[0]
    outer_labels(axes, _K_LABEL, [f"{label}, 95% CI" for label in labels.values()])
    figure.suptitle(f"{pair['large']} minus {pair['small']}")
    handles = [
        Line2D(
            [], [], color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], label=f"{tokens_label(t)} tokens"
        )
        for i, t in enumerate(data.budgets)
    ]
    if data.published:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", label="published (10M tokens)"))
    legend_below(figure, handles)
    return figure


def participation_ratio(data: PlotData) -> Figure | None:
    """PR of every layer, raw and with the top eigenvector removed; rings mark hooked layers."""
    if data.geometry.empty:
        return None
    figure, axes = panels(1, 2, width=4.6, height=3.4, sharey=False)
    hooked = set(zip(data.cells["model"], data.cells["layer"], strict=True))
    names = list(data.geometry["model"].drop_duplicates())
    for model in names:
        part = data.geometry[data.geometry["model"] == model].sort_values("layer")
        rings = np.array([(model, layer) in hooked for layer in part["layer"]])
        for axis, scale in zip(axes[0], (1.0, part["d_model"].to_numpy(float)), strict=True):
            for column, dash in (("pr", "-"), ("pr_deflated", "--")):
                axis.plot(part["layer"], part[column] / scale, dash, color=data.color(model), marker=".", markersize=4)
                axis.plot(
                    part["layer"][rings],
                    (part[column] / scale)[rings],
                    "o",
                    markersize=9,
                    markerfacecolor="none",
                    color=data.color(model),
                )
    for axis, title in zip(axes[0], ("participation ratio (dimensions)", "participation ratio / d_model"), strict=True):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(title)
        axis.set_xlabel("layer (residual stream after the block)")
        axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    handles = [Line2D([], [], color=data.color(m), label=m) for m in names]
    handles += [
        Line2D([], [], color=GREY, label="raw"),
        Line2D([], [], color=GREY, linestyle="--", label="top eigenvector removed"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="", markersize=9, label="hooked"),
    ]
    legend_below(figure, handles)
    return figure


def leaderboard(data: PlotData) -> Figure | None:
    """Correlation of each proxy with CE_rec, bars with 95% intervals; None without a leaderboard."""
    board = data.board[data.board["scope"] == "all cells"] if len(data.board) else data.board
    if board.empty:
        return None
    relations, statistics = list(board["relation"].unique()), list(board["statistic"].unique())
    labels = list(board[["proxy", "label"]].drop_duplicates().sort_values("proxy", key=_proxy_order)["label"])
    figure, axes = panels(len(relations), len(statistics), width=4.6, height=0.42 * len(labels) + 0.9)
    for row, relation in zip(axes, relations, strict=True):
        for axis, statistic in zip(row, statistics, strict=True):
            part = board[(board["relation"] == relation) & (board["statistic"] == statistic)]
            part = part.set_index("label").loc[labels]
            colors = [PALETTE[1] if proxy == "r2" else PALETTE[0] for proxy in part["proxy"]]
            place = np.arange(len(labels))[::-1]
            error = error_lengths(part["value"], part["lo"], part["hi"])
            axis.barh(place, part["value"].fillna(0.0), color=colors, height=0.62)
            axis.errorbar(part["value"].fillna(0.0), place, xerr=error, fmt="none", ecolor="black", elinewidth=1.1)
            for y, undefined in zip(place, part["value"].isna(), strict=True):
                if undefined:
                    axis.text(0.03, y, "undefined", va="center", color=GREY, fontsize=9)
            axis.axvline(0, color="black", linewidth=0.9)
            axis.set_yticks(place, labels)
            axis.set_xlim(-1.05, 1.05)
            axis.set_xticks([-1, -0.5, 0, 0.5, 1])
            axis.grid(axis="y", visible=False)
            axis.set_title(f"{statistic.capitalize()}, {relation}")
    figure.supxlabel("correlation with CE_rec over all cells, 95% CI (cells, seeds and sequences)", fontsize=10)
    return figure


def _proxy_order(names: pd.Series) -> pd.Series:
    return names.map(lambda name: (name != "r2", name))


def rate_distortion(data: PlotData) -> Figure:
    """Distortion against bits a token at the largest budget: unexplained variance, and the relative loss rise."""
    tokens = data.budgets[-1]
    figure, axes = panels(2, len(data.depths), sharey=False)
    for row, metric in zip(axes, ("r2", "ce_rec"), strict=True):
        for axis, depth in zip(row, data.depths, strict=True):
            for model, curve in data.curves(depth, tokens):
                for rate, dash in (("rate_bits", "-"), ("rate_bits_entropy", "--")):
                    ordered = curve.sort_values(rate)
                    marker = "o" if dash == "-" else "."
                    axis.plot(ordered[rate], 1 - ordered[metric], dash, color=data.color(model), marker=marker)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{depth}, {tokens_label(tokens)} tokens")
        _share_log_limits(row)
    _plain_log_ticks(axes)
    outer_labels(axes, "rate (bits a token)", ("1 − R²", "1 − CE_rec"))
    handles = data.model_handles(marker="")
    handles += [
        Line2D([], [], color=GREY, marker="o", label="uniform bound: log2 C(d_sae, k) + 8k"),
        Line2D([], [], color=GREY, marker=".", linestyle="--", label="entropy-coded indices + 8k"),
    ]
    legend_below(figure, handles)
    return figure


def _share_log_limits(row: Sequence[Axes]) -> None:
    low, high = min(axis.get_ylim()[0] for axis in row), max(axis.get_ylim()[1] for axis in row)
    for axis in row:
        axis.set_ylim(low, high)


def _plain_log_ticks(axes: np.ndarray) -> None:
    """1-2-5 ticks as plain numbers on at least half a decade: 10^n labels are too few on such short axes."""
    for axis in axes.ravel():
        for get, put in ((axis.get_xlim, axis.set_xlim), (axis.get_ylim, axis.set_ylim)):
            low, high = get()
            widen = max(1.0, math.sqrt(10**0.5 * low / high))
            put(low / widen, high * widen)
    steps = [m * 10.0**e for e in range(-5, 7) for m in (1, 2, 5)]
    for axis in axes.ravel():
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(FixedLocator(steps))
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def alive(data: PlotData) -> Figure:
    """Share of features that fire on the evaluation set, against k."""
    figure, walk = _grid(data, _K_LABEL, "features alive")
    for axis, depth, tokens in walk:
        for model, curve in data.curves(depth, tokens):
            axis.plot(curve["k"], curve["alive"], color=data.color(model), marker="o")
        log2_ticks(axis, data.ks)
        axis.set_ylim(0, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    legend_below(figure, data.model_handles())
    return figure


def budget(data: PlotData) -> Figure | None:
    """CE_rec against the training budget, one panel a depth and k; None with a single budget."""
    if len(data.budgets) < 2:
        return None
    figure, axes = panels(len(data.depths), len(data.ks), width=2.3, height=2.1)
    for row, depth in zip(axes, data.depths, strict=True):
        for axis, k in zip(row, data.ks, strict=True):
            for model, curve in data.curves(depth):
                part = curve[curve["k"] == k]
                error = error_lengths(part["ce_rec"], part["ce_rec_lo"], part["ce_rec_hi"])
                axis.errorbar(part["tokens"], part["ce_rec"], error, color=data.color(model), marker="o", markersize=4)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(data.budgets))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(value)))
            axis.set_xlim(data.budgets[0] / 1.4, data.budgets[-1] * 1.4)
            axis.set_title(f"{depth}, k = {k}")
    outer_labels(axes, "training tokens", "CE_rec, 95% CI")
    legend_below(figure, data.model_handles())
    return figure


FIGURES: dict[str, tuple[str, Callable[[PlotData], Figure | None]]] = {
    "r2_vs_ce_rec.png": ("R² against CE_rec, by depth and model", r2_vs_ce),
    "ce_rec_vs_k.png": ("CE_rec against k", ce_vs_k),
    "delta.png": ("Widest minus narrowest model", delta),
    "budget.png": ("CE_rec against the training budget", budget),
    "leaderboard.png": ("Proxy leaderboard", leaderboard),
    "participation_ratio.png": ("Participation ratio by layer", participation_ratio),
    "rate_distortion.png": ("Rate-distortion curves", rate_distortion),
    "alive.png": ("Features alive", alive),
}


def write_figures(data: PlotData, out: Path) -> dict[str, str]:
    """Write the figures that the data can fill, remove those it cannot; returns file name → caption."""
    written = {}
    with style():
        for name, (caption, draw) in FIGURES.items():
            figure = draw(data)
            if figure is None:
                (out / name).unlink(missing_ok=True)
            else:
                save(figure, out / name)
                written[name] = caption
    return written
