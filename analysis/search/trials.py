"""What a search's tables hold, and the numbers that follow from them: best so far, front, ranges whose end won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.crossed import Effect, crossed_mean

EDGE = 0.05  # of a range's length: a best value so near an end may lie beyond it


@dataclass(frozen=True)
class Axis:
    """A searched field: a range lo..hi, logarithmic or not, or the choices of one."""

    field: str
    kind: Literal["log", "lin", "int", "choice"]
    lo: float = 0.0
    hi: float = 0.0
    choices: tuple[str, ...] = ()

    def unit(self, values: pd.Series) -> np.ndarray:
        """Places (N,) of values (N,) in 0..1; a choice's in the order of the choices."""
        if self.kind == "choice":
            places = {choice: i for i, choice in enumerate(self.choices)}
            return np.array([places[str(v)] for v in values], dtype=float) / max(1, len(self.choices) - 1)
        x = values.to_numpy(dtype=float)
        if self.kind == "log":
            return np.log(x / self.lo) / np.log(self.hi / self.lo)
        return (x - self.lo) / (self.hi - self.lo)


@dataclass(frozen=True)
class Goal:
    """A column to make small ("min") or large ("max")."""

    column: str
    direction: str

    @property
    def sign(self) -> int:
        return -1 if self.direction == "max" else 1

    def loss(self, values: pd.Series) -> pd.Series:
        """Values turned so that smaller is better."""
        return self.sign * values


@dataclass(frozen=True)
class Again:
    """The best setting, trained again from seeds that the search did not use.

    values: of the first goal, one per fresh training. failed: how many failed. why: what to say where the values give
    no interval.
    """

    values: tuple[float, ...] = ()
    failed: int = 0
    why: str = "no fresh trainings"

    def interval(self) -> Effect | None:
        """Mean over trainings of the setting, with its 95% t interval; None with a failed one, or fewer than two.

        The values did not choose the setting, so the interval holds whatever was searched.
        """
        return None if self.failed or len(self.values) < 2 else crossed_mean(np.array(self.values)[:, None])

    def optimism(self, goal: Goal, chosen: float) -> float:
        """By how much the chosen trial's value is better than the mean of the fresh ones; NaN without them."""
        return goal.sign * (float(np.mean(self.values)) - chosen) if self.values else float("nan")


@dataclass(frozen=True)
class StudyTable:
    """One study. again: its best setting's fresh trainings. trials: a row per trial, in their order, with the columns
    trial, state (done, stopped, failed, open), reason, allowed (done and no condition broken), one per field and one
    per goal.

    stops: where trials are stopped early, what they are stopped at; trials then has the column measured_at, how much of
    it a trial's values were measured at. early: the trials as they were measured at the first rung, early_at, where
    most of them were.
    """

    group: str
    trials: pd.DataFrame
    again: Again = Again()
    stops: str = ""
    early: StudyTable | None = None
    early_at: str = ""

    def best(self, goals: Sequence[Goal]) -> pd.Series | None:
        """The best allowed trial by the first goal, the first of equals; None where there is none."""
        allowed = self.trials[self.trials["allowed"]]
        if allowed.empty:
            return None
        return allowed.iloc[int(goals[0].loss(allowed[goals[0].column]).to_numpy(dtype=float).argmin())]

    def best_so_far(self, goal: Goal) -> np.ndarray:
        """(N,) the goal's best allowed value among the first 1..N trials; NaN before there is one."""
        loss = goal.loss(self.trials[goal.column]).where(self.trials["allowed"])
        return goal.loss(loss.cummin().ffill()).to_numpy(dtype=float)

    def front(self, goals: Sequence[Goal]) -> pd.DataFrame:
        """The allowed trials that no other one beats in a goal without losing in another (the Pareto front)."""
        allowed = self.trials[self.trials["allowed"]]
        losses_NG = np.stack([goal.loss(allowed[goal.column]).to_numpy(dtype=float) for goal in goals], axis=1)
        beaten_N = np.array(
            [bool(((losses_NG <= own).all(axis=1) & (losses_NG < own).any(axis=1)).any()) for own in losses_NG],
            dtype=bool,
        )
        front = allowed[~beaten_N]
        return front.sort_values(goals[0].column, ascending=goals[0].direction == "min", kind="stable")


def edges(best: pd.Series, axes: Sequence[Axis]) -> list[str]:
    """A line for each range whose end the best trial lies at: the best value may lie beyond it."""
    lines = []
    for axis in axes:
        if axis.kind == "choice":
            continue
        place = float(axis.unit(pd.Series([best[axis.field]]))[0])
        end = "lower" if place <= EDGE else "upper" if place >= 1 - EDGE else ""
        if end:
            bound = axis.lo if end == "lower" else axis.hi
            lines.append(f"{axis.field}={best[axis.field]:g} lies at the {end} end of its range ({bound:g}); widen it")
    return lines
