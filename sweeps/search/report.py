"""From a search's trials to the tables that `analysis` turns into the report, and `search.json` for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.search.report import Evidence, write_report
from analysis.search.trials import Again, Axis, Goal, StudyTable
from sweeps.core.cells import CellT
from sweeps.search.search import Search
from sweeps.search.study import Outcome, Study, Trial


def write_evidence(search: Search[CellT], question: str, out: Path) -> list[str]:
    """Write the search's report into the folder `out`; returns lines for the screen."""
    studies = tuple(_of_study(search, s) for s in search.studies)
    unseen = bool(search.sweep.unseen)
    evidence = Evidence(question, _axes(search), _goals(search), studies, tuple(_facts(search)), unseen)
    lines = write_report(evidence, out)
    (out / "search.json").write_text(json.dumps(_record(search), indent=1), encoding="utf-8")
    return lines


def _axes(search: Search[CellT]) -> tuple[Axis, ...]:
    space = search.rules.space
    return tuple(Axis(d.field, d.kind, d.lo, d.hi, tuple(str(c) for c in d.choices)) for d in space)


def _goals(search: Search[CellT]) -> tuple[Goal, ...]:
    return tuple(Goal(o.column, o.direction) for o in search.rules.objectives)


def _facts(search: Search[CellT]) -> list[str]:
    rules, asked = search.rules, search.asked
    facts = [f"`{d}`" for d in rules.space]
    counts = " and ".join(dict.fromkeys(str(len(search.outcomes(s))) for s in search.studies))
    sizes = ", ".join(map(str, rules.sizes))
    facts = [f"searched by {rules.kind}: {', '.join(facts)}; {counts} trials in batches of {sizes}"]
    if stop := rules.stop:
        rungs = ", ".join(map(str, stop.amounts))
        facts.append(
            f"stopped early by {stop.kind}: each batch is measured at {stop.field}={rungs} in turn, and the best 1/"
            f"{stop.eta} of those at one go on to the next; the value of a trial is the one at {stop.amounts[-1]}"
        )
    facts.append(f"objective: {', '.join(map(str, rules.objectives))}, the mean over a trial's cells")
    if rules.conditions:
        facts.append(f"conditions: {', '.join(map(str, rules.conditions))}")
    if asked.spend:
        facts.append(f"ended by --spend {asked.spend}" if search.spent else f"--spend {asked.spend} is not used up")
    if asked.each:
        facts.append(f"each value of {asked.each} has a search of its own, of as many trials")
    return facts


def _again(search: Search[CellT], study: Study[CellT]) -> Again:
    """What the best setting's fresh trainings measured of the first objective."""
    outcomes = search.fresh(study)
    values = tuple(o.values[0] for o in outcomes if o.state == "done")
    failed = sum(o.state == "failed" for o in outcomes)
    if not search.confirm:
        why = "--confirm 0" if search.asked.confirm == 0 else "this sweep has no seeds"
    else:
        why = f"{len(values)} of {search.confirm} fresh trainings are done, {failed} failed"
        why += next((f": {o.reason}" for o in outcomes if o.state == "failed"), "")
    return Again(values, failed, why)


def _of_study(search: Search[CellT], study: Study[CellT]) -> StudyTable:
    """A study's tables; where trials are stopped early also all that were measured at the first rung, as measured
    there."""
    table, again, stop = _table(search, study), _again(search, study), search.rules.stop
    if stop is None:
        return StudyTable(study.group, table, again)
    first = [study.outcome(t, search.known, 0) if 0 in t.rungs else None for t in study.trials(len(table))]
    rows = [_row(search, t, o) for t, o in zip(study.trials(len(table)), first, strict=True) if o and o.state == "done"]
    early = StudyTable(study.group, pd.DataFrame(rows, columns=table.columns))
    return StudyTable(study.group, table, again, stop.field, early, f"{stop.field}={stop.amounts[0]}")


def _table(search: Search[CellT], study: Study[CellT]) -> pd.DataFrame:
    outcomes = search.outcomes(study)
    return pd.DataFrame([_row(search, t, o) for t, o in zip(study.trials(len(outcomes)), outcomes, strict=True)])


def _row(search: Search[CellT], trial: Trial[CellT], outcome: Outcome) -> dict[str, Any]:
    objectives = search.rules.objectives
    values = outcome.values or [math.nan] * len(objectives)
    return {
        "trial": trial.number,
        "state": outcome.state,
        "reason": outcome.reason,
        "allowed": outcome.allowed,
        **({"measured_at": search.rules.stop.amounts[outcome.rung]} if search.rules.stop else {}),
        **trial.point,
        **{o.column: v for o, v in zip(objectives, values, strict=True)},
        "cells": " ".join(cell.key for cell in trial.cells),
    }


def _record(search: Search[CellT]) -> dict[str, Any]:
    """What a program reads of a search: the rules, each study's best trial, and its front with several objectives."""

    def described(study: Study[CellT], outcomes: Sequence[Outcome], number: int | None) -> dict[str, Any] | None:
        if number is None:
            return None
        trial, names = study.trials(len(outcomes))[number], [o.column for o in search.rules.objectives]
        values = dict(zip(names, outcomes[number].values, strict=True))
        return {"trial": number, "setting": trial.point, "values": values, "cells": [c.key for c in trial.cells]}

    studies = []
    for study in search.studies:
        outcomes = search.outcomes(study)
        front = study.front(outcomes) if len(search.rules.objectives) > 1 else []
        studies.append(
            {
                "study": study.name,
                "group": study.group,
                "trials": len(outcomes),
                "failed": sum(o.state == "failed" for o in outcomes),
                "stopped": sum(o.state == "stopped" for o in outcomes),
                "best": described(study, outcomes, study.best(outcomes)),
                "again": [list(o.values) for o in search.fresh(study)],
                "front": [described(study, outcomes, i) for i in front],
            }
        )
    objectives = [str(o) for o in search.rules.objectives]
    stop = {"stop": str(search.rules.stop)} if search.rules.stop else {}
    return {"search": search.rules.kind, "objectives": objectives, **stop, "studies": studies}
