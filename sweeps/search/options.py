"""The search's options on a sweep's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sweeps.core.cells import UserError, nearest
from sweeps.search.halving import HYPERBAND, STOPS, bracket_sizes, whole_brackets
from sweeps.search.objective import Condition, Objective, read_conditions, read_objectives
from sweeps.search.points import SEARCHES, usual_size
from sweeps.search.space import split_settings

TRIALS, CONFIRM = 20, 5
ETA, RUNGS = 3, 3
_ENDLESS = 10_000  # trials where only --spend ends the search
_STOPPING = ("stop", "eta", "rungs")
_NEEDS_SEARCH = ("trials", "objective", "where", "each", "batch", "search_seed", "confirm", "spend", *_STOPPING)
_MOST = 1000  # trials of a bracket


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command line asks of a search. each: the preset's field whose values are searched one by one.

    trials: with early stopping such that they fill brackets. stop: how trials are stopped early, empty for not at all;
    the best 1/eta go on at each of so many rungs.
    """

    kind: str
    ranges: tuple[str, ...]
    objectives: tuple[Objective, ...]
    conditions: tuple[Condition, ...] = ()
    trials: int = TRIALS
    batch: int
    seed: int = 0
    each: str = ""
    confirm: int = CONFIRM  # fresh trainings of the best setting
    spend: str = ""  # no batch is asked once the trials have cost so much
    stop: str = ""
    eta: int = ETA
    rungs: int = RUNGS

    @property
    def sizes(self) -> tuple[int, ...]:
        """Trials of the batches, in turn."""
        return bracket_sizes(self.stop, self.eta, self.rungs, self.batch)

    def arguments(self) -> list[str]:
        """The options that ask for this, as they are written; the ranges are among those of `--set`."""
        out = ["--search", self.kind, "--objective", ",".join(map(str, self.objectives))]
        out += ["--trials", str(self.trials), "--search-seed", str(self.seed)]
        out += [] if self.stop == HYPERBAND else ["--batch", str(self.batch)]
        out += ["--stop", self.stop, "--eta", str(self.eta), "--rungs", str(self.rungs)] if self.stop else []
        out += [part for condition in self.conditions for part in ("--where", str(condition))]
        out += [] if self.confirm == CONFIRM else ["--confirm", str(self.confirm)]
        out += ["--spend", self.spend] if self.spend else []
        return [*out, "--each", self.each] if self.each else out


def add_search(parser: argparse.ArgumentParser) -> None:
    """Give a command line `--search` and the options that go with it."""
    group = parser.add_argument_group("search", "find the best values of fields: --set lr=log:1e-4:1e-2 --search tpe")
    group.add_argument("--search", default=None, metavar="KIND", help=f"one of {', '.join(SEARCHES)}")
    group.add_argument("--objective", default=None, metavar="COLUMN:min|max", help="what to optimise")
    group.add_argument("--trials", type=int, default=None, metavar="N", help=f"settings to try; default: {TRIALS}")
    group.add_argument("--spend", default=None, metavar="COST", help="or end after 20usd, 6core-hours, 2gpu-hours")
    group.add_argument("--where", action="append", default=None, metavar="COLUMN>=X", help="a condition to meet")
    group.add_argument("--each", default=None, metavar="FIELD", help="a search of its own for each value of a field")
    group.add_argument("--batch", type=int, default=None, metavar="N", help="settings asked at once; default: 4")
    fresh = f"fresh trainings of the best setting; default: {CONFIRM}"
    group.add_argument("--confirm", type=int, default=None, metavar="N", help=fresh)
    group.add_argument("--stop", default=None, metavar="KIND", help=f"end poor trials early: {' or '.join(STOPS)}")
    group.add_argument("--eta", type=int, default=None, metavar="N", help=f"the best 1/N go on; default: {ETA}")
    group.add_argument("--rungs", type=int, default=None, metavar="N", help=f"budgets of a trial; default: {RUNGS}")
    group.add_argument("--search-seed", type=int, default=None, metavar="N", help="of the search; default: 0")


def read_asked(arguments: argparse.Namespace) -> tuple[list[str], Asked | None]:
    """(`--set` texts that are no ranges, what is asked of a search or None); raises UserError."""
    plain, ranges = split_settings(arguments.set)
    if arguments.search is None:
        _refuse_without_search(arguments, ranges)
        return plain, None
    if arguments.search not in SEARCHES:
        raise UserError(
            f"--search {arguments.search!r} is not known{nearest(arguments.search, SEARCHES)}; choose from "
            f"{', '.join(SEARCHES)}"
        )
    if not ranges:
        raise UserError(f"--search {arguments.search} has nothing to vary; add a range such as --set lr=log:1e-4:1e-2")
    if arguments.objective is None:
        raise UserError(f"--search {arguments.search} needs --objective COLUMN:min or COLUMN:max")
    if arguments.only:
        raise UserError("--only with --search: a search decides from whole batches; leave one of the two out")
    objectives = read_objectives(arguments.objective)
    stop, eta, rungs = _read_stop(arguments, len(objectives))
    usual = usual_size(arguments.search, len(ranges))
    asked = Asked(
        kind=arguments.search,
        ranges=tuple(ranges),
        objectives=objectives,
        conditions=read_conditions(arguments.where or ()),
        trials=_at_least(1, "--trials", arguments.trials, _ENDLESS if arguments.spend else TRIALS),
        batch=_at_least(1, "--batch", arguments.batch, max(usual, eta ** (rungs - 1)) if stop else usual),
        seed=_at_least(0, "--search-seed", arguments.search_seed, 0),
        each=arguments.each or "",
        confirm=_at_least(0, "--confirm", arguments.confirm, CONFIRM),
        spend=arguments.spend or "",
        stop=stop,
        eta=eta,
        rungs=rungs,
    )
    if stop:
        if max(asked.sizes) > _MOST:
            sizes = f"makes brackets of {max(asked.sizes)} trials"
            raise UserError(f"--rungs {rungs} with --eta {eta} {sizes}; choose fewer rungs, or a smaller --batch")
        asked = replace(asked, trials=whole_brackets(asked.trials, asked.sizes))
    return plain, asked


def _read_stop(arguments: argparse.Namespace, objectives: int) -> tuple[str, int, int]:
    """(how trials are stopped early, eta, rungs); raises UserError."""
    if arguments.stop is None:
        for name in ("eta", "rungs"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} is an option of early stopping; add --stop halving")
        return "", ETA, RUNGS
    if arguments.stop not in STOPS:
        raise UserError(f"--stop {arguments.stop!r} is not known{nearest(arguments.stop, STOPS)}; {' or '.join(STOPS)}")
    if objectives > 1:
        raise UserError("--stop takes one objective, which says who goes on; leave out --stop, or name one objective")
    if arguments.stop == HYPERBAND and arguments.batch is not None:
        raise UserError("--batch with --stop hyperband: its brackets have sizes of their own; leave out --batch")
    return arguments.stop, _at_least(2, "--eta", arguments.eta, ETA), _at_least(2, "--rungs", arguments.rungs, RUNGS)


def _refuse_without_search(arguments: argparse.Namespace, ranges: Sequence[str]) -> None:
    if ranges:
        raise UserError(f"--set {ranges[0]} is a range; add --search tpe --objective COLUMN:min, or write one value")
    for name in _NEEDS_SEARCH:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is an option of a search; add --search tpe")


def _at_least(least: int, option: str, value: Any, default: int) -> int:
    number = default if value is None else int(value)
    if number < least:
        raise UserError(f"{option} {number} is below {least}; choose {least} or more")
    return number
