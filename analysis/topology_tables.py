"""Statistics of a finished topology audit: one long table, and a verdict a representation.

Shapes: R runs, B null draws a run, P diagram points (`pairs_P2`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.audit import Ratio, beats_nulls, pooled_ratio, top1, top1_ratio
from analysis.diagram_stability import birth_death
from analysis.multiplicity import holm
from analysis.power import advice, draws_needed
from analysis.topology_stability import checkpoints, stability
from analysis.topology_unit import FULL_TABLE, Place, Unit
from analysis.universal_null import universal_null
from analysis.verdict import ALPHA, Criteria, Verdict, criteria, judge

COLUMNS = ("table", "representation", "metric", "route", "statistic", "value", "lo", "hi", "p", "null")
UNIVERSAL_COLUMNS = (*COLUMNS[:4], "birth", "death", "p", "bonferroni", "bh")
BASELINES = ("bits_r4", "bits_r2", "counts_r4", "physchem")
_COMPRESSED = ("pca256", "rp256", "ae256")


@dataclass(frozen=True)
class Audit:
    """The long table (COLUMNS), verdicts by (table, representation), and sentences on how far the data reach.

    `universal` holds every loop that the universal null judges (UNIVERSAL_COLUMNS), with its raw and adjusted p.
    `published_rule` says that verdicts rest on "ratio above 1", the study's own rule, because the draws at hand are
    too few for any Monte-Carlo p below ALPHA.
    """

    cells: pd.DataFrame
    universal: pd.DataFrame
    verdicts: dict[tuple[str, str], Verdict]
    advice: list[str]
    published_rule: bool


def audit(units: Sequence[Unit]) -> Audit:
    """Every statistic of every unit, and verdicts by rule.

    Holm's adjustment runs over the representations of a table: one test each, under its first metric and route. The
    other metrics and routes count for the criterion of that name, unadjusted.
    """
    rows: list[dict[str, object]] = []
    loops: list[pd.DataFrame] = []
    p_of: dict[Place, float] = {}
    for unit in units:
        rows += _unit_rows(unit, p_of)
        rows += _universal_rows(unit, loops)
    for place, found in checkpoints(units).items():
        rows += [_row(place, f"checkpoint_{name}", value=value) for name, value in found.items()]
    adjusted: dict[Place, float] = {}
    first: dict[tuple[str, str], Unit] = {}
    for unit in units:
        first.setdefault(unit.place[:2], unit)
    for table in dict.fromkeys(place[0] for place in p_of):
        family = [u.place for (name, _), u in first.items() if name == table and u.place in p_of]
        adjusted |= holm({place: p_of[place] for place in family})
    rows += [_row(place, "p_holm", value=p, p=p) for place, p in adjusted.items()]
    tests = {table: sum(place[0] == table for place in adjusted) for table in {place[0] for place in adjusted}}
    few = any(_draws(u) < draws_needed(ALPHA, tests[u.place[0]]) for u in first.values() if u.place in adjusted)
    above_1 = {u.place: 0.0 if _ratio(u).value > 1 else 1.0 for u in units if few and u.tested_runs()}
    return Audit(
        cells=pd.DataFrame(rows, columns=list(COLUMNS)),
        universal=pd.concat(loops, ignore_index=True) if loops else pd.DataFrame(columns=list(UNIVERSAL_COLUMNS)),
        verdicts=_verdicts(units, above_1 or p_of, above_1 or adjusted),
        advice=[
            f"{' '.join(u.place)}: {_advice(u, tests[u.place[0]] if u.place in adjusted else 1)}"
            for u in units
            if u.tested_runs() and len(u.runs) > 1
        ],
        published_rule=few,
    )


def _draws(unit: Unit) -> int:
    return min(values.shape[1] for values in unit.null_RB(unit.tested_runs()).values())


def _advice(unit: Unit, tests: int) -> str:
    return advice(unit.top1(unit.runs), unit.null_RB(unit.tested_runs()), runs=len(unit.runs), alpha=ALPHA, tests=tests)


def _ratio(unit: Unit) -> Ratio:
    return top1_ratio(unit.top1(unit.runs), unit.null_RB(unit.tested_runs()))


def _row(place: Place, statistic: str, **values: object) -> dict[str, object]:
    return {**dict(zip(COLUMNS[:4], place, strict=True)), "statistic": statistic, **values}


def _unit_rows(unit: Unit, p_of: dict[Place, float]) -> list[dict[str, object]]:
    place, rows = unit.place, []
    if FULL_TABLE in unit.observed:
        rows.append(_row(place, "observed_top1_full", value=top1(unit.observed[FULL_TABLE])))
    if unit.runs:
        top = unit.top1(unit.runs)
        lo, hi = _mean_interval(top)
        rows.append(_row(place, "observed_top1_mean", value=top.mean(), lo=lo, hi=hi))
        rows.append(_row(place, "observed_count_mean", value=np.mean([len(unit.observed[r]) for r in unit.runs])))
    tested = unit.tested_runs()
    if tested:
        nulls = unit.null_RB(tested)
        ratio = _ratio(unit)
        rows.append(_row(place, "top1_ratio", value=ratio.value, lo=ratio.lo, hi=ratio.hi, null=ratio.null))
        rows.append(_row(place, "share_above_p95", value=ratio.share_above, null=ratio.null))
        if all(sum(map(len, d)) for d in unit.null_diagrams.values()):
            pooled = pooled_ratio(unit.top1(unit.runs), unit.null_diagrams)
            rows.append(_row(place, "pooled_ratio", value=pooled.value, lo=pooled.lo, hi=pooled.hi, null=pooled.null))
        test = beats_nulls(unit.top1(tested), nulls)
        p_of[place] = test.p
        rows.append(_row(place, "p_max_over_nulls", value=test.p, lo=test.p_lo, hi=test.p_hi, p=test.p, null=test.null))
        rows += [_row(place, "p_null", value=p, p=p, null=name) for name, p in test.p_by_null.items()]
    diagrams = [unit.observed[run] for run in unit.runs]
    if len(diagrams) >= 2:
        rows += [_row(place, name, value=value) for name, value in stability(diagrams).items()]
    return rows


def _universal_rows(unit: Unit, loops: list[pd.DataFrame]) -> list[dict[str, object]]:
    """Counts of a unit; its loops, each with its p, are appended to `loops`."""
    try:
        found = universal_null(unit.observed[min(unit.observed)])  # the full table (-1) where there is one
    except ValueError:  # fewer than two usable loops: nothing to centre the statistic with
        return []
    place = dict(zip(COLUMNS[:4], unit.place, strict=True))
    judged = {"birth": found.pairs_P2[:, 0], "death": found.pairs_P2[:, 1], "p": found.p}
    adjusted = {"bonferroni": found.bonferroni, "bh": found.benjamini_hochberg}
    loops.append(pd.DataFrame({**place, **judged, **adjusted}, columns=list(UNIVERSAL_COLUMNS)))
    bonferroni, hochberg = found.significant(ALPHA)
    smallest = float(found.p.min())
    return [
        _row(unit.place, "universal_loops", value=len(found.p), null="universal"),
        _row(unit.place, "universal_left_out", value=found.left_out, null="universal"),
        _row(unit.place, "universal_significant_bonferroni", value=bonferroni, p=smallest, null="universal"),
        _row(unit.place, "universal_significant_bh", value=hochberg, p=smallest, null="universal"),
    ]


def _mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95% t interval of the mean over runs; NaN from one run."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def _verdicts(
    units: Sequence[Unit], p_of: Mapping[Place, float], adjusted: Mapping[Place, float]
) -> dict[tuple[str, str], Verdict]:
    found: dict[str, dict[str, Criteria]] = {}
    for table in dict.fromkeys(unit.place[0] for unit in units):
        of_table = [u for u in units if u.place[0] == table]
        for name in dict.fromkeys(u.place[1] for u in of_table):
            mine = [u for u in of_table if u.place[1] == name]
            first = mine[0]
            ratio = _ratio(first) if first.tested_runs() else None
            diagrams = [first.observed[r] for r in first.runs]
            compressed = {
                u.place[1]: p_of[u.place]
                for u in of_table
                if name.startswith("bits") and u.place[1].split("_")[0] in _COMPRESSED and u.place in p_of
            }
            found.setdefault(table, {})[name] = criteria(
                p_adjusted=adjusted.get(first.place),
                share_above=ratio.share_above if ratio else None,
                p_by_metric={f"{u.place[2]} {u.place[3]}": p_of[u.place] for u in mine if u.place in p_of},
                p_by_compression=compressed or None,
                spread=birth_death(diagrams).spread if len(diagrams) >= 2 else None,
            )
    return {
        (table, name): judge(name, by_name, [b for b in BASELINES if b in by_name])
        for table, by_name in found.items()
        for name in by_name
    }
