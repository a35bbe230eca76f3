"""Where a search looks next: batches of points that follow from the seed and the finished trials before them.

`random`, `qmc` (a scrambled Sobol sequence) and `grid` (in a seeded order) ignore what was found. `tpe` (Optuna's
tree-structured Parzen estimator, with the points of a batch as liars for each other) and `cmaes` (one
generation of CMA-ES a batch) learn from it. Nothing here depends on time, machine, or the order in which trials ended.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sweeps.core.cells import UserError
from sweeps.search.halving import FAILED, Standing
from sweeps.search.space import Point, Space, Value

if TYPE_CHECKING:
    import optuna
STARTUP = 10  # points of the Sobol sequence before `tpe` learns
NEAR = 2.0  # over the number of trials: how far from the best setting one of each batch is, in lengths of the ranges


@dataclass(frozen=True)
class Told:
    """A closed trial: its losses (smaller is better, one per objective) and how far it breaks each condition.

    losses is empty for a failed trial. rung: where they were measured; they compare only within a rung. stopped: the
    trial was not measured at the last one.
    """

    point: Point
    losses: tuple[float, ...] = ()
    excess: tuple[float, ...] = ()
    rung: int = 0
    stopped: bool = False

    @property
    def allowed(self) -> bool:
        """Measured, and no condition is broken."""
        return bool(self.losses) and all(x <= 0 for x in self.excess)

    def standing(self) -> Standing:
        """Its place among trials of the same rung: allowed ones by their first loss, then those that break a condition
        by how far they do, then failed ones."""
        broken = max((x for x in self.excess if x > 0), default=0.0)
        return (FAILED, 0.0) if not self.losses else (1, broken) if broken else (0, self.losses[0])


class Sampler(Protocol):
    """Batch `number` (from 0), given the closed trials of all batches before it, in their order."""

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]: ...


@dataclass(frozen=True)
class Sizes:
    """Points of the batches, taken in turn: all of one size, or Hyperband's."""

    turn: tuple[int, ...]

    def span(self, number: int) -> tuple[int, int]:
        """(first point of a batch, the first of the next), counted from 0 over all batches."""
        rounds, rest = divmod(number, len(self.turn))
        first = rounds * sum(self.turn) + sum(self.turn[:rest])
        return first, first + self.turn[rest]


def sampler(kind: str, space: Space, seed: int, size: int | tuple[int, ...], objectives: int) -> Sampler:
    """The sampler of a search. size: points per batch, or those of batches in turn. Raises UserError for a space that
    it cannot search."""
    sizes = Sizes(size if isinstance(size, tuple) else (size,))
    if kind == "random":
        return Random(space, seed, sizes)
    if kind == "qmc":
        return Sobol(space, seed, sizes)
    if kind == "grid":
        return Grid(space, seed, sizes)
    if kind == "tpe":
        return TPE(space, seed, sizes, objectives)
    if kind == "cmaes":
        return CMAES.over(space, seed, sizes, objectives)
    raise UserError(f"--search {kind!r} is not known; choose from {', '.join(SEARCHES)}")


SEARCHES = ("tpe", "random", "cmaes", "qmc", "grid")


def usual_size(kind: str, dimensions: int) -> int:
    """Points per batch where none is asked for: four, or for `cmaes` the usual population (Hansen 2016, table 1)."""
    return 4 + int(3 * math.log(dimensions)) if kind == "cmaes" else 4


@dataclass(frozen=True)
class Random:
    """Independent points, uniform on (the logarithm of) each range; point i follows from (seed, i) alone."""

    space: Space
    seed: int
    sizes: Sizes

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]:
        return [self._point(i) for i in range(*self.sizes.span(number))]

    def _point(self, i: int) -> Point:
        return at(self.space, np.random.default_rng([self.seed, i]).random(len(self.space)))


@dataclass(frozen=True)
class Sobol:
    """The points of a scrambled Sobol sequence, spread more evenly than random ones."""

    space: Space
    seed: int
    sizes: Sizes

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]:
        first, end = self.sizes.span(number)
        return [at(self.space, u) for u in sobol(len(self.space), self.seed, end)[first:]]


