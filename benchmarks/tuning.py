"""Searches compared with Optuna alone, and what the search itself costs.

    python benchmarks/tuning.py [--quick]
    python benchmarks/tuning.py --study sae|codec [--architectures transformer,mamba]

Branin and Hartmann-6, paired by seed: ours asks batches of four at once, Optuna's TPE is asked one trial at a time and
told its value before the next. A search succeeds when its best value comes within the tolerance of the minimum. Then
CPU seconds: per asked trial, and for a study of 10,000 finished trials that a launch opens.

--study: a learning rate by one bracket with halving, compared with a grid of rates trained to the end, in this process
on one thread: what each found, and its CPU seconds. SAEs of a stand-in: six rates in two rungs, both arms with
`rungs=free`; audio-token models: nine rates in three.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import optuna
from scipy import stats

from sweeps.codec.cells import Study
from sweeps.codec.run import run_pack
from sweeps.codec.sweep import SWEEP as CODEC_LM
from sweeps.core.cells import Cell, Row
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.launch.sweep import Sweep
from sweeps.ledger.ledger import Ledger
from sweeps.sae.sweep import SWEEP as PROXY_GAP
from sweeps.sae.train import train_pack
from sweeps.search.halving import Extent
from sweeps.search.objective import Objective
from sweeps.search.options import Asked
from sweeps.search.points import Told, sampler, usual_size
from sweeps.search.search import Search
from sweeps.search.space import Dimension, Point

_A = np.array(
    [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
)
_P = 1e-4 * np.array(
    [
        [1312, 1696, 5569, 124, 8283, 5886],
        [2329, 4135, 8307, 3736, 1004, 9991],
        [2348, 1451, 3522, 2883, 3047, 6650],
        [4047, 8828, 8732, 5743, 1091, 381],
    ]
)
_ALPHA = np.array([1.0, 1.2, 3.0, 3.2])


def branin(x: np.ndarray) -> float:
    """Branin's function of x (2,); minimum 0.397887."""
    a, b = float(x[0]), float(x[1])
    bend = b - 5.1 / (4 * np.pi**2) * a**2 + 5 / np.pi * a - 6
    return float(bend**2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(a) + 10)


def hartmann6(x: np.ndarray) -> float:
    """Hartmann's function of x (6,) in the unit cube; minimum -3.32237."""
    return float(-_ALPHA @ np.exp(-(_A * (x - _P) ** 2).sum(axis=1)))


@dataclass(frozen=True)
class Problem:
    """A function of known minimum; a search of `trials` succeeds within `tolerance` of it."""

    name: str
    function: Callable[[np.ndarray], float]
    space: tuple[Dimension, ...]
    minimum: float
    tolerance: float
    trials: int

    def value(self, point: Mapping[str, object]) -> float:
        return self.function(np.array([point[d.field] for d in self.space], dtype=float))


PROBLEMS = (
    Problem("Branin", branin, (Dimension("a", "lin", -5, 10), Dimension("b", "lin", 0, 15)), 0.397887, 0.1, 60),
    Problem("Hartmann-6", hartmann6, tuple(Dimension(f"x{i}", "lin", 0, 1) for i in range(6)), -3.32237, 0.5, 100),
)


