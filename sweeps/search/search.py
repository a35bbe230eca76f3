"""A search as a launch sees it: cells that are added to the plan batch by batch as trials close.

The state is the ledger alone. Whoever opens the same search reads the recorded batches and the finished cells, and asks
the next batch as soon as every trial of a study is closed (measured, stopped early or failed); so a launch that was
killed continues with the same points, and two launches work on the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from sweeps.core.cells import Cell, CellT, UserError, nearest
from sweeps.ledger.ledger import Ledger
from sweeps.search.halving import Extent, Stop
from sweeps.search.objective import number, unknown
from sweeps.search.options import Asked
from sweeps.search.space import Space, place, read_space, spelled
from sweeps.search.study import Known, Outcome, Rules, Study, Trial

_LOOK = 100  # published cells that are asked for an objective's column before anything runs
_ASKED = "asked-"


_OfSweep = TypeVar("_OfSweep", bound=Cell, covariant=True)


class Searchable(Protocol[_OfSweep]):
    """What a search needs of a `Sweep`."""

    tracked: Sequence[str]
    fixed: Mapping[str, str]
    unseen: str

    def plan(self, preset: Any) -> Sequence[_OfSweep]: ...

    def extent(self, preset: Any) -> Extent | None: ...

    def plan_until(self, preset: Any, amount: int) -> Sequence[_OfSweep]: ...


class Search(Generic[CellT]):
    """All studies of one command; `preset` holds what is not searched. Raises UserError for what cannot be searched."""

    def __init__(
        self,
        asked: Asked,
        sweep: Searchable[CellT],
        preset: Any,
        ledger: Ledger,
        affordable: Callable[[Sequence[str]], bool] = lambda keys: True,
    ) -> None:
        """affordable: whether another batch may be asked after the cells of these keys."""
        self.asked, self.sweep, self.preset, self.ledger = asked, sweep, preset, ledger
        self._affordable = affordable
        self.rules = Rules(
            kind=asked.kind,
            space=read_space(asked.ranges, preset, sweep.fixed),
            objectives=asked.objectives,
            conditions=asked.conditions,
            seed=asked.seed,
            sizes=asked.sizes,
            stop=_stop(asked, sweep, preset),
        )
        self.known = Known()
        self.studies = [
            Study(self.rules, own, self._plan, ledger.store, group)
            for group, own in _groups(preset, asked.each, self.rules.space)
        ]
        for study in self.studies:
            _check_ends(self.rules.space, study)
        for study in self.studies:
            study.open()
        self.confirm = asked.confirm if _has_seeds(preset) else 0
        self._check_columns()
        self._look()
        self._check_trials()

    def _plan(self, preset: Any, amount: int) -> Sequence[CellT]:
        return self.sweep.plan_until(preset, amount) if amount else self.sweep.plan(preset)

    def cells(self) -> list[CellT]:
        """The cells of all trials that were asked so far, at the rungs that they have come to, and of the best
        setting's fresh trainings, each once."""
        trials = [t for s in self.studies for t in (*self._trials(s), *self.again(s))]
        return list({c.key: c for t in trials for c in t.cells}.values())

    def again(self, study: Study[CellT]) -> list[Trial[CellT]]:
        """The best setting with fresh seeds, a trial per seed, once all trials of the study are closed; else empty."""
        outcomes = self.outcomes(study)
        if any(o.state == "open" for o in outcomes) or not (self._ended(study) or self.spent):
            return []
        return study.again(outcomes, self.confirm, self.sweep.unseen)

    def _ended(self, study: Study[CellT]) -> bool:
        """As many trials as asked for, or as the sampler has, are asked."""
        return study.over or study.asked >= self.asked.trials

    @property
    def spent(self) -> bool:
        """Whether `--spend` ends the search: looked at when every trial of every study is closed, so that launches
        that share it come to the same end."""
        if not self.asked.spend or not all(self._closed(s) for s in self.studies):
            return False
        return not self._affordable(sorted({c.key for s in self.studies for t in s.trials(s.asked) for c in t.cells}))

    def _closed(self, study: Study[CellT]) -> bool:
        return all(o.state != "open" for o in self.outcomes(study, study.asked))

    def planned(self, *, record: bool, ask: bool) -> list[CellT]:
        """The cells that a launch begins with; `ask`: also those of batches that are due. Raises UserError if none."""
        self._look()  # at the fresh trainings, which the trials had to show
        cells = self.advance(record=record) if ask else self.cells()
        if cells:
            return cells
        refused = [o.reason for s in self.studies for o in self.outcomes(s) if o.reason]
        if refused:
            raise UserError(f"the sweep refuses every trial; the first: {refused[0]}")
        raise UserError("this search has no trials yet; run the same command without --report")

    def first_cells(self) -> list[CellT]:
        """Those of each study's first batch: what packs are sized for, however far the search has come."""
        first = [t for s in self.studies for t in s.trials(self.rules.sizes[0])]
        return [c for t in first for c in next(iter(t.rungs.values()), ())]

    def cell_fields(self) -> list[str]:
        """The searched fields that cells have under the same name."""
        known = {name for cell in self.first_cells() for name in cell.identity()}
        return [d.field for d in self.rules.space if d.field in known]

    def advance(self, *, record: bool) -> list[CellT]:
        """Ask what can be asked now, and return `cells`. record: write the new batches to the ledger.

        Raises UserError for an objective that no finished cell measures.
        """
        if record:
            for study in self.studies:
                self.ledger.store.create(f"{study.folder}/{_ASKED}{self.asked.trials:07d}", b"")
        while True:
            self._look()
            ready = [s for s in self.studies if self._ready(s)]
            for study in ready:
                study.ask(self.outcomes(study, study.asked), record=record)
            if not ready:
                self._look()  # also at the fresh trainings that are due now
                return self.cells()

    def _ready(self, study: Study[CellT]) -> bool:
        if self._ended(study) or not self._closed(study):
            return False
        together = not self.asked.spend or all(self._closed(s) for s in self.studies)
        return together and not self.spent

    def _trials(self, study: Study[CellT]) -> list[Trial[CellT]]:
        return study.trials(self.asked.trials)

    def outcomes(self, study: Study[CellT], count: int | None = None) -> list[Outcome]:
        """Of the first `count` trials, by default of those that this command asks for."""
        return study.outcomes(self.known)[: self.asked.trials if count is None else count]

    def forget_failures(self) -> None:
        """Failed cells are to run again."""
        self.known.failed.clear()
        for study in self.studies:
            study.forget_failures()

    def _look(self) -> None:
        """Bring `known` up to date with the ledger, rung after rung."""
        while self._look_once() and self.rules.stop:
            pass

    def _look_once(self) -> bool:
        """Read the cells that are waited for; whether some of them are closed now."""
        wanted = [c.key for s in self.studies for c in s.unclosed(self.known)]
        wanted += [c.key for s in self.studies for t in self.again(s) for c in t.cells]
        open_keys = [key for key in dict.fromkeys(wanted) if not self.known.closed(key)]
        if not open_keys:
            return False
        found = self._read(open_keys)
        failed = self.ledger.failures(set(open_keys) - self.known.numbers.keys())
        self.known.failed.update((key, str(record.get("error"))) for key, record in failed.items())
        self._refuse_unmeasured(found)
        return bool(found or failed)

    def _read(self, keys: Sequence[str]) -> list[str]:
        """Note the published cells among these keys in `known`, few of them in memory at once; returns their keys."""
        found = []
        for key, rows in self.ledger.stream_rows(keys):
            self.known.numbers[key] = {c: number(rows, c, self.sweep.tracked) for c in self.rules.columns}
            found.append(key)
        return found

    def _refuse_unmeasured(self, fresh: Sequence[str]) -> None:
        for column in self.rules.columns:
            if fresh and all(values[column] is None for values in self.known.numbers.values()):
                some = self.ledger.read_many(fresh[:_LOOK])
                raise unknown(self._option(column), column, some, self.sweep.tracked)

    def _option(self, column: str) -> str:
        return "--objective" if any(o.column == column for o in self.rules.objectives) else "--where"

    def _check_columns(self) -> None:
        """Raise UserError where published cells of the kind that is planned have no such column."""
        study = self.studies[0]
        planned = study.cells_at({d.field: d.at(0.5) for d in self.rules.space}, -1)
        kinds = {frozenset(cell.identity()) for cell in planned}
        keys = sorted(self.ledger.done())[:_LOOK]
        alike = [cell for cell in self.ledger.sound(keys) if frozenset(cell.identity) in kinds] if keys else []
        tables = [rows for _, rows in self.ledger.stream_rows(cell.key for cell in alike)]
        for column in self.rules.columns:
            if tables and all(number(rows, column, self.sweep.tracked) is None for rows in tables):
                raise unknown(self._option(column), column, alike, self.sweep.tracked)

    def _check_trials(self) -> None:
        """Raise UserError for fewer trials than an earlier command asked for and finished."""
        for study in self.studies:
            names = [n for n in self.ledger.store.names(study.folder) if n.startswith(_ASKED)]
            most = max((int(n.removeprefix(_ASKED)) for n in names), default=0)
            closed = sum(o.state != "open" for o in self.outcomes(study, most))
            if self.asked.trials < closed:
                raise UserError(
                    f"--trials {self.asked.trials} is below the {closed} trials that this search has finished; choose "
                    f"{closed} or more, or another --search-seed for a new search"
                )

    def most_costly(self, seconds_of: Callable[[Sequence[CellT]], float]) -> tuple[int, float, list[CellT]]:
        """(trials still to come, whole trainings that they are as long as, the cells of one trial that takes as long
        as any may), by the ends of the ranges."""
        fresh = sum(
            sum(o.state == "open" for o in self.fresh(s)) if self.again(s) else self.confirm for s in self.studies
        )
        left, wholes = fresh, float(fresh)
        for study in self.studies:
            more = 0 if study.over else max(0, self.asked.trials - study.asked)
            left += more + sum(o.state == "open" for o in self.outcomes(study))
            wholes += study.wholes(self.known, self.asked.trials)
        dearest: tuple[float, list[CellT]] = (-1.0, [])
        for study in self.studies:
            for corner in study.cost_corners():
                try:
                    cells = list(study.cells_at(corner, -1))
                except UserError:
                    continue
                dearest = max(dearest, (seconds_of(cells), cells), key=lambda pair: pair[0])
        return left, wholes, dearest[1]

    def ended_cells(self) -> tuple[list[CellT], list[CellT]]:
        """(cells of trials that are closed for good, cells of those that are not): only the latter's checkpoints are
        still of use."""
        ended: list[CellT] = []
        going: list[CellT] = []
        for study in self.studies:
            trials, again = self._trials(study), self.again(study)
            outcomes = [*self.outcomes(study), *self.fresh(study)]
            for trial, outcome in zip([*trials, *again], outcomes, strict=True):
                (going if outcome.state == "open" else ended).extend(trial.cells)
        return ended, going

    @property
    def finished(self) -> bool:
        """Every trial that was asked for is closed, and no further batch is due."""
        closed = all(o.state != "open" for s in self.studies for o in (*self.outcomes(s), *self.fresh(s)))
        return closed and not any(self._ready(s) for s in self.studies)

    def fresh(self, study: Study[CellT]) -> list[Outcome]:
        """Outcomes of `again`."""
        return [study.outcome(trial, self.known) for trial in self.again(study)]

    def progress(self) -> str:
        """One line: how many trials are closed, and the best setting so far."""
        parts = []
        for study in self.studies:
            outcomes = self.outcomes(study)
            closed = sum(o.state != "open" for o in outcomes)
            best = study.best(outcomes)
            text = f"{study.group + ': ' if study.group else ''}{closed} of {self.asked.trials} trials"
            if best is not None:
                objective = self.rules.objectives[0]
                point = spelled(self._trials(study)[best].point)
                text += f", best {objective.column} {outcomes[best].values[0]:.6g} at {point}"
            parts.append(text)
        return "; ".join(parts)


