"""Figures of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.plots import GREY, MARKERS, PALETTE, panels, save, style
from analysis.search.trials import Goal, StudyTable


def progress(studies: Sequence[StudyTable], goal: Goal, out: Path) -> Path:
    """Every trial's value and the best so far, against the number of trials, a colour per study."""
    with style():
        figure, ((axis,),) = panels(1, 1, width=6.4, height=3.4)
        for i, study in enumerate(studies):
            colour = PALETTE[i % len(PALETTE)]
            x = np.arange(1, len(study.trials) + 1)
            done = study.trials["state"].to_numpy() == "done"
            values = study.trials[goal.column].to_numpy(dtype=float)
            axis.plot(x[done], values[done], MARKERS[i % len(MARKERS)], color=colour, alpha=0.45)
            axis.step(x, study.best_so_far(goal), where="post", color=colour, label=study.group or "best so far")
            for place in x[study.trials["state"].to_numpy() == "failed"]:
                axis.axvline(place, color=GREY, lw=0.6, ls=":")
        axis.set_xlabel("trials")
        axis.set_ylabel(f"{goal.column} ({goal.direction})")
        axis.legend()
        return save(figure, out)
