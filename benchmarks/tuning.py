"""Searches compared with Optuna alone, and what the search itself costs.

    python benchmarks/tuning.py [--quick]

Branin and Hartmann-6, paired by seed: ours asks batches of four at once, Optuna's TPE is asked one trial at a time and
told its value before the next. A search succeeds when its best value comes within the tolerance of the minimum. Then
CPU seconds: per asked trial, and for a study of 10,000 finished trials that a launch opens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import optuna
from scipy import stats

from sweeps.core.cells import Cell, Row
from sweeps.ledger.ledger import Ledger
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 seeds, 1,000 finished trials")
    quick = parser.parse_args().quick
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    asking()
    rebuild(1_000 if quick else 10_000)
    for problem in PROBLEMS:
        compare(problem, 5 if quick else 100)


if __name__ == "__main__":
    main()
