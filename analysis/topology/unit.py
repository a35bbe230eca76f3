"""What the topology audit compares: the diagrams and null draws of one place.

Shapes: R runs, B null draws a run, P diagram points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

OBSERVED, FULL_TABLE = "observed", -1
Place = tuple[str, str, str, str]  # table, representation, metric, route


@dataclass
class Unit:
    """All draws of one (table, representation, metric, route).

    `observed` maps a run to its diagram, `quantile` to the longest of its loops' lives as a share of the pairwise
    distances; `nulls` maps a null and a run to the top 1 of its draws, `null_diagrams` to their diagrams. FULL_TABLE is
    the run of all rows. joint: draw b is one realisation of the whole table in all runs.
    """

    place: Place
    observed: dict[int, np.ndarray] = field(default_factory=dict)
    quantile: dict[int, float] = field(default_factory=dict)
    nulls: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    null_diagrams: dict[str, dict[int, list[np.ndarray]]] = field(default_factory=dict)
    joint: bool = False

    @property
    def runs(self) -> list[int]:
        """Subsamples, without the full table."""
        return sorted(run for run in self.observed if run != FULL_TABLE)

    def top1(self, runs: Sequence[int]) -> np.ndarray:
        return np.array([top1(self.observed[run]) for run in runs])

    def tested_runs(self) -> list[int]:
        """Subsamples that every null was drawn for."""
        return [run for run in self.runs if self._drawn(run)]

    @property
    def full_tested(self) -> bool:
        """The full table's diagram is there, and every null was drawn for it."""
        return FULL_TABLE in self.observed and self._drawn(FULL_TABLE)

    def _drawn(self, run: int) -> bool:
        return bool(self.nulls) and all(run in by_run for by_run in self.nulls.values())

    def null_RB(self, runs: Sequence[int]) -> dict[str, np.ndarray]:
        """{null: top 1 of the draws [R, B] of these runs}, cut to the number of draws that all runs have."""
        out = {}
        for name, by_run in self.nulls.items():
            draws = min(len(by_run[run]) for run in runs)
            out[name] = np.array([by_run[run][:draws] for run in runs])
        return out

    def subsample_diagrams(self) -> dict[str, dict[int, list[np.ndarray]]]:
        """`null_diagrams` without the full table."""
        return {n: {run: d for run, d in by.items() if run != FULL_TABLE} for n, by in self.null_diagrams.items()}


def top1(diagram: np.ndarray) -> float:
    """Largest finite persistence of a diagram of (birth, death) pairs [n, 2]; 0 for a diagram without loops."""
    pairs = np.asarray(diagram, np.float64).reshape(-1, 2)
    life = pairs[:, 1] - pairs[:, 0]
    life = life[np.isfinite(life)]
    return float(life.max()) if life.size else 0.0
