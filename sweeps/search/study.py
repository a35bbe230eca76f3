"""One study: its points in the ledger, batch by batch, and what the ledger knows of its trials.

A trial is a point of the space: the cells that the sweep plans for the preset with the point's values. They are cells
like any others, so a grid that names the same values shares them. `_search/STUDY/` in the ledger holds `study.json`
(what the study is) and one file per batch with its points. A batch's points follow from the seed and the batches before
it, all of whose trials must be closed; whoever writes them first, every launch continues with the same.

With early stopping a batch is a bracket (`halving`), and a trial has cells at each of its rungs. Who goes on is not
recorded: it follows from the finished cells.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from sweeps.core.cells import CellT, UserError, digest
from sweeps.ledger.published import in_order
from sweeps.ledger.storage import Store
from sweeps.search.halving import Reached, Standing, Stop, ladder
from sweeps.search.objective import Condition, Objective, mean_of
from sweeps.search.points import Sizes, Told, sampler
from sweeps.search.space import Point, Space, Value, place

_FOLDER = "_search"
_WHOLE = Stop("", 2, "", (1,))  # no early stopping: one rung


@dataclass(frozen=True)
class Trial(Generic[CellT]):
    """A point and its cells, by rung as far as it has come. refused: why the sweep plans none, one line."""

    number: int
    point: Point
    rungs: dict[int, tuple[CellT, ...]]
    refused: str = ""

    @property
    def cells(self) -> tuple[CellT, ...]:
        """All of them, each once."""
        return tuple({cell.key: cell for cells in self.rungs.values() for cell in cells}.values())


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial. state: open, failed (reason says why), stopped early, or done; the last two have a
    value per objective, measured at `rung`.

    excess: how far each condition is broken, above 0 where it is.
    """

    state: str
    values: tuple[float, ...] = ()
    excess: tuple[float, ...] = ()
    reason: str = ""
    rung: int = 0

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
    sizes: tuple[int, ...] = (4,)  # trials of the batches, in turn
    stop: Stop | None = None

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
    """One search of one group. `group`: the values that its preset has for the field of `--each`; empty without.

    plan: the cells of a preset at a rung's amount, see `Sweep.plan_until`; 0 where nothing is stopped early.
    """

    def __init__(
        self, rules: Rules, preset: Any, plan: Callable[[Any, int], Sequence[CellT]], store: Store, group: str = ""
    ) -> None:
        self.rules, self.preset, self.group = rules, preset, group
        self.stop = rules.stop or _WHOLE
        self._plan, self._store = plan, store
        self.sampler = sampler(rules.kind, rules.space, rules.seed, rules.sizes, len(rules.objectives))
        self._trials: list[Trial[CellT]] = []
        self._batches: list[range] = []  # of trials
        self._settled: dict[int, list[Outcome]] = {}  # of batches whose trials are all closed
        self.over = False  # the sampler has no further points

    @functools.cached_property
    def name(self) -> str:
        """Digest of the rules, but for the objectives' directions, and of the cells in the middle of the space."""
        rules = self.rules
        middle = {d.field: d.at(0.5) for d in rules.space}
        try:
            keys = [cell.key for cell in self.cells_at(middle, len(self.stop.amounts) - 1)]
        except UserError:  # the ends were looked at; a refused middle leaves the group's cells unknown
            keys = [repr(self.preset)]
        what: list[Any] = [rules.kind, [str(d) for d in rules.space], [o.column for o in rules.objectives]]
        what += [] if rules.stop is None else [str(rules.stop)]
        size = rules.sizes[0] if len(rules.sizes) == 1 else list(rules.sizes)
        return digest([what, [str(c) for c in rules.conditions], rules.seed, size, keys])[:16]

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
        first, rung = len(self._trials), self.stop.rungs(len(self._batches))[0]
        self._trials += [self._trial(first + i, point, rung) for i, point in enumerate(points)]
        self._batches.append(range(first, len(self._trials)))

    def _trial(self, number: int, point: Point, rung: int) -> Trial[CellT]:
        try:
            return Trial(number, point, {rung: self.cells_at(point, rung)})
        except UserError as error:
            return Trial(number, point, {}, refused=str(error))

    def cells_at(self, point: Mapping[str, Value], rung: int) -> tuple[CellT, ...]:
        """The cells of a point at a rung, each once; raises UserError for a point that the sweep refuses."""
        cells = self._plan(place(self.preset, point), self.stop.amounts[rung] if self.rules.stop else 0)
        return tuple({cell.key: cell for cell in cells}.values())

    def trials(self, count: int) -> list[Trial[CellT]]:
        """The first `count` trials of those that were asked so far."""
        return self._trials[:count]

    @property
    def asked(self) -> int:
        """Trials that were asked so far; the last of them may be beyond the search's number of trials."""
        return len(self._trials)

    def ask(self, outcomes: Sequence[Outcome], *, record: bool) -> None:
        """One more batch, given the outcomes of all trials asked so far, none of them open. record: write it down."""
        told = [self._told(t, o) for t, o in zip(self._trials, outcomes, strict=True)]
        number = len(self._batches)
        points = self.sampler.batch(number, told)
        if not points:
            self.over = True
            return
        if record:
            self._record_study()
            file = f"{self.folder}/batch-{number:06d}.json"
            if not self._store.create(file, json.dumps(points).encode()):
                points = self._store.read_json(file) or points
        self._append(points)

    def _told(self, trial: Trial[CellT], outcome: Outcome) -> Told:
        return Told(trial.point, self._losses(outcome), outcome.excess, outcome.rung, outcome.state == "stopped")

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
            "batch": self.rules.sizes[0] if len(self.rules.sizes) == 1 else list(self.rules.sizes),
            "group": self.group,
            **({"stop": str(self.rules.stop)} if self.rules.stop else {}),
        }
        self._store.create(f"{self.folder}/study.json", json.dumps(record, indent=1).encode())

    def outcomes(self, known: Known) -> list[Outcome]:
        """Of all trials that were asked so far; a batch whose trials are all closed is looked at once."""
        out: list[Outcome] = []
        for number in range(len(self._batches)):
            found = self._settled.get(number)
            if found is None:
                found = self._decided(number, known)
                if all(o.state != "open" for o in found):
                    self._settled[number] = found
            out += found
        return out

    def forget_failures(self) -> None:
        """Failed cells are to run again, so what was decided may change."""
        self._settled.clear()

    def _decided(self, number: int, known: Known) -> list[Outcome]:
        """Outcomes of a batch's trials: each at the rung that it has come to."""
        seen: dict[tuple[int, int], Outcome] = {}

        def look(i: int, rung: int) -> Standing | None:
            trial = self._at_rung(self._trials[i], rung)
            seen[i, rung] = outcome = self.outcome(trial, known, rung)
            return None if outcome.state == "open" else self._told(trial, outcome).standing()

        reached = ladder(self._batches[number], self.stop.rungs(number), self.stop.eta, look)

        def outcome(i: int, place: Reached) -> Outcome:
            own = seen[i, place.rung]
            if place.state == "ended":
                return own
            return Outcome("open", rung=place.rung) if place.state == "open" else replace(own, state="stopped")

        return [outcome(i, reached[i]) for i in self._batches[number]]

    def _at_rung(self, trial: Trial[CellT], rung: int) -> Trial[CellT]:
        """The trial, its cells of this rung planned."""
        if rung not in trial.rungs and not trial.refused:
            try:
                trial.rungs[rung] = self.cells_at(trial.point, rung)
            except UserError as error:
                trial = self._trials[trial.number] = replace(trial, refused=str(error))
        return trial

    def outcome(self, trial: Trial[CellT], known: Known, rung: int | None = None) -> Outcome:
        """State and values of a trial at a rung, by default the last, from what is known of its cells there."""
        rung = len(self.stop.amounts) - 1 if rung is None else rung
        if trial.refused:
            return Outcome("failed", reason=trial.refused, rung=rung)
        cells = trial.rungs[rung]
        if not all(known.closed(cell.key) for cell in cells):
            return Outcome("open", rung=rung)
        for cell in cells:
            if cell.key in known.failed:
                return Outcome("failed", reason=f"cell {cell.key}: {known.failed[cell.key]}", rung=rung)
        means: dict[str, float] = {}
        for column in self.rules.columns:
            of_cells: Mapping[str, float | None] = {c.key: known.numbers[c.key].get(column) for c in cells}
            means[column], why = mean_of(of_cells, column)
            if why:
                return Outcome("failed", reason=why, rung=rung)
        return Outcome(
            "done",
            tuple(means[o.column] for o in self.rules.objectives),
            tuple(c.excess(means[c.column]) for c in self.rules.conditions),
            rung=rung,
        )

    def unclosed(self, known: Known) -> list[CellT]:
        """The cells that the next decisions wait for."""
        return [
            cell
            for trial, outcome in zip(self._trials, self.outcomes(known), strict=True)
            if outcome.state == "open"
            for cell in trial.rungs.get(outcome.rung, ())
            if not known.closed(cell.key)
        ]

    def best(self, outcomes: Sequence[Outcome]) -> int | None:
        """Number of the best allowed trial by the first objective, the first of equals; None where there is none."""
        objective = self.rules.objectives[0]
        allowed = [(objective.loss(o.values[0]), i) for i, o in enumerate(outcomes) if o.allowed]
        return min(allowed)[1] if allowed else None

    def again(self, outcomes: Sequence[Outcome], count: int, unseen: str) -> list[Trial[CellT]]:
        """The best trial's setting with each of `count` seeds that the search did not use, measured on data that it
        did not use where the preset has a field, named by `unseen`, for that; empty without a best one."""
        best = self.best(outcomes)
        if best is None or not count:
            return []
        first = max(self.preset.seeds, default=-1) + 1
        point = self._trials[best].point | ({unseen: getattr(self.preset, unseen) + 1} if unseen else {})
        last = len(self.stop.amounts) - 1
        return [self._trial(best, {**point, "seeds": seed}, last) for seed in range(first, first + count)]

    def front(self, outcomes: Sequence[Outcome]) -> list[int]:
        """Numbers of the allowed trials that no other allowed trial beats in every objective (the Pareto front)."""
        losses = {i: self._losses(o) for i, o in enumerate(outcomes) if o.allowed}

        def beaten(own: tuple[float, ...]) -> bool:
            return any(all(a <= b for a, b in zip(x, own, strict=True)) and x != own for x in losses.values())

        return sorted((i for i, own in losses.items() if not beaten(own)), key=lambda i: losses[i])

    def wholes(self, known: Known, trials: int) -> float:
        """Whole trainings that the open trials, and those still to be asked up to `trials`, take at most."""
        outcomes, sizes = self.outcomes(known)[:trials], Sizes(self.rules.sizes)
        out = 0.0
        for number, batch in enumerate(self._batches):
            rungs = [o.rung for o in outcomes[batch.start : batch.stop] if o.state == "open"]
            out += self.stop.wholes(number, len(rungs), max(rungs, default=0))
        number = len(self._batches)
        while not self.over and (span := sizes.span(number))[0] < trials:
            out += self.stop.wholes(number, min(span[1], trials) - span[0], self.stop.rungs(number)[0])
            number += 1
        return out

    def cost_corners(self) -> list[Point]:
        """Points where a trial may cost most: every combination of ends, at most 64, and the middle."""
        corners: list[Point] = [{}]
        for d in self.rules.space:
            ends = d.ends()
            if len(corners) * len(ends) > 64:
                ends = ends[-1:]
            corners = [{**corner, d.field: value} for corner in corners for value in ends]
        return [*corners, {d.field: d.at(0.5) for d in self.rules.space}]
