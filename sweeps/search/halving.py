"""Early stopping: which trials of a bracket go on to the next rung, by successive halving.

All trials of a bracket are measured at its first rung, a small share of what a whole trial takes; the best 1/eta of
them go on to the next rung, and so on (Jamieson & Talwalkar 2016, AISTATS, Algorithm 1). Hyperband is several such
brackets in turn, from many trials that begin low to few that begin at the top (Li et al. 2018, JMLR 18, Algorithm 1).
A decision is made when every trial that reached a rung is closed there: it follows from the finished cells alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sweeps.core.cells import UserError

HALVING, HYPERBAND = "halving", "hyperband"
STOPS = (HALVING, HYPERBAND)
FAILED = 2  # first number of a failed trial's standing
Standing = tuple[int, float]  # the smaller the better: 0 and the loss, 1 and how far a condition is broken, or FAILED
NameT = TypeVar("NameT", int, float)


@dataclass(frozen=True)
class Extent:
    """What a sweep can stop at: the preset's field that says how much a trial takes, that much, and its step."""

    field: str
    whole: int
    unit: int = 1

    def amounts(self, eta: int, rungs: int) -> tuple[int, ...]:
        """The rungs, rising by eta to the whole, in multiples of the unit; raises UserError where there are fewer."""
        shares = (self.whole / eta**k / self.unit for k in reversed(range(rungs)))
        found = tuple(max(1, round(share)) * self.unit for share in shares)
        if len(set(found)) < rungs:
            raise UserError(
                f"--rungs {rungs} with --eta {eta}: {self.field}={self.whole} in steps of {self.unit} has no {rungs} "
                f"such budgets; choose fewer --rungs or a larger {self.field}"
            )
        return found


@dataclass(frozen=True)
class Stop:
    """How the trials of a search are stopped early. amounts: the rungs, as values of `field`; the last is the whole."""

    kind: str
    eta: int
    field: str
    amounts: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} eta={self.eta} {self.field}={','.join(map(str, self.amounts))}"

    def rungs(self, bracket: int) -> range:
        """Rungs of a bracket by its number, from the one where its trials begin."""
        last = len(self.amounts)
        return range(bracket % last if self.kind == HYPERBAND else 0, last)

    def wholes(self, bracket: int, count: int, rung: int) -> float:
        """Whole trainings that a bracket takes at most from a rung on which so many trials are; one that goes on
        continues from where it was."""
        out = 0.0
        for number in range(rung, len(self.amounts)):
            below = self.amounts[number - 1] if number > self.rungs(bracket)[0] else 0
            out += count * (self.amounts[number] - below) / self.amounts[-1]
            count = -(-count // self.eta)
        return out


def bracket_sizes(kind: str, eta: int, rungs: int, size: int) -> tuple[int, ...]:
    """Trials of the brackets, in turn: `size` for halving; Hyperband's own, ceil(K eta^s / (s + 1)) for s = K-1 … 0."""
    if kind != HYPERBAND:
        return (size,)
    return tuple(-(-rungs * eta**s // (s + 1)) for s in reversed(range(rungs)))


def whole_brackets(trials: int, sizes: Sequence[int]) -> int:
    """The least number of trials, at least `trials`, that fills brackets of these sizes, taken in turn."""
    filled = trials // sum(sizes) * sum(sizes)
    for size in sizes:
        if filled >= trials:
            break
        filled += size
    return filled


def survivors(scores: Mapping[NameT, Any], eta: int) -> list[NameT]:
    """The best ceil(n / eta) of n names by score (lower is better; of equals the lower name), best first."""
    ranked = sorted(scores, key=lambda name: (scores[name], name))
    return ranked[: math.ceil(len(ranked) / eta)]


@dataclass(frozen=True)
class Reached:
    """How far a trial has come. state: open (it is not measured at the rung, or a rival is not), stopped there, or
    ended: measured at the last rung, or failed."""

    rung: int
    state: str


def ladder(
    trials: Sequence[int], rungs: Sequence[int], eta: int, look: Callable[[int, int], Standing | None]
) -> dict[int, Reached]:
    """What is decided of the trials of a bracket. look: a trial's standing at a rung, None while it is not measured.

    A failed trial never goes on, and is counted among the n of whom ceil(n / eta) do.
    """
    out: dict[int, Reached] = {}
    alive = list(trials)
    for rung in rungs:
        found = {trial: look(trial, rung) for trial in alive}
        last = rung == rungs[-1]
        measured = {trial: standing for trial, standing in found.items() if standing is not None}
        failed = {trial for trial, standing in measured.items() if standing[0] == FAILED}
        ended = set(measured) if last else failed
        out |= {trial: Reached(rung, "ended" if trial in ended else "open") for trial in alive}
        if last or len(measured) < len(found):
            break
        chosen = set(survivors(measured, eta)) - failed
        out |= {trial: Reached(rung, "stopped") for trial in alive if trial not in chosen | failed}
        alive = [trial for trial in alive if trial in chosen]
    return out
