"""Intervals and p-values for means over seeds and held-out units (clips, recordings, sequences) that are crossed.

Every seed of an arm is a new training, every trained model scores the same units, and a statement about the arm must
hold for other seeds and other units. A mean then carries two variance components: seeds (few, so that their variance
is known badly) and units (many). Adding both and looking the sum up in one t table fails in the tails: with two seeds
their variance is often estimated near zero by chance, and no choice of degrees of freedom corrects that. Banerjee's
interval (1961, "On confidence interval for two-means problem based on separate estimates of variances and tabulated
values of t-table", Sankhya A 23) gives each component its own t quantile:

    half width² = Σ_k t²(1 − α/2, df_k) · variance_k

For independent normal components it covers with probability of at least 1 − α, at every α and whatever the components'
true sizes (the distribution function of χ²₁ is concave; apply Jensen's inequality to the true shares). The price is
width: docs/calibration.md compares it with the ideal width. One component alone gives the ordinary t interval.

The residual variation (seed × unit) is in both components, so their sum counts it twice. It is taken off the units'
component where at least UNITS_FOR_RESIDUAL units estimate it well enough (simulated; with fewer the tails suffer).

Shape suffixes: A arms, S seeds, U units, N statements, K variance components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
LEVEL = 0.95  # of every interval in the reports
UNITS_FOR_RESIDUAL = 20  # fewer estimate the residual too badly: intervals then cover less than stated (simulated)
NEEDS_SEEDS = "needs ≥ 2 seeds"
NEEDS_UNITS = "needs ≥ 2 held-out units"
NEEDS_VARIATION = "needs values that vary"
_SMALLEST_P = 1e-12  # far below what any family of comparisons asks for; the bisection ends there


@dataclass(frozen=True)
class Effect:
    """A mean, its 95% limits and two-sided p against 0; NaN limits and p where `needs` names what they would need."""

    value: float
    lo: float
    hi: float
    p: float
    needs: str = ""


@dataclass(frozen=True)
class Component:
    """An estimated variance of the mean, with its degrees of freedom."""

    variance: float
    df: float


def banerjee(value_N: npt.ArrayLike, variance_NK: npt.ArrayLike, df_NK: npt.ArrayLike) -> tuple[Floats, Floats]:
    """(half width of the 95% interval, two-sided p) of N values with K variance components each; see the file's head.

    p is the smallest α whose interval leaves 0 out. Both are NaN where all components are 0.
    """
    value = np.abs(np.asarray(value_N, np.float64))
    variance, df = np.broadcast_arrays(np.asarray(variance_NK, np.float64), np.asarray(df_NK, np.float64))
    some = variance.sum(axis=-1) > 0

    def half(alpha_N: Floats) -> Floats:
        quantile = -special.stdtrit(df, alpha_N[..., None] / 2)
        return np.sqrt((quantile**2 * variance).sum(axis=-1))

    low, high = np.full(value.shape, math.log(_SMALLEST_P)), np.zeros(value.shape)
    for _ in range(36):  # to 4e-10 of p; the half width falls as α rises
        middle = (low + high) / 2
        inside = half(np.exp(middle)) >= value
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    width = half(np.full(value.shape, 1 - LEVEL))
    return np.where(some, width, np.nan), np.where(some, np.exp(high), np.nan)


def effects(values: Sequence[float], components: Sequence[Sequence[Component]]) -> list[Effect]:
    """The Effects of means from the variance components of each (one or more)."""
    most = max((len(some) for some in components), default=0)
    filled = [[*some, *[Component(0.0, 1.0)] * (most - len(some))] for some in components]
    variance = [[c.variance for c in some] for some in filled]
    width, p = banerjee(values, variance, [[c.df for c in some] for some in filled])
    return [
        Effect(v, v - w, v + w, q) if q == q else Effect(v, math.nan, math.nan, math.nan, NEEDS_VARIATION)
        for v, w, q in zip(values, width.tolist(), p.tolist(), strict=True)
    ]


def effect(value: float, components: Sequence[Component]) -> Effect:
    """The Effect of one mean from its variance components (one or more)."""
    return effects([value], [components])[0]


def units_mean(d_U: npt.ArrayLike) -> Effect:
    """Mean over units alone: a statement about the trained model at hand, not about its seeds (t interval).

    Raises ValueError for values that are not finite or of another rank.
    """
    d = _table(np.asarray(d_U, np.float64)[None])[0]
    if len(d) < 2:
        return Effect(float(d.mean()), math.nan, math.nan, math.nan, NEEDS_UNITS)
    return effect(float(d.mean()), [Component(float(d.var(ddof=1)) / len(d), len(d) - 1)])


def crossed_mean(d_SU: npt.ArrayLike) -> Effect:
    """Mean of differences that are paired by seed and unit, for other seeds and other units.

    One seed cannot tell about other trainings: no limits, no p. One column (the differences were averaged over units
    before) leaves the seeds' t interval.
    Raises ValueError for another rank or for values that are not finite.
    """
    d = _table(d_SU)
    seeds, units = d.shape
    mean = float(d.mean())
    if seeds < 2:
        return Effect(mean, math.nan, math.nan, math.nan, NEEDS_SEEDS)
    components = [Component(float(d.mean(axis=1).var(ddof=1)) / seeds, seeds - 1)]
    if units > 1:
        components.append(units_component(d.mean(axis=0), residual([d]) / d.size))
    return effect(mean, components)


@dataclass(frozen=True)
class CrossedArms:
    """Arms whose seeds are trainings of their own and whose models scored the same units: tables value_SU, one per arm.

    The seeds' variance is pooled over all arms, with Σ(S − 1) degrees of freedom: it is taken to be equal in all of
    them, as `seed_sd` shows. The mean of a table's row is the value of that trained model; where that value is a ratio
    of sums over units, build the table by `ratio_influence`.

    Raises ValueError for no arm, other numbers of units, or values that are not finite.
    """

    tables: tuple[Floats, ...]

    def __post_init__(self) -> None:
        tables = tuple(_table(t) for t in self.tables)
        if len({t.shape[1] for t in tables}) != 1:
            raise ValueError(f"arms of shapes {[t.shape for t in tables]}; give one or more, all with the same units")
        object.__setattr__(self, "tables", tables)

    @property
    def units(self) -> int:
        return int(self.tables[0].shape[1])

    def seeds(self, arm: int) -> int:
        return int(self.tables[arm].shape[0])

    def value(self, arm: int) -> float:
        return float(self.tables[arm].mean())

    @property
    def seed_df(self) -> int:
        return sum(len(t) - 1 for t in self.tables)

    @property
    def seed_variance(self) -> float:
        """Pooled variance of the trained models' values within an arm; NaN without a repeated arm."""
        if not self.seed_df:
            return math.nan
        return sum(float(((t.mean(axis=1) - t.mean()) ** 2).sum()) for t in self.tables) / self.seed_df

    def seed_sd(self, arm: int) -> float:
        """Standard deviation of one arm's trained models; NaN for one seed."""
        return float(self.tables[arm].mean(axis=1).std(ddof=1)) if self.seeds(arm) > 1 else math.nan

    def mean(self, arm: int) -> Effect:
        """One arm's value for other seeds and units. One seed: over units alone, for the trained model at hand."""
        if self.seeds(arm) < 2:
            return units_mean(self.tables[arm][0])
        return self._effects([self.value(arm)], [self.tables[arm].mean(axis=0)], [1 / self.seeds(arm)])[0]

    def difference(self, a: int, b: int) -> Effect:
        """Value of arm a less arm b, for other seeds and units; needs two seeds or more of both."""
        return self.differences([(a, b)])[0]

    def differences(self, pairs: Sequence[tuple[int, int]]) -> list[Effect]:
        """`difference` of many pairs (a, b) at once, which is much faster than one by one."""
        value = {(a, b): self.value(a) - self.value(b) for a, b in pairs}
        rest = [(a, b) for a, b in pairs if min(self.seeds(a), self.seeds(b)) >= 2]
        found = {pair: Effect(value[pair], math.nan, math.nan, math.nan, NEEDS_SEEDS) for pair in pairs}
        if rest:
            of_unit = [table.mean(axis=0) for table in self.tables]
            paired = [of_unit[a] - of_unit[b] for a, b in rest]
            per_seed = [1 / self.seeds(a) + 1 / self.seeds(b) for a, b in rest]
            found |= dict(zip(rest, self._effects([value[pair] for pair in rest], paired, per_seed), strict=True))
        return [found[pair] for pair in pairs]

    def _effects(
        self, value_N: Sequence[float], mean_NU: Sequence[Floats], per_seed_N: Sequence[float]
    ) -> list[Effect]:
        """`mean_NU`: averages over seeds, whose means are the values; `per_seed_N`: Σ 1/S over the arms in each."""
        seed_variance, rest = self.seed_variance, residual(self.tables)
        components = []
        for mean_U, per_seed in zip(mean_NU, per_seed_N, strict=True):
            some = [Component(seed_variance * per_seed, self.seed_df)]
            if self.units > 1:
                some.append(units_component(mean_U, rest * per_seed / self.units))
            components.append(some)
        return effects(value_N, components)


