"""Figures of a search: progress, slices, contours, parallel coordinates and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.tri import Triangulation

from analysis.plots import GREY, MARKERS, PALETTE, panel_each, panels, save, style
from analysis.search.trials import Axis, Goal, StudyTable

_MAP = "viridis_r"  # dark: a small loss


def progress(studies: Sequence[StudyTable], goal: Goal, out: Path) -> Path:
    """Every trial's value and the best so far, against the number of trials, a colour per study."""
    with style():
        figure, ((axis,),) = panels(1, 1, width=6.4, height=3.4)
        for i, study in enumerate(studies):
            colour = PALETTE[i % len(PALETTE)]
            x = np.arange(1, len(study.trials) + 1)
            state = study.trials["state"].to_numpy()
            values = study.trials[goal.column].to_numpy(dtype=float)
            done = state == "done"
            axis.plot(x[done], values[done], MARKERS[i % len(MARKERS)], color=colour, alpha=0.45)
            axis.step(x, study.best_so_far(goal), where="post", color=colour, label=study.group or "best so far")
            for place in x[state == "failed"]:
                axis.axvline(place, color=GREY, lw=0.6, ls=":")
        axis.set_xlabel("trials")
        axis.set_ylabel(f"{goal.column} ({goal.direction})")
        axis.legend()
        return save(figure, out)


def slices(study: StudyTable, axes: Sequence[Axis], goal: Goal, out: Path) -> Path:
    """The goal against each field, a panel per field; darker points were tried later, the best is ringed."""
    done = _done(study)
    with style():
        figure, grid = panel_each(len(axes), 3, sharex=False, sharey=True)
        best = study.best([goal])
        for panel, axis in zip(grid.flat, axes, strict=False):
            y = done[goal.column]
            panel.scatter(_place(axis, done[axis.field]), y, c=done["trial"], cmap="Blues", ec=GREY, lw=0.4, vmin=-5)
            if best is not None:
                x = _place(axis, pd.Series([best[axis.field]]))
                panel.plot(x, [best[goal.column]], "o", mfc="none", mec=PALETTE[1], ms=11, mew=1.6)
            _scale(panel, axis, "x")
            panel.set_xlabel(axis.field)
        for row in grid:
            row[0].set_ylabel(f"{goal.column} ({goal.direction})")
        return save(figure, out)


def contour(study: StudyTable, pair: tuple[Axis, Axis], goal: Goal, out: Path) -> Path | None:
    """The goal over two fields, interpolated linearly between the trials; None where they lie on one line."""
    done = _done(study)
    x, y = pair[0].unit(done[pair[0].field]), pair[1].unit(done[pair[1].field])
    means = pd.DataFrame({"x": x, "y": y, "z": done[goal.column].to_numpy(dtype=float)}).groupby(["x", "y"]).mean()
    places = means.index.to_frame().to_numpy(dtype=float)
    if len(places) < 4 or np.linalg.matrix_rank(places - places[0], tol=1e-6) < 2:
        return None
    with style():
        figure, ((panel,),) = panels(1, 1, width=5.0, height=3.8)
        net = Triangulation(*_raw(pair, places))
        filled = panel.tricontourf(net, means["z"].to_numpy(), levels=12, cmap=_colours(goal))
        panel.plot(*_raw(pair, places), "o", color="white", mec="black", ms=4)
        for axis, which in zip(pair, "xy", strict=True):
            _scale(panel, axis, which)
        panel.set_xlabel(pair[0].field)
        panel.set_ylabel(pair[1].field)
        figure.colorbar(filled, ax=panel, label=f"{goal.column} ({goal.direction})")
        return save(figure, out)


def parallel(study: StudyTable, axes: Sequence[Axis], goal: Goal, out: Path) -> Path:
    """A line per measured trial across all fields, in the coordinates of the ranges, dark for good values."""
    done = _done(study)
    order = goal.loss(done[goal.column]).sort_values(ascending=False, kind="stable").index
    colours = Normalize(*_limits(done[goal.column]))
    with style():
        figure, ((panel,),) = panels(1, 1, width=max(4.6, 1.6 * len(axes)), height=3.4)
        units = np.stack([axis.unit(done[axis.field]) for axis in axes], axis=1)
        for index in order:
            row = int(np.flatnonzero(done.index == index)[0])
            colour = colormaps[_colours(goal)](colours(done.loc[index, goal.column]))
            panel.plot(range(len(axes)), units[row], color=colour, lw=1.2)
        panel.set_xticks(range(len(axes)), [_ends(axis) for axis in axes])
        panel.set_yticks([0, 1], ["low", "high"])
        return save(figure, out)


def pareto(study: StudyTable, goals: Sequence[Goal], out: Path) -> Path:
    """All measured trials in two goals, those of the front joined."""
    done, front = _done(study), study.front(goals)
    first, second = goals[0].column, goals[1].column
    with style():
        figure, ((panel,),) = panels(1, 1, width=5.0, height=3.6)
        panel.plot(done[first], done[second], "o", color=GREY, alpha=0.5, label="trials")
        panel.plot(front[first], front[second], "o-", color=PALETTE[1], label="front")
        panel.set_xlabel(f"{first} ({goals[0].direction})")
        panel.set_ylabel(f"{second} ({goals[1].direction})")
        panel.legend()
        return save(figure, out)


def _done(study: StudyTable) -> pd.DataFrame:
    return study.trials[study.trials["state"] == "done"]


def _colours(goal: Goal) -> str:
    return _MAP.removesuffix("_r") if goal.direction == "min" else _MAP


def _limits(values: pd.Series) -> tuple[float, float]:
    """Range of the colours: the values without the worst tenth on either side, which would flatten the others."""
    low, high = np.quantile(values.to_numpy(dtype=float), [0.1, 0.9])
    return float(low), float(high if high > low else low + 1e-12)


def _place(axis: Axis, values: pd.Series) -> np.ndarray:
    """Where values are drawn: themselves, or the number of their choice."""
    if axis.kind == "choice":
        return axis.unit(values) * max(1, len(axis.choices) - 1)
    return values.to_numpy(dtype=float)


def _raw(pair: Sequence[Axis], units_N2: np.ndarray) -> list[np.ndarray]:
    """Unit coordinates as they are drawn, one array (N,) per axis."""
    out = []
    for axis, u in zip(pair, units_N2.T, strict=True):
        if axis.kind == "choice":
            out.append(u * max(1, len(axis.choices) - 1))
        elif axis.kind == "log":
            out.append(axis.lo * (axis.hi / axis.lo) ** u)
        else:
            out.append(axis.lo + u * (axis.hi - axis.lo))
    return out


def _scale(panel: Axes, axis: Axis, which: str) -> None:
    own = panel.xaxis if which == "x" else panel.yaxis
    if axis.kind == "log":
        (panel.set_xscale if which == "x" else panel.set_yscale)("log")
    elif axis.kind == "choice":
        own.set_ticks(range(len(axis.choices)), axis.choices)


def _ends(axis: Axis) -> str:
    if axis.kind == "choice":
        return f"{axis.field}\n{', '.join(axis.choices)}"
    return f"{axis.field}\n{axis.lo:g} to {axis.hi:g}"
