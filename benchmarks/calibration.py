"""Every interval, p-value, star and verdict word of the reports, measured on data whose truth is known.

    python benchmarks/calibration.py            # the whole grid, under 20 minutes on 2 cores: docs/calibration.md
    python benchmarks/calibration.py --quick    # the settings that are hardest, under 2 minutes; prints only
    python benchmarks/calibration.py --only text --processes 1

A run that was stopped continues with the settings that are missing, unless the code has changed (runs/calibration).
How to add a statement: see the head of `benchmarks/_calibration.py`. The exit code is 1 when a statement misses its
bound by more than the simulation's own error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core instead

from analysis.markdown import table
from benchmarks import (
    _calibration_codec,
    _calibration_proxies,
    _calibration_sae,
    _calibration_search,
    _calibration_topology,
    _calibration_utility,
    _calibration_verdicts,
)
from benchmarks._calibration import CLOSELY, WIDE_COVERAGE, Setting, Statement, Tally, measure, measure_closely, spelled
from benchmarks._kept import Kept, measuring_code

STUDIES: Mapping[str, Sequence[Statement]] = {
    "Proxy gap": (
        *_calibration_sae.STATEMENTS,
        *_calibration_proxies.STATEMENTS,
        *_calibration_verdicts.STATEMENTS,
    ),
    "Codec LMs and memory caching": _calibration_codec.STATEMENTS,
    "Topology audit": (*_calibration_topology.STATEMENTS, *_calibration_utility.STATEMENTS),
    "Searches": _calibration_search.STATEMENTS,
}
Job = tuple[str, int, int]  # study, statement, setting
Result = Future[tuple[Tally, float]]  # with its CPU-seconds
PAGE = ROOT / "docs" / "calibration.md"


def jobs(only: str, quick: bool) -> list[Job]:
    return [
        (study, i, j)
        for study, statements in STUDIES.items()
        for i, statement in enumerate(statements)
        if only.lower() in f"{study} {statement.name} {statement.printed}".lower()
        for j in range(len(statement.quick if quick else statement.settings))
    ]


def of(job: Job, quick: bool) -> tuple[Statement, Setting, int]:
    """The statement and setting of a job, and its number of trials."""
    study, i, j = job
    statement = STUDIES[study][i]
    if quick:
        return statement, statement.quick[j], statement.quick_trials
    return statement, statement.settings[j], statement.trials


def run(job: Job, quick: bool, share: float) -> tuple[Tally, float]:
    """What a setting's trials found, and the CPU-seconds they took."""
    statement, setting, trials = of(job, quick)
    began = time.process_time()
    tally = (measure if quick else measure_closely)(statement, setting, _trials(trials, share))
    return tally, time.process_time() - began


def _trials(trials: int, share: float) -> int:
    return max(1, round(share * trials))


def run_all(
    todo: Sequence[Job], quick: bool, processes: int, share: float, kept: Kept
) -> tuple[dict[Job, Tally], dict[Job, float]]:
    """(tallies, CPU-seconds) of all jobs on some processes, with a line of progress at least every 5 seconds of work
    done. Jobs that `kept` holds are not run again."""
    tallies: dict[Job, Tally] = {}
    seconds: dict[Job, float] = {}
    missing: list[Job] = []
    for job in todo:
        statement, setting, trials = of(job, quick)
        known = kept.get(job[0], statement, setting, _trials(trials, share))
        if known is None:
            missing.append(job)
        else:
            tallies[job], seconds[job] = known
    if tallies:
        print(f"{len(tallies)} of {len(todo)} settings were measured before by the same code", flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(run, job, quick, share): job for job in missing}
        try:
            for done in _progress(waiting):
                job = waiting[done]
                tallies[job], seconds[job] = done.result()
                statement, setting, trials = of(job, quick)
                kept.put(job[0], statement, setting, _trials(trials, share), done.result())
        finally:  # a failure, or ^C, does not wait for hundreds of settings
            pool.shutdown(wait=False, cancel_futures=True)
    in_order = sorted(tallies, key=todo.index)
    return {job: tallies[job] for job in in_order}, seconds


def _progress(waiting: Mapping[Result, Job]) -> Iterator[Result]:
    start = said = time.monotonic()
    for n, done in enumerate(as_completed(waiting), start=1):
        now = time.monotonic()
        if now - said > 5 or n == len(waiting):
            said, rate = now, n / (now - start)
            print(
                f"{n}/{len(waiting)} settings, {rate:.2f} per second, {(len(waiting) - n) / rate:.0f} s left",
                flush=True,
            )
        yield done