def units_component(mean_U: Floats, twice: float) -> Component:
    """The units' component of the mean of `mean_U`, an average over seeds.

    `twice`: the residual's share in that mean's variance, which is in the seeds' component as well; see the file's
    head for when it is taken off.
    """
    units = len(mean_U)
    variance = float(mean_U.var(ddof=1)) / units
    return Component(max(variance - twice, 0.0) if units >= UNITS_FOR_RESIDUAL else variance, units - 1)


def skew_factor(d_U: npt.ArrayLike) -> float:
    """How many times wider the t interval of a mean must be for units as skewed as these: 1 or more.

    The wider side of Hall's interval (1992, "On the removal of skewness by transformation", JRSS B 54: the cubic
    transformation, inverted), at the 95% level; a variance component is multiplied by its square.
    """
    d = np.asarray(d_U, np.float64)
    d = d - d.mean()
    spread = float(np.sqrt((d**2).mean()))
    if len(d) < 2 or not spread:
        return 1.0
    a = max(abs(float((d**3).mean()) / spread**3) / math.sqrt(len(d)), 1e-6)
    t = float(special.stdtrit(len(d) - 1, (1 + LEVEL) / 2))
    longer_tail = 3 / a * (1 - float(np.cbrt(1 - a * (t + a / 6))))
    return max(longer_tail / t, 1.0)


