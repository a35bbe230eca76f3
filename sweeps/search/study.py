"""One study: its points in the ledger, batch by batch, and what the ledger knows of its trials.

A trial is a point of the space: the cells that the sweep plans for the preset with the point's values. They are cells
like any others, so a grid that names the same values shares them. `_search/STUDY/` in the ledger holds `study.json`
(what the study is) and one file per batch with its points. A batch's points follow from the seed and the batches before
it, all of whose trials must be closed; whoever writes them first, every launch continues with the same.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from sweeps.core.cells import CellT, UserError, digest
from sweeps.ledger.published import in_order
from sweeps.ledger.storage import Store
from sweeps.search.objective import Condition, Objective, mean_of
from sweeps.search.points import Told, sampler
from sweeps.search.space import Point, Space, place, point_name

_FOLDER = "_search"


@dataclass(frozen=True)
class Trial(Generic[CellT]):
    """A point and its cells. refused: why the sweep plans none for it, one line."""

    number: int
    point: Point
    cells: tuple[CellT, ...] = ()
    refused: str = ""


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial. state: open, failed (reason says why), or done with a value per objective.

    excess: how far each condition is broken, above 0 where it is.
    """

    state: str
    values: tuple[float, ...] = ()
    excess: tuple[float, ...] = ()
    reason: str = ""

    @property
    def allowed(self) -> bool:
        """Done, and no condition is broken."""
        return self.state == "done" and all(x <= 0 for x in self.excess)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What makes a search: the same rules on the same preset ask the same points."""

    kind: str
    space: Space
    objectives: tuple[Objective, ...]
    conditions: tuple[Condition, ...] = ()
    seed: int = 0
    size: int = 4  # trials per batch

    @property
    def columns(self) -> list[str]:
        """Columns that the search reads of each cell."""
        return list(dict.fromkeys([*(o.column for o in self.objectives), *(c.column for c in self.conditions)]))


@dataclass
class Known:
    """What the ledger holds of the search's cells: the columns of finished ones, reasons of failed ones, by key."""

    numbers: dict[str, dict[str, float | None]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def closed(self, key: str) -> bool:
        return key in self.numbers or key in self.failed


class Study(Generic[CellT]):
    """One search of one group. `group`: the values that its preset has for the field of `--each`; empty without."""

    def __init__(
        self, rules: Rules, preset: Any, plan: Callable[[Any], Sequence[CellT]], store: Store, group: str = ""
    ) -> None:
        self.rules, self.preset, self.group = rules, preset, group
        self._plan, self._store = plan, store
        self.sampler = sampler(rules.kind, rules.space, rules.seed, rules.size, len(rules.objectives))
        self._trials: list[Trial[CellT]] = []
        self._batches = 0
        self.over = False  # the sampler has no further points

    @functools.cached_property
    def name(self) -> str:
        """Digest of the rules, but for the objectives' directions, and of the cells in the middle of the space."""
        rules = self.rules
        middle = {d.field: d.at(0.5) for d in rules.space}
        try:
            keys = [cell.key for cell in self._plan(place(self.preset, middle))]
        except UserError:  # the ends were looked at; a refused middle leaves the group's cells unknown
            keys = [repr(self.preset)]
        what = [rules.kind, [str(d) for d in rules.space], [o.column for o in rules.objectives]]
        return digest([what, [str(c) for c in rules.conditions], rules.seed, rules.size, keys])[:16]

    @property
    def folder(self) -> str:
        return f"{_FOLDER}/{self.name}"

    def open(self) -> None:
        """Read the recorded batches; raises UserError for a study of other directions."""
        record = self._store.read_json(f"{self.folder}/study.json")
        if record is not None and record["objectives"] != [str(o) for o in self.rules.objectives]:
            raise UserError(
                f"this search optimises {','.join(record['objectives'])} in {self._store.uri}, not "
                f"{','.join(map(str, self.rules.objectives))}; choose another --search-seed for a new search"
            )
        names = sorted(n for n in self._store.names(self.folder) if n.startswith("batch-") and n.endswith(".json"))
        for points in in_order(lambda n: self._store.read_json(f"{self.folder}/{n}"), names):
            self._append(points or [])

    def _append(self, points: Sequence[Point]) -> None:
        for point in points:
            self._trials.append(self._trial(len(self._trials), point))
        self._batches += 1

    def _trial(self, number: int, point: Point) -> Trial[CellT]:
        try:
            cells = self._plan(place(self.preset, point))
        except UserError as error:
            return Trial(number, point, refused=str(error))
        return Trial(number, point, tuple({cell.key: cell for cell in cells}.values()))

    def trials(self, count: int) -> list[Trial[CellT]]:
        """The first `count` trials of those that were asked so far."""
        return self._trials[:count]

    @property
    def asked(self) -> int:
        """Trials that were asked so far; the last of them may be beyond the search's number of trials."""
        return len(self._trials)

    def ask(self, outcomes: Sequence[Outcome], *, record: bool) -> None:
        """One more batch, given the outcomes of all trials asked so far, none of them open. record: write it down."""
        told = [Told(t.point, self._losses(o), o.excess) for t, o in zip(self._trials, outcomes, strict=True)]
        points = self.sampler.batch(self._batches, told)
        if not points:
            self.over = True
            return
        if record:
            self._record_study()
            file = f"{self.folder}/batch-{self._batches:06d}.json"
            if not self._store.create(file, json.dumps(points).encode()):
                points = self._store.read_json(file) or points
        self._append(points)

    def _losses(self, outcome: Outcome) -> tuple[float, ...]:
        return tuple(o.loss(v) for o, v in zip(self.rules.objectives, outcome.values, strict=False))

    def _record_study(self) -> None:
        if self._batches:
            return
        record = {
            "search": self.rules.kind,
            "space": [str(d) for d in self.rules.space],
            "objectives": [str(o) for o in self.rules.objectives],
            "conditions": [str(c) for c in self.rules.conditions],
            "seed": self.rules.seed,
            "batch": self.rules.size,
            "group": self.group,
        }
        self._store.create(f"{self.folder}/study.json", json.dumps(record, indent=1).encode())

    def outcome(self, trial: Trial[CellT], known: Known) -> Outcome:
        """State and values of a trial, from what is known of its cells."""
        if trial.refused:
            return Outcome("failed", reason=trial.refused)
        if not all(known.closed(cell.key) for cell in trial.cells):
            return Outcome("open")
        for cell in trial.cells:
            if cell.key in known.failed:
                return Outcome("failed", reason=f"cell {cell.key}: {known.failed[cell.key]}")
        means: dict[str, float] = {}
        for column in self.rules.columns:
            of_cells: Mapping[str, float | None] = {c.key: known.numbers[c.key].get(column) for c in trial.cells}
            means[column], why = mean_of(of_cells, column)
            if why:
                return Outcome("failed", reason=why)
        return Outcome(
            "done",
            tuple(means[o.column] for o in self.rules.objectives),
            tuple(c.excess(means[c.column]) for c in self.rules.conditions),
        )

    def best(self, outcomes: Sequence[Outcome]) -> int | None:
        """Number of the best allowed trial by the first objective, the first of equals; None where there is none."""
        objective = self.rules.objectives[0]
        allowed = [(objective.loss(o.values[0]), i) for i, o in enumerate(outcomes) if o.allowed]
        return min(allowed)[1] if allowed else None

    def again(self, outcomes: Sequence[Outcome], count: int) -> list[Trial[CellT]]:
        """The best trial's setting with each of `count` seeds that the search did not use; empty without a best one."""
        best = self.best(outcomes)
        if best is None or not count:
            return []
        first = max(self.preset.seeds, default=-1) + 1
        point = self._trials[best].point
        return [self._trial(best, {**point, "seeds": seed}) for seed in range(first, first + count)]

    def front(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Numbers of the allowed trials that no other allowed trial beats in every objective (the Pareto front)."""
        losses = {i: self._losses(o) for i, o in enumerate(outcomes) if o.allowed}

        def beaten(own: tuple[float, ...]) -> bool:
            return any(all(a <= b for a, b in zip(x, own, strict=True)) and x != own for x in losses.values())

        return sorted((i for i, own in losses.items() if not beaten(own)), key=lambda i: losses[i])

    def repeats(self, count: int) -> int:
        """How many of the first `count` trials name the point of an earlier one."""
        return count - len({point_name(t.point) for t in self.trials(count)}) if count <= self.asked else 0

    def cost_corners(self) -> list[Point]:
        """Points where a trial may cost most: every combination of ends, at most 64, and the middle."""
        corners: list[Point] = [{}]
        for d in self.rules.space:
            ends = d.ends()
            if len(corners) * len(ends) > 64:
                ends = ends[-1:]
            corners = [{**corner, d.field: value} for corner in corners for value in ends]
        return [*corners, {d.field: d.at(0.5) for d in self.rules.space}]


def whole_batches(trials: int, size: int) -> int:
    """Batches that hold so many trials."""
    return math.ceil(trials / size)