def summary(found: Mapping[Job, Tally], seconds: Mapping[Job, float], quick: bool) -> dict[str, str]:
    """A table per study: each statement with the worst of its settings and what simulating them took."""
    out = {}
    for study, statements in STUDIES.items():
        rows = []
        for i, statement in enumerate(statements):
            mine = {job: tally for job, tally in found.items() if job[:2] == (study, i)}
            if not mine:
                continue
            worst = max(mine, key=lambda job: statement.worse(mine[job]))
            rates = sorted(tally.rate for tally in mine.values() if tally.trials)
            rows.append(
                [
                    statement.name,
                    statement.printed,
                    statement.kind,
                    _number(statement.level),
                    _measured(mine[worst]),
                    spelled(of(worst, quick)[1]),
                    f"{rates[0]:.3f} to {rates[-1]:.3f}" if rates else "–",
                    str(len(mine)),
                    f"{sum(seconds[job] for job in mine):.0f}",
                    "yes" if all(statement.holds(tally) for tally in mine.values()) else "**no**",
                ]
            )
        head = ["statement", "printed in", "measured", "nominal", "worst [simulation's 95%]", "at", "all settings"]
        if rows:
            out[study] = table([*head, "settings", "CPU-s", "kept"], rows)
    return out


def details(found: Mapping[Job, Tally], quick: bool) -> str:
    """Every setting of every statement, with the intervals' widths."""
    lines = []
    for study, statements in STUDIES.items():
        for i, statement in enumerate(statements):
            mine = [(job, tally) for job, tally in found.items() if job[:2] == (study, i)]
            if not mine:
                continue
            lines += [f"### {study}: {statement.name}", ""]
            wide = any(t.trials and t.rate > WIDE_COVERAGE for _, t in mine) and statement.kind == "coverage"
            lines += [statement.note, ""] if statement.note else []
            if wide and not statement.note:
                lines += ["Wider than nominal in some settings; the last column gives the price.", ""]
            rows = [
                [spelled(of(job, quick)[1]), _measured(tally), _number(tally.width), _drawn(tally)]
                for job, tally in sorted(mine, key=lambda item: item[0])
            ]
            lines += [table(["setting", statement.kind, "width / ideal", "trials"], rows), ""]
    return "\n".join(lines)


def _number(x: float) -> str:
    return "–" if x != x else f"{x:.3g}"


def _measured(tally: Tally) -> str:
    if not tally.trials:
        return "– (not printed there)"
    low, high = tally.limits()
    return f"{tally.rate:.4f} [{low:.4f}, {high:.4f}]"


def _drawn(tally: Tally) -> str:
    if tally.before is None:
        return str(tally.trials)
    hits, trials = tally.before
    return f"{tally.trials}, after {hits / trials:.4f} of {trials}"


def page(found: Mapping[Job, Tally], seconds: Mapping[Job, float], share: float) -> str:
    tables = [line for study, text in summary(found, seconds, False).items() for line in (f"## {study}", "", text, "")]
    command = "python benchmarks/calibration.py" + (f" --share {share:g}" if share < 1 else "")
    made = f"Made by `{command}` in {sum(seconds.values()) / 60:.0f} CPU-minutes."
    return "\n".join([*_HEAD, made, "", *tables, "## Every setting", "", details(found, False)])


_HEAD = [
    "# Calibration",
    "",
    "What the reports print, and how often it is wrong. Data with a known truth are simulated and given to the",
    "product's own functions. Coverage: how often a 95% interval holds the truth (required: at least .93 in every",
    "setting; above .985 the interval is wider than it needs to be, and its width is given relative to the ideal one,",
    "which knows the variances). Size: how often a 5% test rejects although nothing is there (at most .065).",
    "Family-wise error: how often a family of such tests does so at least once after Holm's correction (at most .075).",
    "Power: how often a test finds an effect of the stated size. A setting whose rate lies beyond its bound is",
    f"measured once more, with {CLOSELY} times as many fresh draws, which alone count then; the last column below",
    "gives both. What each statement means: [statistics.md](statistics.md).",
    "",
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the hardest settings alone, few trials")
    parser.add_argument("--only", default="", help="statements whose study, name or place contains this text")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of each setting, 0.2 for a first look")
    asked = parser.parse_args(argv)
    if not 0 < asked.share <= 1:
        parser.error(f"--share {asked.share} is not above 0 and at most 1")
    todo = jobs(asked.only, asked.quick)
    if not todo:
        parser.error(f"--only {asked.only!r} matches no statement")
    kept = Kept(ROOT / "runs" / "calibration", measuring_code())
    found, seconds = run_all(todo, asked.quick, asked.processes, asked.share, kept)
    for study, text in summary(found, seconds, asked.quick).items():
        print(f"\n{study}\n\n{text}")
    if not asked.quick and not asked.only:
        PAGE.write_text(page(found, seconds, asked.share), encoding="utf-8")
        print(f"\nwritten: {PAGE.relative_to(ROOT)}")
    missed = [job for job, tally in found.items() if not of(job, asked.quick)[0].holds(tally)]
    for job in missed:
        statement, setting, _ = of(job, asked.quick)
        print(f"missed: {statement.name} at {spelled(setting)}: {_measured(found[job])}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
