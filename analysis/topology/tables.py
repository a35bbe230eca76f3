"""Statistics of a finished topology audit: one long table, and a verdict a representation.

Shapes: R runs, B null draws a run, P diagram points (`pairs_P2`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.multiplicity import ALPHA, holm
from analysis.thresholds import least_draws
from analysis.topology.null_tests import NullTest, Ratio, beats_nulls, mean_interval, pooled_ratio, top1_ratio
from analysis.topology.power import advice
from analysis.topology.stability import birth_death, checkpoints, stability
from analysis.topology.unit import FULL_TABLE, Place, Unit, top1
from analysis.topology.universal_null import universal_null
from analysis.topology.verdict import Verdict, criteria, judge

COLUMNS = ("table", "representation", "metric", "route", "statistic", "value", "lo", "hi", "p", "null", "needs")
UNIVERSAL_COLUMNS = (*COLUMNS[:4], "birth", "death", "p", "bonferroni", "bh")
BASELINES = ("bits_r4", "bits_r2", "counts_r4", "physchem")
_COMPRESSED = ("pca256", "rp256", "ae256")


@dataclass(frozen=True)
class Audit:
    """The long table (COLUMNS), verdicts by (table, representation), and sentences on how far the data reach.

    `universal` holds every loop that the universal null judges (UNIVERSAL_COLUMNS), with its raw and adjusted p.
    `few_draws` says that some representation has too few draws for any p below ALPHA, so no verdict.
    """

    cells: pd.DataFrame
    universal: pd.DataFrame
    verdicts: dict[tuple[str, str], Verdict]
    advice: list[str]
    few_draws: bool


@dataclass(frozen=True)
class _Tests:
    """Tests of a unit: of its subsamples together, of the full table; `own` is the one its verdict rests on."""

    subsamples: NullTest | None
    full: NullTest | None

    @property
    def own(self) -> NullTest | None:
        return self.full or self.subsamples


def audit(units: Sequence[Unit]) -> Audit:
    """Every statistic of every unit, and verdicts by rule.

    A verdict rests on the test of the full table where that was drawn for, else on that of the subsamples together.
    Holm's adjustment runs over the representations of a table: one test each, under its first metric and route. The
    other metrics and routes count for the criterion of that name.
    """
    tests = {unit.place: _tests(unit) for unit in units}
    ratios = {unit.place: _ratio(unit) for unit in units if unit.tested_runs()}
    rows: list[dict[str, object]] = []
    loops: list[pd.DataFrame] = []
    for unit in units:
        rows += (
            _observed_rows(unit) + _ratio_rows(unit, ratios.get(unit.place)) + _test_rows(unit.place, tests[unit.place])
        )
        rows += _universal_rows(unit, loops)
    for place, found in checkpoints(units).items():
        rows += [_row(place, f"checkpoint_{name}", value=value) for name, value in found.items()]
    first: dict[tuple[str, str], Unit] = {}
    for unit in units:
        first.setdefault(unit.place[:2], unit)
    adjusted: dict[Place, float] = {}
    needs: dict[Place, str] = {}
    for table in dict.fromkeys(unit.place[0] for unit in units):
        family = {u.place: own for (name, _), u in first.items() if name == table and (own := tests[u.place].own)}
        adjusted |= holm({place: own.p for place, own in family.items()})
        needs |= {place: _few(own, len(family)) for place, own in family.items()}
    rows += [_row(place, "p_holm", value=p, p=p, needs=needs[place]) for place, p in adjusted.items()]
    size = {table: sum(place[0] == table for place in adjusted) for table in {place[0] for place in adjusted}}
    return Audit(
        cells=pd.DataFrame(rows, columns=list(COLUMNS)),
        universal=pd.concat(loops, ignore_index=True) if loops else pd.DataFrame(columns=list(UNIVERSAL_COLUMNS)),
        verdicts=_verdicts(units, tests, ratios, adjusted, needs),
        advice=[
            f"{' '.join(u.place)}: "
            + advice(ratios[u.place], own, runs=len(u.runs), tests=size[u.place[0]] if u.place in adjusted else 1)
            for u in units
            if u.place in ratios and (own := tests[u.place].own)
        ],
        few_draws=any(needs.values()),
    )


def _tests(unit: Unit) -> _Tests:
    runs = unit.tested_runs()
    subsamples = beats_nulls(unit.top1(runs), unit.null_RB(runs), joint=unit.joint) if runs else None
    whole = [FULL_TABLE]
    full = beats_nulls(unit.top1(whole), unit.null_RB(whole)) if unit.full_tested else None
    return _Tests(subsamples, full)


def _few(test: NullTest, family: int) -> str:
    """What a test lacks to reach a p below ALPHA as one of a family; empty where it lacks nothing."""
    if family * test.least_p < ALPHA:
        return ""
    return f"needs ≥ {test.draws_needed(ALPHA, family)} null draws, there are {test.draws}"


def _ratio(unit: Unit) -> Ratio:
    return _whole_interval(unit, top1_ratio(unit.top1(unit.runs), unit.null_RB(unit.tested_runs())))


def _whole_interval(unit: Unit, ratio: Ratio) -> Ratio:
    """The ratio without its interval where the runs cannot give one."""
    return replace(ratio, lo=0.0, hi=math.inf) if _runs_lack(unit) else ratio


def _runs_lack(unit: Unit) -> str:
    if len(unit.runs) < 2:
        return "needs ≥ 2 runs"
    if unit.tested_runs() != unit.runs:
        return "needs null draws of every run"
    return "" if np.ptp(unit.top1(unit.runs)) else "needs runs that differ"


def _ratio_needs(ratio: Ratio) -> str:
    if ratio.lo > 0 or ratio.effective >= least_draws():
        return ""
    return f"lower limit needs ≥ {least_draws()} independent null draws, {ratio.draws} are worth {ratio.effective:.0f}"


def _row(place: Place, statistic: str, **values: object) -> dict[str, object]:
    return {**dict(zip(COLUMNS[:4], place, strict=True)), "statistic": statistic, **values}


def _observed_rows(unit: Unit) -> list[dict[str, object]]:
    place, rows = unit.place, []
    if FULL_TABLE in unit.observed:
        rows.append(_row(place, "observed_top1_full", value=top1(unit.observed[FULL_TABLE])))
    if FULL_TABLE in unit.quantile:
        rows.append(_row(place, "observed_top1_quantile_full", value=unit.quantile[FULL_TABLE]))
    if unit.runs:
        top = unit.top1(unit.runs)
        lo, hi = mean_interval(top)
        lack = "" if np.isfinite(lo) else "needs ≥ 2 runs that differ"
        rows.append(_row(place, "observed_top1_mean", value=top.mean(), lo=lo, hi=hi, needs=lack))
        rows.append(_row(place, "observed_count_mean", value=np.mean([len(unit.observed[r]) for r in unit.runs])))
    if shares := [unit.quantile[run] for run in unit.runs if run in unit.quantile]:
        rows.append(_row(place, "observed_top1_quantile_mean", value=np.mean(shares)))
    diagrams = [unit.observed[run] for run in unit.runs]
    if len(diagrams) >= 2:
        rows += [_row(place, name, value=value) for name, value in stability(diagrams).items()]
    return rows


def _ratio_rows(unit: Unit, ratio: Ratio | None) -> list[dict[str, object]]:
    rows = []
    if ratio:
        rows.append(_interval_row(unit, "top1_ratio", ratio))
        rows.append(_row(unit.place, "share_above_p95", value=ratio.share_above, null=ratio.null))
        diagrams = unit.subsample_diagrams()
        if diagrams and all(sum(len(d) for drawn in by_run.values() for d in drawn) for by_run in diagrams.values()):
            pooled = _whole_interval(unit, pooled_ratio(unit.top1(unit.runs), diagrams))
            rows.append(_interval_row(unit, "pooled_ratio", pooled))
    if unit.full_tested:
        full = top1_ratio(unit.top1([FULL_TABLE]), {n: values[0] for n, values in unit.null_RB([FULL_TABLE]).items()})
        rows.append(_interval_row(unit, "top1_ratio_full", full, whole=True))
    return rows


def _interval_row(unit: Unit, statistic: str, ratio: Ratio, whole: bool = False) -> dict[str, object]:
    """A ratio's row; a limit that the draws do not give is NaN."""
    lo, hi = ratio.lo if ratio.lo > 0 else math.nan, ratio.hi if math.isfinite(ratio.hi) else math.nan
    lack = (not whole and _runs_lack(unit)) or _ratio_needs(ratio)
    return _row(unit.place, statistic, value=ratio.value, lo=lo, hi=hi, null=ratio.null, needs=lack)


