"""What the proxy-gap report is made from, and how its tables print."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.sae import published
from analysis.sae.cells import depths_of, models_of
from analysis.sae.hypotheses import Adjudication
from analysis.sae.leaderboard import Leaderboard
from analysis.sae.rungs import merged_costs

MAX_ROWS = 72


@dataclass(frozen=True)
class Study:
    """What was measured: cells, means over seeds, model deltas, leaderboard and layer geometry."""

    cells: pd.DataFrame
    means: pd.DataFrame
    deltas: pd.DataFrame
    board: Leaderboard
    geometry: pd.DataFrame
    published: bool
    sequences: bool  # whether the evaluated sequences were given
    n_resamples: int  # of the sequences, for the leaderboard
    earlier_intervals: int = 0  # cells whose stored interval of CE_rec is of an earlier method
    adjudication: Adjudication | None = None
    costs: pd.DataFrame = field(default_factory=lambda: merged_costs({}))  # of the rungs, as `rungs.merged_costs`
    legibility: pd.DataFrame = field(default_factory=pd.DataFrame)  # a row per cell and class of tokens, with cell_key

    @property
    def models(self) -> list[str]:
        """Models from narrow to wide."""
        return models_of(self.cells)

    @property
    def depths(self) -> list[str]:
        """Depth names in report order."""
        return depths_of(self.cells)

    @property
    def ks(self) -> list[int]:
        """The grid of k, ascending."""
        return sorted(int(k) for k in self.cells["k"].unique())

    @property
    def reference_depth(self) -> str:
        """The depth of the study's main tables: mid where the grid has it, else the first depth."""
        return "mid" if "mid" in self.depths else self.depths[0]

    @property
    def budgets(self) -> list[int]:
        """Training tokens, ascending."""
        return sorted(int(t) for t in self.cells["tokens"].unique())

    def is_study_pair(self, small: object, large: object) -> bool:
        """Whether published differences between the study's widest and narrowest model apply to these two."""
        return self.published and (study_name(small), study_name(large)) == (published.SMALL, published.LARGE)

    def headline_means(self) -> pd.DataFrame:
        """The means at the reference depth, smallest budget and smallest k: one row per model."""
        part = self.means_at(depth=self.reference_depth, tokens=self.budgets[0])
        return part[part["k"] == part["k"].min()]

    def means_at(self, **where: object) -> pd.DataFrame:
        """Rows of the means with the given column values, in report order."""
        chosen = np.ones(len(self.means), dtype=bool)
        for column, value in where.items():
            chosen &= (self.means[column] == value).to_numpy()
        return self.means[chosen]


def number(value: object, digits: int = 3, *, sign: bool = False) -> str:
    """A fixed-point number; blank for missing ones."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:{'+' if sign else ''}.{digits}f}"


def interval(value: float, lo: float, hi: float, digits: int = 3, *, sign: bool = False) -> str:
    """value [lo, hi], the bracket left out when the limits are undefined."""
    text = number(value, digits, sign=sign)
    if math.isnan(lo) or math.isnan(hi):
        return text
    return f"{text} [{number(lo, digits, sign=sign)}, {number(hi, digits, sign=sign)}]"


def measured(row: pd.Series, name: str, limits: tuple[str, str] | None = None, *, sign: bool = False) -> str:
    """A column of a row with its 95% limits, by default `<name>_lo` and `<name>_hi`.

    “[–]” without limits, blank without a value.
    """
    low, high = (float(row[column]) for column in limits or (f"{name}_lo", f"{name}_hi"))
    text = interval(float(row[name]), low, high, sign=sign)
    return f"{text} [–]" if text and math.isnan(low + high) else text


def study_name(model: object) -> str:
    """The study's name of a model: the hub's owner prefix taken off."""
    return str(model).rsplit("/", 1)[-1]


def limited(study: Study) -> tuple[pd.DataFrame, list[str]]:
    """The means; only those of the reference depth where a table would exceed MAX_ROWS, and then a line of text."""
    if len(study.means) <= MAX_ROWS:
        return study.means, []
    part = study.means_at(depth=study.reference_depth)
    return part, [f"Depth {study.reference_depth} only; cells.csv has all {len(study.cells)} cells."]