@dataclass(frozen=True)
class Grid:
    """Every combination of the dimensions' values, once, in an order that follows from the seed."""

    space: Space
    seed: int
    sizes: Sizes

    @functools.cached_property
    def points(self) -> list[Point]:
        combined = itertools.product(*(d.grid() for d in self.space))
        names = [d.field for d in self.space]
        points = [dict(zip(names, values, strict=True)) for values in combined]
        return [points[i] for i in np.random.default_rng(self.seed).permutation(len(points))]

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]:
        return self.points[slice(*self.sizes.span(number))]


def at(space: Space, u_D: Sequence[float] | np.ndarray) -> Point:
    """The point at a place of the unit cube, one coordinate per dimension."""
    return {d.field: d.at(float(u)) for d, u in zip(space, u_D, strict=True)}


@functools.lru_cache(maxsize=4)
def _sobol(dimensions: int, seed: int, power: int) -> np.ndarray:
    from scipy.stats import qmc  # here: scipy.stats takes longer than all else that a launch without a search imports

    return qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng(seed)).random_base2(power)


def sobol(dimensions: int, seed: int, count: int) -> np.ndarray:
    """The first `count` points (count, dimensions) of the scrambled sequence; more begin with the same ones."""
    return _sobol(dimensions, seed, max(4, math.ceil(math.log2(count))))[:count]


class TPE:
    """Optuna's TPE in batches: the first STARTUP points are a Sobol sequence's, each later batch is asked of a study
    that holds the trials of all batches before it. Points of a batch that is being asked count as bad for the others,
    and the last point of a batch lies near the best setting.

    The study is kept between batches and only lengthened; one that is made anew from all trials asks the same points.
    """

    def __init__(self, space: Space, seed: int, sizes: Sizes, objectives: int) -> None:
        self.space, self.seed, self.sizes, self.objectives = space, seed, sizes, objectives
        self._study: optuna.Study | None = None
        self._held = 0

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]:
        first, end = self.sizes.span(number)
        start = [at(self.space, u) for u in sobol(len(self.space), self.seed, STARTUP)[first:end]]
        near = self._near_best(number, told) if not start and end - first > 1 else []
        count = end - first - len(start) - len(near)
        return [*start, *(self._asked(number, told, count) if count else ()), *near]

    def _near_best(self, number: int, told: Sequence[Told]) -> list[Point]:
        """One point near the best allowed trial by the first objective, among those that came furthest, nearer the
        more trials there are: Parzen estimators alone come no closer than their width. Nothing while there is no such
        trial."""
        allowed = [t for t in told if t.allowed]
        if not allowed:
            return []
        best = min(allowed, key=lambda t: (-t.rung, t.losses[0]))
        rng = np.random.default_rng([self.seed, number, 1])
        u_D = np.array([d.unit(best.point[d.field]) for d in self.space])
        u_D += NEAR / len(told) * rng.standard_normal(len(u_D))
        return [at(self.space, np.clip(u_D, 0.0, 1 - 1e-12))]

    def _asked(self, number: int, told: Sequence[Told], count: int) -> list[Point]:
        study, distributions = self._lengthened(told), _distributions(self.space)
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        with _quiet():
            import optuna

            study.sampler = optuna.samplers.TPESampler(
                seed=seed, constant_liar=True, n_startup_trials=1, warn_independent_sampling=False
            )
            asked = [study.ask(distributions) for _ in range(count)]
            for trial in asked:  # what is told later are the rounded values, once they are measured
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return [_from_optuna(self.space, trial.params) for trial in asked]

    def _lengthened(self, told: Sequence[Told]) -> optuna.Study:
        with _quiet():
            import optuna

            if self._study is None or self._held > len(told):
                self._study, self._held = optuna.create_study(directions=["minimize"] * self.objectives), 0
            distributions = _distributions(self.space)
            state = optuna.trial.TrialState
            self._study.add_trials(
                optuna.create_trial(
                    state=state.PRUNED if t.stopped else state.COMPLETE,  # Optuna ranks all whole trials first
                    params=_to_optuna(self.space, t.point),
                    distributions=distributions,
                    values=None if t.stopped else t.losses,
                    intermediate_values={t.rung: t.losses[0]} if t.stopped else None,
                    constraints={str(i): x for i, x in enumerate(t.excess)} or None,
                )
                for t in told[self._held :]
                if t.losses
            )
            self._held = len(told)
            return self._study