def _test_rows(place: Place, tests: _Tests) -> list[dict[str, object]]:
    rows = []
    for name, test in (("p_subsamples", tests.subsamples), ("p_full_table", tests.full)):
        if test:
            rows.append(_row(place, name, value=test.p, lo=test.p_lo, hi=test.p_hi, p=test.p, null=test.null))
    if own := tests.own:
        lack = _few(own, 1)
        at = {"lo": own.p_lo, "hi": own.p_hi, "p": own.p, "null": own.null, "needs": lack}
        rows.append(_row(place, "p_max_over_nulls", value=own.p, **at))
        rows += [_row(place, "p_null", value=p, p=p, null=name) for name, p in own.p_by_null.items()]
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


def _verdicts(
    units: Sequence[Unit],
    tests: Mapping[Place, _Tests],
    ratios: Mapping[Place, Ratio],
    adjusted: Mapping[Place, float],
    needs: Mapping[Place, str],
) -> dict[tuple[str, str], Verdict]:
    out: dict[tuple[str, str], Verdict] = {}
    for table in dict.fromkeys(unit.place[0] for unit in units):
        of_table = [u for u in units if u.place[0] == table]
        by_name: dict[str, list[Unit]] = {}
        for unit in of_table:
            by_name.setdefault(unit.place[1], []).append(unit)
        several = sum(len(mine) > 1 for mine in by_name.values())
        bits = sum(name.startswith("bits") for name in by_name)
        found, lacks = {}, {}
        for name, mine in by_name.items():
            place = mine[0].place
            lacks[name] = needs.get(place, "")
            smaller = (
                [u for u in of_table if u.place[1].split("_")[0] in _COMPRESSED] if name.startswith("bits") else []
            )
            found[name] = criteria(
                p_adjusted=None if lacks[name] else adjusted.get(place),
                share_above=ratios[place].share_above if place in ratios else None,
                p_by_metric=_p(mine, tests, several * (len(mine) - 1)),
                p_by_compression=_p(smaller, tests, bits * (len(smaller) - len(smaller) // 2)),
                spread=_spread(mine[0]),
                metric_family=several,
                compression_family=bits,
            )
        known = [b for b in BASELINES if b in by_name]
        out |= {(table, name): judge(name, found, known, lacks[name]) for name in by_name}
    return out


def _p(units: Sequence[Unit], tests: Mapping[Place, _Tests], factor: int) -> dict[str, float]:
    """p of each unit's test, by its place; none is counted whose draws reach no p below ALPHA / factor."""
    own = {" ".join(unit.place[1:]): tests[unit.place].own for unit in units}
    return {name: test.p for name, test in own.items() if test and not _few(test, max(1, factor))}


def _spread(unit: Unit) -> float | None:
    diagrams = [unit.observed[r] for r in unit.runs]
    return birth_death(diagrams).spread if len(diagrams) >= 2 else None
