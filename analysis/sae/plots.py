"""The figures of the proxy-gap report, one function a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

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
from analysis.sae import published
from analysis.sae.cells import tokens_label
from analysis.sae.measured import Study
from analysis.sae.rungs import cost_of

_K_LABEL = "k (active features a token)"


def _color(study: Study, model: str) -> str:
    names = [*study.models, *(m for m in study.geometry["model"].unique() if m not in study.models)]
    return PALETTE[names.index(model) % len(PALETTE)]


def _model_handles(study: Study, marker: str = "o") -> list[Line2D]:
    return [Line2D([], [], color=_color(study, m), label=m, marker=marker) for m in study.models]


def _curves(study: Study, depth: str, **where: object) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each model's means at a depth (and budget), sorted by budget and k."""
    for model in study.models:
        part = study.means_at(model=model, depth=depth, **where)
        if len(part):
            yield model, part.sort_values(["tokens", "k"])


def _grid(
    study: Study, x: str, y: str, share: bool | Literal["row"] = True
) -> tuple[Figure, Iterator[tuple[Axes, str, int]]]:
    """Budgets down, depths across; titles name both."""
    figure, axes = panels(len(study.budgets), len(study.depths), sharex=share, sharey=share)
    outer_labels(axes, x, y)

    def walk() -> Iterator[tuple[Axes, str, int]]:
        for i, tokens in enumerate(study.budgets):
            for j, depth in enumerate(study.depths):
                axes[i, j].set_title(f"{depth}, {tokens_label(tokens)} tokens")
                yield axes[i, j], depth, tokens

    return figure, walk()


def r2_vs_ce(study: Study, column: str = "r2", label: str = "R² of the reconstruction") -> Figure | None:
    """R² against CE_rec; grey lines join the models at equal k: a fall to the right is a misranking.

    Axes are shared within a budget alone: the smallest budget's SAEs may lie far from those trained longest. None where
    no cell has the column.
    """
    if study.means[column].isna().all():
        return None
    figure, walk = _grid(study, label, "CE_rec = 2 − L_recon / L_orig", share="row")
    for axis, depth, tokens in walk:
        axis.ticklabel_format(useOffset=False)
        part = study.means_at(depth=depth, tokens=tokens)
        for _, same_k in part.sort_values("d_model").groupby("k"):
            axis.plot(same_k[column], same_k["ce_rec"], color=GREY, linewidth=0.9, zorder=1)
        for model, curve in _curves(study, depth, tokens=tokens):
            axis.plot(curve[column], curve["ce_rec"], color=_color(study, model), alpha=0.45, zorder=2)
            for k, r2, ce_rec in zip(curve["k"], curve[column], curve["ce_rec"], strict=True):
                marker = MARKERS[study.ks.index(k) % len(MARKERS)]
                axis.plot(r2, ce_rec, marker, color=_color(study, model), zorder=3)
    handles = _model_handles(study, marker="")
    handles += [
        Line2D([], [], color=GREY, marker=MARKERS[i % len(MARKERS)], linestyle="", label=f"k = {k}")
        for i, k in enumerate(study.ks)
    ]
    if len(study.models) > 1:
        handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="equal k"))
    legend_below(figure, handles)
    return figure


def r2_no_sinks_vs_ce(study: Study) -> Figure | None:
    """`r2_vs_ce` with the sinks left out of both sums of R²."""
    return r2_vs_ce(study, "r2_no_sinks", "R² without sinks")