def residual(tables_SU: Sequence[Floats]) -> float:
    """Variance of seed × unit within arms, pooled over those with several seeds; 0 where there is none to measure."""
    squares, df = 0.0, 0
    for table in tables_SU:
        seeds, units = table.shape
        rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        squares += float((rest**2).sum())
        df += (seeds - 1) * (units - 1)
    return squares / df if df else 0.0


def ratio_influence(numerator_SU: npt.ArrayLike, denominator_SU: npt.ArrayLike) -> Floats:
    """A table whose row means are Σ numerator / Σ denominator: each unit's influence on that ratio.

    A unit's influence is how far its jackknife pseudo-value lies from their mean, on top of the ratio (Cochran 1977,
    "Sampling Techniques", sec. 6.17: linearised influences are too small where few units hold much of the denominator).
    Long units weigh more, and a ratio that is the same in every unit varies with none.
    """
    top, bottom = np.atleast_2d(np.asarray(numerator_SU, float)), np.atleast_2d(np.asarray(denominator_SU, float))
    total, units = bottom.sum(axis=1, keepdims=True), bottom.shape[1]
    ratio = top.sum(axis=1, keepdims=True) / total
    if units == 1:
        return np.asarray(ratio)
    others = np.where(bottom < total, total - bottom, total)  # without a unit that holds everything there is no ratio
    deviation_SU = (units - 1) * (top - ratio * bottom) / others
    return np.asarray(ratio + deviation_SU - deviation_SU.mean(axis=1, keepdims=True))


def _table(d_SU: npt.ArrayLike) -> Floats:
    d = np.asarray(d_SU, dtype=np.float64)
    if d.ndim != 2 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"values of shape {d.shape}; give a finite table of seeds by units")
    return d