def _has_seeds(preset: Any) -> bool:
    """Whether the preset lists seeds, so that a setting can be trained again from others."""
    return isinstance(getattr(preset, "seeds", None), tuple)


def _groups(preset: Any, each: str, space: Space) -> list[tuple[str, Any]]:
    """[(value's text, preset with that value alone)] for the field of `--each`; one nameless group without it."""
    if not each:
        return [("", preset)]
    names = {f.name for f in dataclasses.fields(preset)}
    if each not in names:
        raise UserError(f"--each {each!r} is not a field of this sweep{nearest(each, names)}")
    if any(d.field == each for d in space):
        raise UserError(f"--each {each}: {each} is searched; leave out --each or its range")
    values = getattr(preset, each)
    if not isinstance(values, tuple) or not values:
        raise UserError(f"--each {each}: {each} is no list with values; name a field such as seeds or architectures")
    return [(str(value), place(preset, {each: value})) for value in dict.fromkeys(values)]


def _stop(asked: Asked, sweep: Searchable[CellT], preset: Any) -> Stop | None:
    """How trials are stopped early; raises UserError for a sweep or preset that cannot be stopped."""
    if not asked.stop:
        return None
    extent = sweep.extent(preset)
    if extent is None:
        raise UserError(f"--stop {asked.stop}: these cells have nothing to stop at; leave out --stop")
    if asked.each == extent.field or any(text.partition("=")[0] == extent.field for text in asked.ranges):
        raise UserError(f"--stop {asked.stop} sets {extent.field} itself; leave out its range, or --stop")
    return Stop(asked.stop, asked.eta, extent.field, extent.amounts(asked.eta, asked.rungs))


def _check_ends(space: Space, study: Study[CellT]) -> None:
    """Raise UserError for a range whose end the sweep refuses at the first or the last rung, and for a field that no
    cell depends on."""
    middle = {d.field: d.at(0.5) for d in space}
    for d in space:
        plans: list[Sequence[Cell]] = []
        for value in d.ends():
            try:
                plans.append([c for rung in (0, -1) for c in study.cells_at({**middle, d.field: value}, rung)])
            except UserError as error:
                raise UserError(f"--set {d}: {d.field}={value} is refused: {error}") from error
        if len({tuple(cell.key for cell in plan) for plan in plans}) < 2:
            raise UserError(f"--set {d}: no planned cell depends on {d.field}; leave it out")