def ce_vs_k(study: Study) -> Figure:
    """CE_rec against k with 95% intervals where the data support one; faint points are single seeds."""
    figure, walk = _grid(study, _K_LABEL, "CE_rec, 95% CI")
    several = bool((study.means["n_seeds"] > 1).any())
    for axis, depth, tokens in walk:
        for target in published.K_STAR_TARGETS:
            axis.axhline(target, color=GREY, linewidth=0.9, linestyle=":")
        for i, (model, curve) in enumerate(_curves(study, depth, tokens=tokens)):
            shift = dodge(study.ks, i, len(study.models))
            error = error_lengths(curve["ce_rec"], curve["ce_rec_lo"], curve["ce_rec_hi"])
            axis.errorbar(curve["k"] * shift, curve["ce_rec"], error, color=_color(study, model), marker="o")
            if several:
                same = (study.cells["model"] == model) & (study.cells["depth"] == depth)
                single = study.cells[same & (study.cells["tokens"] == tokens)]
                axis.plot(single["k"] * shift, single["ce_rec"], ".", color=_color(study, model), alpha=0.35, zorder=1)
        log2_ticks(axis, study.ks)
    targets = " and ".join(f"{t:.2f}" for t in published.K_STAR_TARGETS)
    handles = [*_model_handles(study), Line2D([], [], color=GREY, linestyle=":", label=f"k* targets {targets}")]
    if several:
        handles.append(Line2D([], [], color=GREY, marker=".", linestyle="", label="single seeds"))
    legend_below(figure, handles)
    return figure


