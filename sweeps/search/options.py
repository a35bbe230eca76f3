"""The search's options on a sweep's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.core.cells import UserError, nearest
from sweeps.search.objective import Condition, Objective, read_conditions, read_objectives
from sweeps.search.points import SEARCHES, usual_size
from sweeps.search.space import split_settings

TRIALS, CONFIRM = 20, 5
_ENDLESS = 10_000  # trials where only --spend ends the search
_NEEDS_SEARCH = ("trials", "objective", "where", "each", "batch", "search_seed", "confirm", "spend")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command line asks of a search. each: the preset's field whose values are searched one by one."""

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

    def arguments(self) -> list[str]:
        """The options that ask for this, as they are written; the ranges are among those of `--set`."""
        out = ["--search", self.kind, "--objective", ",".join(map(str, self.objectives))]
        out += ["--trials", str(self.trials), "--batch", str(self.batch), "--search-seed", str(self.seed)]
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
    asked = Asked(
        kind=arguments.search,
        ranges=tuple(ranges),
        objectives=read_objectives(arguments.objective),
        conditions=read_conditions(arguments.where or ()),
        trials=_at_least(1, "--trials", arguments.trials, _ENDLESS if arguments.spend else TRIALS),
        batch=_at_least(1, "--batch", arguments.batch, usual_size(arguments.search, len(ranges))),
        seed=_at_least(0, "--search-seed", arguments.search_seed, 0),
        each=arguments.each or "",
        confirm=_at_least(0, "--confirm", arguments.confirm, CONFIRM),
        spend=arguments.spend or "",
    )
    return plain, asked


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
