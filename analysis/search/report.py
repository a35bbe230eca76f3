"""The report of a search: best settings, every trial, and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.markdown import table
from analysis.search import plots
from analysis.search.importance import importances
from analysis.search.trials import Axis, Goal, StudyTable, edges

_SHOWN = 10  # trials listed per study; all are in trials.parquet
_CHOSEN_NOTE = (
    "The value of the trial is the one by which the setting was chosen, so it flatters the setting. `trained again`: "
    "mean of fresh trainings of the setting, from seeds that the search did not use, {data}, with the 95% t interval "
    "for the mean over trainings on these data. `optimism`: by how much the chosen value is better than that mean, "
    "with the same interval. {rest}"
)
_UNSEEN = (
    "measured on data that no trial was scored on",
    "It holds what the choice gained by chance, and also how much easier the search's data are than these.",
)
_SEEN = (
    "measured on the data of the search",
    "What suits only these data is in both numbers.",
)

_IMPORTANCE_NOTE = (
    "Functional ANOVA of a random forest fitted to the trials, over the whole space: a field that matters only near "
    "the best settings has a small share. The trials were chosen by the search, so shares are rough."
)
_EARLY_NOTE = (
    "Of all trials that were measured at {at}, and by their values there: few went on, and values of other budgets do "
    "not compare."
)


@dataclass(frozen=True)
class Evidence:
    """What a search found. facts: lines on what was searched. unseen: fresh trainings are measured on other data."""

    question: str
    axes: tuple[Axis, ...]
    goals: tuple[Goal, ...]
    studies: tuple[StudyTable, ...]
    facts: tuple[str, ...] = ()
    unseen: bool = False


def write_report(evidence: Evidence, out: Path) -> list[str]:
    """Write report.md, trials.parquet and the figures into the folder `out`; returns lines for the screen."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Search: {evidence.question}", "\n".join(f"- {fact}" for fact in evidence.facts)]
    best, lines = _best(evidence)
    parts += ["## Best setting" + ("s" if len(evidence.studies) > 1 else ""), best, _chosen_note(evidence)]
    parts += _warnings(evidence, lines)
    plots.progress(evidence.studies, evidence.goals[0], out / "progress.png")
    parts += ["## Budget spent and best found", "![best value against trials](progress.png)"]
    for i, study in enumerate(evidence.studies):
        parts += _study(evidence, study, f"-{i}" if len(evidence.studies) > 1 else "", out)
    everything = [s.trials.assign(group=s.group) for s in evidence.studies]
    pd.concat(everything, ignore_index=True).to_parquet(out / "trials.parquet", index=False)
    (out / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return lines


def _chosen_note(evidence: Evidence) -> str:
    data, rest = _UNSEEN if evidence.unseen else _SEEN
    return _CHOSEN_NOTE.format(data=data, rest=rest)


def _study(evidence: Evidence, study: StudyTable, end: str, out: Path) -> list[str]:
    """Sections on one study, its figures written with `end` after their names."""
    of = f" of {study.group}" if study.group else ""
    parts: list[str] = []
    if len(evidence.goals) > 1 and study.trials["allowed"].any():
        plots.pareto(study, evidence.goals, out / f"pareto{end}.png")
        parts += [f"## Pareto front{of}", _front(evidence, study), f"![Pareto front](pareto{end}.png)"]
    parts.append(f"## What matters{of}")
    parts += [_EARLY_NOTE.format(at=study.early_at)] if study.early else []
    parts += _what_matters(evidence, study.early or study, end, out)
    return [*parts, f"## Trials{of}", _trials(evidence, study)]


def _what_matters(evidence: Evidence, study: StudyTable, end: str, out: Path) -> list[str]:
    """Importance of the fields, and figures over them."""
    parts: list[str] = []
    goal, done = evidence.goals[0], study.trials[study.trials["state"] == "done"]
    order = list(evidence.axes)
    try:
        shares = importances(study, evidence.axes, goal)
    except ValueError as error:
        parts.append(f"Importance of the fields: – ({error}).")
    else:
        order = sorted(evidence.axes, key=lambda a: -shares[a.field])
        rows = [[a.field, f"{shares[a.field]:.2f}"] for a in order]
        parts += [table(["field", f"share of {goal.column}'s variance"], rows), _IMPORTANCE_NOTE]
    if len(done):
        plots.slices(study, evidence.axes, goal, out / f"slices{end}.png")
        parts.append(f"![{goal.column} against each field](slices{end}.png)")
    if len(done) and len(order) > 1:
        if plots.contour(study, (order[0], order[1]), goal, out / f"contour{end}.png") is not None:
            parts.append(f"![{goal.column} over {order[0].field} and {order[1].field}](contour{end}.png)")
        plots.parallel(study, evidence.axes, goal, out / f"parallel{end}.png")
        parts.append(f"![all fields of every trial](parallel{end}.png)")
    return parts


def _front(evidence: Evidence, study: StudyTable) -> str:
    names = [*(a.field for a in evidence.axes), *(g.column for g in evidence.goals)]
    front = study.front(evidence.goals)
    return table(["trial", *names], [[str(r["trial"]), *(_text(r[n]) for n in names)] for _, r in front.iterrows()])


def _best(evidence: Evidence) -> tuple[str, list[str]]:
    """(table of each study's best trial, the same as lines)."""
    rows, lines = [], []
    for study in evidence.studies:
        best = study.best(evidence.goals)
        head = [study.group] if study.group else []
        name = f"{study.group}: " if study.group else ""
        if best is None:
            rows.append([*head, "–", *("–" for _ in (*evidence.axes, *evidence.goals)), "–", "–", "–"])
            lines.append(f"best         {name}–: no trial has a value that meets every condition")
            continue
        point = [_text(best[a.field]) for a in evidence.axes]
        values = [_text(best[g.column]) for g in evidence.goals]
        rows.append([*head, str(best["trial"]), *point, *values, *_again(evidence.goals[0], study, best)])
        spelled = " ".join(f"{a.field}={v}" for a, v in zip(evidence.axes, point, strict=True))
        found = " ".join(f"{g.column}={v}" for g, v in zip(evidence.goals, values, strict=True))
        lines.append(f"best         {name}{spelled}: {found}")
        mean, limits, optimism = _again(evidence.goals[0], study, best)
        more = "" if optimism == "–" else f", 95% interval {limits}, optimism {optimism}"
        lines.append(f"again        {name}{evidence.goals[0].column}={mean}{more}")
    group = ["group"] if any(s.group for s in evidence.studies) else []
    names = [*(a.field for a in evidence.axes), *(f"{g.column} ({g.direction})" for g in evidence.goals)]
    return table([*group, "trial", *names, "trained again", "95% interval", "optimism"], rows), lines


def _again(goal: Goal, study: StudyTable, best: pd.Series) -> list[str]:
    """Mean of the fresh trainings, its interval and the optimism, as texts."""
    again, interval = study.again, study.again.interval()
    if interval is None:
        return [f"– ({again.why})", "–", "–"]
    limits = f"{interval.lo:.6g} to {interval.hi:.6g}" if interval.lo == interval.lo else f"– ({interval.needs})"
    chosen = float(best[goal.column])
    lo, hi = sorted(goal.sign * (end - chosen) for end in (interval.lo, interval.hi))
    shift = f"{again.optimism(goal, chosen):.3g}" + (f" ({lo:.3g} to {hi:.3g})" if lo == lo else "")
    return [f"{interval.value:.6g}", limits, shift]


def _warnings(evidence: Evidence, lines: list[str]) -> list[str]:
    """A list of what to look at before the best setting is believed; the lines go on the screen too."""
    found = []
    for study in evidence.studies:
        name = f"{study.group}: " if study.group else ""
        best = study.best(evidence.goals)
        found += [f"{name}{line}" for line in edges(best, evidence.axes)] if best is not None else []
        failed = study.trials[study.trials["state"] == "failed"]
        if len(failed):
            found.append(f"{name}{len(failed)} of {len(study.trials)} trials failed; first: {failed['reason'].iloc[0]}")
    lines += [f"note         {line}" for line in found]
    return ["\n".join(f"- {line}" for line in found)] if found else []


def _trials(evidence: Evidence, study: StudyTable) -> str:
    """The best trials of a study, then those that were stopped, the furthest first, then those without a value."""
    goal, trials = evidence.goals[0], study.trials
    kind = trials["state"].map({"done": 0, "stopped": 1}).fillna(2)
    at = -trials["measured_at"] if study.stops else kind
    keys = pd.DataFrame({"kind": kind, "at": at, "loss": goal.loss(trials[goal.column])})
    shown = trials.loc[keys.sort_values(["kind", "at", "loss"], kind="stable").index[:_SHOWN]]
    names = [*(a.field for a in evidence.axes), *(g.column for g in evidence.goals)]
    rows = [
        [str(row["trial"]), *(_text(row[name]) for name in names), _state(row, study.stops)]
        for _, row in shown.iterrows()
    ]
    count = f"{len(shown)} of {len(study.trials)} trials, the best first; `trials.parquet` has all."
    return f"{count}\n\n{table(['trial', *names, 'state'], rows)}"


def _state(row: pd.Series, stops: str) -> str:
    if row["state"] == "stopped":
        return f"stopped, value at {stops}={row['measured_at']}"
    if row["allowed"]:
        return str(row["state"])
    return "breaks a condition" if row["state"] == "done" else str(row["reason"] or row["state"])


def _text(value: object) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