def delta(study: Study) -> Figure | None:
    """ΔR² and ΔCE_rec of the widest minus the narrowest model, by k and budget; None without two models."""
    if study.deltas.empty:
        return None
    depths = [d for d in study.depths if (study.deltas["depth"] == d).any()]
    small, large = study.deltas["small"].iloc[0], study.deltas["large"].iloc[0]
    compare = study.is_study_pair(small, large) and published.TEN in study.budgets
    figure, axes = panels(2, len(depths), sharey=False)
    looks = [(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i in range(len(study.budgets))]
    for row, position, metric in zip(axes, (0, 1), ("delta_r2", "delta_ce_rec"), strict=True):
        for axis, depth in zip(row, depths, strict=True):
            axis.axhline(0, color="black", linewidth=0.9)
            for i, (tokens, (color, marker)) in enumerate(zip(study.budgets, looks, strict=True)):
                part = study.deltas[(study.deltas["depth"] == depth) & (study.deltas["tokens"] == tokens)]
                error = error_lengths(part[metric], part[f"{metric}_lo"], part[f"{metric}_hi"])
                k = part["k"] * dodge(study.ks, i, len(study.budgets))
                axis.errorbar(k, part[metric], error, color=color, marker=marker)
            if compare:
                known = {
                    k: v[position] for (d, k, t), v in published.DELTA.items() if d == depth and t in study.budgets
                }
                known = {k: v for k, v in known.items() if k in study.ks}
                axis.plot(list(known), list(known.values()), "x", color="black", markersize=7, zorder=4)
            log2_ticks(axis, study.ks)
            axis.set_title(depth)
        _share_limits(row)
    outer_labels(axes, _K_LABEL, ("ΔR², 95% CI", "ΔCE_rec, 95% CI"))
    figure.suptitle(f"{large} minus {small}")
    handles = [
        Line2D([], [], color=color, marker=marker, label=f"{tokens_label(tokens)} tokens")
        for tokens, (color, marker) in zip(study.budgets, looks, strict=True)
    ]
    if compare:
        handles.append(Line2D([], [], color="black", marker="x", linestyle="", label="published (10M tokens)"))
    legend_below(figure, handles)
    return figure


def _share_limits(row: Sequence[Axes]) -> None:
    low, high = min(axis.get_ylim()[0] for axis in row), max(axis.get_ylim()[1] for axis in row)
    for axis in row:
        axis.set_ylim(low, high)


def participation_ratio(study: Study) -> Figure | None:
    """PR of every layer, raw and with the top eigenvector removed; rings mark hooked layers."""
    if study.geometry.empty:
        return None
    figure, axes = panels(1, 2, width=4.6, height=3.4, sharey=False)
    hooked = set(zip(study.cells["model"], study.cells["layer"], strict=True))
    names = list(study.geometry["model"].drop_duplicates())
    for model in names:
        part = study.geometry[study.geometry["model"] == model].sort_values("layer")
        layer, d_model = part["layer"].to_numpy(), part["d_model"].to_numpy(float)
        ring = np.array([(model, x) in hooked for x in layer])
        color = _color(study, model)
        for column, dash in (("pr", "-"), ("pr_deflated", "--"), ("pr_no_sinks", ":")):
            for axis, value in zip(axes[0], (part[column].to_numpy(), part[column].to_numpy() / d_model), strict=True):
                axis.plot(layer, value, dash, color=color, marker=".", markersize=4)
                axis.plot(layer[ring], value[ring], "o", markersize=9, markerfacecolor="none", color=color)
    for axis, title in zip(axes[0], ("participation ratio (dimensions)", "participation ratio / d_model"), strict=True):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(title)
        axis.set_xlabel("layer (residual stream after the block)")
        axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    handles = [Line2D([], [], color=_color(study, m), label=m) for m in names]
    handles += [
        Line2D([], [], color=GREY, label="raw"),
        Line2D([], [], color=GREY, linestyle="--", label="top eigenvector removed"),
        Line2D([], [], color=GREY, linestyle=":", label="sinks removed"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="", markersize=9, label="hooked"),
    ]
    legend_below(figure, handles)
    return figure


def leaderboard(study: Study) -> Figure | None:
    """Correlation of each proxy with CE_rec, bars, rank correlations with 95% intervals; None without a leaderboard."""
    board = study.board.table
    board = board[board["scope"] == "all cells"]
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
    figure.supxlabel("correlation with CE_rec over all cells; 95% CI of rank correlations", fontsize=10)
    return figure


def cost(study: Study) -> Figure | None:
    """Rank correlation of each proxy with CE_rec against what it costs per SAE; None where no cost was measured."""
    board = study.board.table
    board = board[(board["scope"] == "all cells") & (board["statistic"] == "spearman")]
    if board.empty or study.costs.empty:
        return None
    saes = len(study.cells) / len(study.models)
    passes = {name: cost_of(name, study.costs).each(saes) for name in board["proxy"].unique()}
    relations = list(board["relation"].unique())
    names = sorted(passes, key=lambda name: (not np.isfinite(passes[name]), passes[name], name))
    figure, axes = panels(1, len(relations), width=4.6, height=3.6)
    for axis, relation in zip(axes[0], relations, strict=True):
        part = board[board["relation"] == relation].set_index("proxy")
        for i, name in enumerate(names):
            row = part.loc[name]
            error = error_lengths(*(np.array([row[c]], float) for c in ("value", "lo", "hi")))
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i // len(PALETTE) % len(MARKERS)]}
            axis.errorbar([passes[name]], [row["value"]], error, linestyle="", label=row["label"], **look)
        axis.set_xscale("symlog", linthresh=0.1)  # many cost next to nothing
        axis.xaxis.set_major_locator(FixedLocator([0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_ylim(-1.05, 1.05)
        axis.axhline(0, color="black", linewidth=0.9)
        axis.set_title(relation)
    outer_labels(axes, "forward passes per SAE", "Spearman with CE_rec, 95% CI")
    legend_below(figure, axes[0, 0].get_legend_handles_labels()[0])
    return figure


def _proxy_order(names: pd.Series) -> pd.Series:
    return names.map(lambda name: (name != "r2", name))


def rate_distortion(study: Study) -> Figure:
    """Distortion against bits per token at the largest budget: unexplained variance, and the relative loss rise."""
    tokens = study.budgets[-1]
    figure, axes = panels(2, len(study.depths), sharey=False)
    for row, metric in zip(axes, ("r2", "ce_rec"), strict=True):
        for axis, depth in zip(row, study.depths, strict=True):
            for model, curve in _curves(study, depth, tokens=tokens):
                for rate, dash in (("rate_bits", "-"), ("rate_bits_entropy", "--")):
                    ordered = curve.sort_values(rate)
                    marker = "o" if dash == "-" else "."
                    distortion = (1 - ordered[metric]).where(ordered[metric] < 1)  # none on a log axis
                    axis.plot(ordered[rate], distortion, dash, color=_color(study, model), marker=marker)
            if not any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in axis.lines):
                axis.set_ylim(0.01, 1)
                axis.text(0.5, 0.5, "no loss: 1 or above", transform=axis.transAxes, ha="center", color=GREY)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{depth}, {tokens_label(tokens)} tokens")
        _share_limits(row)
    _plain_log_ticks(axes)
    outer_labels(axes, "rate (bits a token)", ("1 − R²", "1 − CE_rec"))
    handles = _model_handles(study, marker="")
    handles += [
        Line2D([], [], color=GREY, marker="o", label="uniform bound: log2 C(d_sae, k) + 8k"),
        Line2D([], [], color=GREY, marker=".", linestyle="--", label="entropy-coded indices + 8k"),
    ]
    legend_below(figure, handles)
    return figure


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


def alive(study: Study) -> Figure:
    """Share of features that fire on the evaluation set, against k."""
    figure, walk = _grid(study, _K_LABEL, "features alive")
    for axis, depth, tokens in walk:
        for model, curve in _curves(study, depth, tokens=tokens):
            axis.plot(curve["k"], curve["alive"], color=_color(study, model), marker="o")
        log2_ticks(axis, study.ks)
        axis.set_ylim(0, 1.03)
        axis.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    legend_below(figure, _model_handles(study))
    return figure


def budget(study: Study) -> Figure | None:
    """CE_rec and R² against the training budget, a column for each k; None with a single budget.

    Two rows for each depth; R² without sinks is dashed and has no interval.
    """
    if len(study.budgets) < 2:
        return None
    figure, axes = panels(2 * len(study.depths), len(study.ks), width=2.3, height=2.1, sharey="row")
    for i, depth in enumerate(study.depths):
        for j, k in enumerate(study.ks):
            above, below = axes[2 * i, j], axes[2 * i + 1, j]
            above.set_title(f"{depth}, k = {k}")
            for model, curve in _curves(study, depth):
                part = curve[curve["k"] == k]
                for axis, metric in ((above, "ce_rec"), (below, "r2")):
                    error = error_lengths(part[metric], part[f"{metric}_lo"], part[f"{metric}_hi"])
                    look = {"color": _color(study, model), "marker": "o", "markersize": 4}
                    axis.errorbar(part["tokens"], part[metric], error, **look)
                below.plot(part["tokens"], part["r2_no_sinks"], "--", color=_color(study, model), linewidth=1.2)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(study.budgets))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_label(value)))
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_xlim(study.budgets[0] / 1.4, study.budgets[-1] * 1.4)
    outer_labels(axes, "training tokens", ["CE_rec, 95% CI", "R², 95% CI"] * len(study.depths))
    without = Line2D([], [], color=GREY, linestyle="--", label="R² without sinks")
    legend_below(figure, [*_model_handles(study), without])
    return figure


