"""House style for figures: one palette, readable sizes, deterministic files, no global matplotlib state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Okabe & Ito's palette, safe for colour-blind readers; yellow is left out, being too light on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#7A7A7A"

_STYLE: Any = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "errorbar.capsize": 2.5,
    "figure.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
}


def style() -> AbstractContextManager[None]:
    """Context in which figures take the house style."""
    return matplotlib.rc_context(_STYLE)


def panels(
    rows: int,
    columns: int,
    *,
    width: float = 3.4,
    height: float = 2.9,
    sharex: bool | Literal["row"] = True,
    sharey: bool | Literal["row"] = True,
) -> tuple[Figure, np.ndarray]:
    """A figure of rows × columns axes (a 2-D array), each about width × height inches; "row" shares within rows."""
    size = (max(width * columns, 5.2) + 0.4, height * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    return figure, axes


def panel_each(count: int, columns: int, **options: Any) -> tuple[Figure, np.ndarray]:
    """`panels` for `count` items in rows of at most `columns`; the axes that are left over are hidden."""
    columns = min(columns, count)
    figure, axes = panels(-(-count // columns), columns, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def outer_labels(axes: np.ndarray, x: str, y: str | Sequence[str]) -> None:
    """Label the bottom row's x axes, and each row's first y axis, with one text for all rows or one per row."""
    for axis in axes[-1]:
        axis.set_xlabel(x)
    for axis, text in zip(axes[:, 0], [y] * len(axes) if isinstance(y, str) else y, strict=True):
        axis.set_ylabel(text)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend under all panels, read row by row and wrapped to the figure's width."""
    widest = max(len(str(handle.get_label())) for handle in handles) * 0.085 + 0.65
    columns = min(len(handles), max(1, int(figure.get_figwidth() / widest)))
    # matplotlib fills columns first
    by_row = [handle for column in range(columns) for handle in handles[column::columns]]
    figure.legend(handles=by_row, loc="outside lower center", ncols=columns)


def log2_ticks(axis: Axes, values: Sequence[float]) -> None:
    """A base-2 logarithmic x axis with exactly the given ticks, printed as plain numbers."""
    log_ticks(axis, values, base=2)
    if len(values) == 1:
        axis.set_xlim(values[0] / 2, values[0] * 2)


def log_ticks(axis: Axes, values: Sequence[float], base: float = 10) -> None:
    """A logarithmic x axis with exactly the given ticks, printed as plain numbers."""
    axis.set_xscale("log", base=base)
    axis.xaxis.set_major_locator(FixedLocator(list(values)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def dodge(values: Sequence[float], position: int, count: int) -> float:
    """Factor that shifts series `position` of `count` sideways on a log axis, so that error bars do not overlap."""
    span = max(1.0, np.log2(max(values) / min(values)))
    return float(2 ** (0.02 * span * (position - (count - 1) / 2)))


def error_lengths(value: npt.ArrayLike, lo: npt.ArrayLike, hi: npt.ArrayLike) -> np.ndarray:
    """Matplotlib's (2, n) error lengths from interval limits, never negative."""
    centre, low, high = (np.asarray(x, dtype=float) for x in (value, lo, hi))
    return np.nan_to_num(np.maximum(np.stack([centre - low, high - centre]), 0.0))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG whose bytes depend on the figure alone (no software or date stamp)."""
    figure.savefig(path, metadata={"Software": None})
    return path