def ours(problem: Problem, kind: str, seed: int) -> float:
    """The best value of a search in batches."""
    size = usual_size(kind, len(problem.space))
    found, told = sampler(kind, problem.space, seed, size, 1), list[Told]()
    while len(told) < problem.trials:
        points: list[Point] = found.batch(len(told) // size, told)
        told += [Told(p, (problem.value(p),)) for p in points]
    return min(t.losses[0] for t in told[: problem.trials])


def optuna_alone(problem: Problem, seed: int) -> float:
    """The best value of Optuna's TPE with its defaults, one trial after another."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))

    def objective(trial: optuna.Trial) -> float:
        return problem.value({d.field: trial.suggest_float(d.field, d.lo, d.hi) for d in problem.space})

    study.optimize(objective, n_trials=problem.trials)
    return study.best_value


def compare(problem: Problem, seeds: int) -> None:
    """Print how often ours and Optuna succeed, paired by seed."""
    goal = problem.minimum + problem.tolerance
    theirs = np.array([optuna_alone(problem, s) for s in range(seeds)])
    for kind in ("tpe", "cmaes", "random"):
        own = np.array([ours(problem, kind, s) for s in range(seeds)])
        only_own, only_theirs = (
            int(((own <= goal) & (theirs > goal)).sum()),
            int(((own > goal) & (theirs <= goal)).sum()),
        )
        p = stats.binomtest(only_theirs, only_own + only_theirs, 0.5).pvalue if only_own + only_theirs else 1.0
        print(
            f"{problem.name:10} {problem.trials} trials, within {problem.tolerance:g}: {kind} {(own <= goal).sum()}, "
            f"Optuna {(theirs <= goal).sum()} of {seeds} seeds; only ours {only_own}, only Optuna {only_theirs} "
            f"(McNemar p {p:.2g}); median regret {np.median(own) - problem.minimum:.3g} and "
            f"{np.median(theirs) - problem.minimum:.3g}",
            flush=True,
        )


@dataclass(frozen=True, kw_only=True)
class _Cell(Cell):
    SWEEP: ClassVar[str] = "plain"
    VERSION: ClassVar[str] = "1"
    lr: float
    width: int


@dataclass(frozen=True, kw_only=True)
class _Preset:
    lr: float = 1e-3
    width: int = 4


class _Plain:
    """A sweep of one cell a setting, as far as a search looks at it."""

    tracked: Sequence[str] = ()
    fixed: Mapping[str, str] = {}
    unseen = ""

    def plan(self, preset: Any) -> Sequence[_Cell]:
        return [_Cell(lr=preset.lr, width=preset.width)]

    def extent(self, preset: Any) -> Extent | None:
        return None

    def plan_until(self, preset: Any, amount: int) -> Sequence[_Cell]:
        return self.plan(preset)


def _asked(trials: int) -> Asked:
    ranges = ("lr=log:1e-6:1", "width=int:1:4000")
    return Asked(kind="random", ranges=ranges, objectives=(Objective("loss", "min"),), trials=trials, batch=100)


def rebuild(trials: int) -> None:
    """Print the CPU seconds in which a launch opens a study of so many finished trials."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder, "plain", "1")
        study = Search(_asked(trials), _Plain(), _Preset(), ledger)
        rng = np.random.default_rng(0)
        while missing := [c for c in study.advance(record=True) if not study.known.closed(c.key)]:
            for cell in missing:
                ledger.publish(cell, [Row("loss", float(rng.random())), Row("size", 1.0)], {}, {"fingerprint": ""})
        ledger.compact(ledger.done())
        began = time.process_time()
        again = Search(_asked(trials), _Plain(), _Preset(), Ledger(folder, "plain", "1"))
        again.advance(record=True)
        print(f"{trials} finished trials opened in {time.process_time() - began:.2f} CPU s", flush=True)


def asking() -> None:
    """Print the CPU time of an asked point after some numbers of trials, six dimensions, in a launch that goes on."""
    problem = PROBLEMS[1]
    for kind in ("tpe", "cmaes", "random"):
        size = usual_size(kind, len(problem.space))
        found, told = sampler(kind, problem.space, 0, size, 1), list[Told]()
        times = []
        while len(told) < 500:
            began = time.process_time()
            points = found.batch(len(told) // size, told)
            times.append((time.process_time() - began) / size)
            told += [Told(p, (problem.value(p),)) for p in points]
        shown = ", ".join(
            f"{1000 * float(np.median(times[n // size - 3 : n // size])):.1f} after {n}" for n in (50, 200, 500)
        )
        print(f"{kind}: CPU ms per point {shown}", flush=True)


Work = Callable[[Sequence[Any], PackContext], None]


def rate_of(sweep: Sweep[Any, Any], preset: Any, asked: Asked, work: Work) -> tuple[float, float, float]:
    """(best learning rate that was trained to the end, its value, CPU seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder, sweep.name, sweep.version)
        run = RunSettings(keep_checkpoints=bool(asked.stop), threads=1)
        origin = functools.cache(lambda cell: sweep.fingerprint(cell, preset, run))
        context = PackContext(ledger, run, threads=1, device="cpu", fingerprint=origin)
        began = time.process_time()
        search = Search(asked, sweep, preset, ledger)
        while missing := [c for c in search.advance(record=True) if not search.known.closed(c.key)]:
            work(missing, context)
        spent = time.process_time() - began
        gc.collect()  # ends what still reads through Ray; at the interpreter's exit that would start Ray once more
        (study,) = search.studies
        best = study.best(search.outcomes(study))
        if best is None:
            return math.nan, math.nan, spent
        return float(study.trials(best + 1)[best].point["lr"] or 0), search.outcomes(study)[best].values[0], spent


@dataclass(frozen=True)
class Bracket:
    """`rates` learning rates with halving in `rungs` rungs, compared with a grid of `grid` rates."""

    rates: int
    rungs: int
    grid: int


def halved_rates(
    name: str, sweep: Sweep[Any, Any], preset: Any, objective: Objective, work: Work, bracket: Bracket
) -> None:
    """Print what a bracket finds, compared with a grid of rates trained to the end."""
    lo, hi, grid, rates = (1e-4, 3e-2, bracket.grid, bracket.rates)

    def asked(**how: Any) -> Asked:
        return Asked(objectives=(objective,), confirm=0, **how)

    one = asked(kind="grid", ranges=(f"lr=log:{lo}:{hi}:1",), trials=1, batch=1)
    rate_of(sweep, preset, one, work)  # what is compiled and cached on first use is paid here
    whole = rate_of(
        sweep, preset, asked(kind="grid", ranges=(f"lr=log:{lo}:{hi}:{grid}",), trials=grid, batch=grid), work
    )
    few = rate_of(
        sweep,
        preset,
        asked(
            kind="qmc",
            ranges=(f"lr=log:{lo}:{hi}",),
            trials=rates,
            batch=rates,
            stop="halving",
            rungs=bracket.rungs,
        ),
        work,
    )
    for what, (lr, value, spent) in ((f"grid of {grid} rates", whole), (f"{rates} rates with halving", few)):
        print(f"{name}: {what}: lr={lr:.3g}, {objective.column}={value:.5f}, {spent:.0f} CPU s", flush=True)
    print(f"{name}: halving took {few[2] / whole[2]:.0%} of the grid's CPU seconds", flush=True)


def studies(which: str, architectures: Sequence[str]) -> None:
    """Print the comparison for SAEs of a stand-in, or for audio-token models of the preset `local`."""
    if which == "sae":
        preset = replace(
            PROXY_GAP.presets["local"],
            models=("standin-small",),
            depths=("mid",),
            tokens=(327_680,),
            rungs="free",
        )
        for k, seed in ((16, 0), (32, 1), (8, 2)):
            one = replace(preset, k=(k,), seeds=(seed,))
            name = f"SAEs, k = {k}, seed {seed}"
            halved_rates(name, PROXY_GAP, one, Objective("ce_rec", "max"), train_pack, Bracket(6, 2, 16))
        return
    for architecture in architectures:
        study = replace(CODEC_LM.presets["local"], architectures=(architecture,), sample_s=0.0)
        objective = Objective("final_val_nll", "min")
        work = functools.partial(_codec_pack, study)
        halved_rates(architecture, CODEC_LM, study, objective, work, Bracket(9, 3, 9))


def _codec_pack(study: Study, cells: Sequence[Any], context: PackContext) -> None:
    run_pack(cells, study, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=("sae", "codec"), help="learning rates with halving compared with a grid")
    parser.add_argument("--architectures", default="transformer,mamba", help="of --study codec")
    parser.add_argument("--quick", action="store_true", help="5 seeds, 1,000 finished trials")
    given = parser.parse_args()
    quick = given.quick
    if given.study:
        studies(given.study, given.architectures.split(","))
        return
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    asking()
    rebuild(1_000 if quick else 10_000)
    for problem in PROBLEMS:
        compare(problem, 5 if quick else 100)


if __name__ == "__main__":
    main()