FIGURES: dict[str, tuple[str, Callable[[Study], Figure | None]]] = {
    "r2_vs_ce_rec.png": ("R² against CE_rec, by depth and model", r2_vs_ce),
    "r2_no_sinks_vs_ce_rec.png": ("R² without sinks against CE_rec", r2_no_sinks_vs_ce),
    "ce_rec_vs_k.png": ("CE_rec against k", ce_vs_k),
    "delta.png": ("Widest minus narrowest model", delta),
    "budget.png": ("CE_rec and R² against the training budget", budget),
    "leaderboard.png": ("Proxy leaderboard", leaderboard),
    "cost.png": ("Rank correlation with CE_rec against the cost of the proxy", cost),
    "participation_ratio.png": ("Participation ratio by layer", participation_ratio),
    "rate_distortion.png": ("Rate-distortion curves", rate_distortion),
    "alive.png": ("Features alive", alive),
}


def write_figures(study: Study, out: Path) -> dict[str, str]:
    """Write the figures that the study can fill, remove those it cannot; returns file name → caption."""
    written = {}
    with style():
        for name, (caption, draw) in FIGURES.items():
            figure = draw(study)
            if figure is None:
                (out / name).unlink(missing_ok=True)
            else:
                save(figure, out / name)
                written[name] = caption
    return written