class CMAES:
    """CMA-ES on the unit cube, a generation per batch, begun in the middle, and anew at a random place when it is done.

    A failed trial counts as the worst of its generation; one that breaks a condition is worse than all that do not,
    and one that was stopped early is worse than all that went further. The optimiser is kept between batches; one that
    is made anew from all trials asks the same points.
    """

    def __init__(self, space: Space, seed: int, size: int) -> None:
        self.space, self.seed, self.size = space, seed, size
        self._generations: list[list[np.ndarray]] = []  # what was asked, unrounded
        self._told = 0
        self._cma = self._begun(np.full(len(space), 0.5), 0)

    @classmethod
    def over(cls, space: Space, seed: int, sizes: Sizes, objectives: int) -> CMAES:
        """Raises UserError for a space, population or number of objectives that CMA-ES does not take."""
        if len(sizes.turn) > 1:
            raise UserError("--search cmaes needs generations of one size; use --stop halving, or tpe with hyperband")
        size = sizes.turn[0]
        if objectives > 1:
            raise UserError("--search cmaes takes one objective; use tpe for several")
        if words := [d for d in space if d.kind == "choice"]:
            raise UserError(f"--search cmaes takes numbers only, and {words[0]} is a choice; use tpe")
        if len(space) < 2:
            raise UserError(f"--search cmaes needs two ranges or more, and {space[0]} is the only one; use tpe")
        if size < 4:
            raise UserError(f"--batch {size} is too small a population for cmaes; choose 4 or more")
        return cls(space, seed, size)

    def _begun(self, mean_D: np.ndarray, start: int) -> Any:
        from cmaes import CMA

        bounds_D2 = np.tile([0.0, 1.0], (len(self.space), 1))
        seed = int(np.random.SeedSequence([self.seed, start]).generate_state(1)[0])
        return CMA(mean=mean_D, sigma=0.25, bounds=bounds_D2, seed=seed, population_size=self.size)

    def batch(self, number: int, told: Sequence[Told]) -> list[Point]:
        while len(self._generations) <= number:
            if self._generations:
                generation = told[self._told : self._told + self.size]
                self._cma.tell(list(zip(self._generations[-1], _ranked(generation), strict=True)))
                self._told += self.size
                if self._cma.should_stop():
                    start = len(self._generations)
                    mean_D = np.random.default_rng([self.seed, start]).random(len(self.space))
                    self._cma = self._begun(mean_D, start)
            self._generations.append([self._cma.ask() for _ in range(self.size)])
        return [at(self.space, np.minimum(u, 1 - 1e-12)) for u in self._generations[number]]


def _ranked(generation: Sequence[Told]) -> list[float]:
    """A number per trial whose order is: by standing, and within its kinds the trials that came further first."""

    def order(t: Told) -> tuple[int, int, float]:
        kind, value = t.standing()
        return kind, -t.rung, value

    ranks = {key: float(i) for i, key in enumerate(sorted({order(t) for t in generation}))}
    return [ranks[order(t)] for t in generation]


def _distributions(space: Space) -> dict[str, Any]:
    """Optuna's distribution of each dimension; a choice by the place of its value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    out: dict[str, Any] = {}
    for d in space:
        if d.kind == "choice":
            out[d.field] = CategoricalDistribution(range(len(d.choices)))
        elif d.whole:
            out[d.field] = IntDistribution(int(d.lo), int(d.hi), log=d.kind == "log")
        else:
            out[d.field] = FloatDistribution(d.lo, d.hi, log=d.kind == "log")
    return out


def _to_optuna(space: Space, point: Point) -> dict[str, Any]:
    return {d.field: d.choices.index(point[d.field]) if d.kind == "choice" else point[d.field] for d in space}


def _from_optuna(space: Space, params: dict[str, Any]) -> Point:
    def value(d: Any) -> Value:
        if d.kind == "choice":
            return d.choices[params[d.field]]
        return int(params[d.field]) if d.whole else d.rounded(params[d.field])

    return {d.field: value(d) for d in space}


class _quiet:
    """Optuna without its log lines and its warnings about experimental options."""

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("ignore")
        import optuna

        self._level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def __exit__(self, *error: object) -> None:
        import optuna

        optuna.logging.set_verbosity(self._level)
        self._caught.__exit__(None, None, None)
