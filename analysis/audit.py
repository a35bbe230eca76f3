"""Is the largest loop larger than chance? Monte-Carlo tests against matched nulls, and the published ratio.

The statistic everywhere is the largest finite H1 persistence of a diagram ("top 1").

Shapes: R runs (subsamples), B null draws a run (`observed_R`, `null_RB`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

QUANTILE = 0.95


@dataclass(frozen=True, kw_only=True)
class NullTest:
    """Test of "the largest loop is no larger than under any of the nulls".

    `p` is the largest over the nulls of their Monte-Carlo p-values (intersection-union: every null must be beaten,
    Berger 1982), `null` the one that attains it. `p_lo` and `p_hi` bound the p-value that endless draws of that null
    would give (Clopper & Pearson, 95%).
    """

    p: float
    null: str
    p_by_null: dict[str, float]
    draws: int
    p_lo: float
    p_hi: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Observed mean of a statistic over the largest null threshold; `lo` and `hi` bound it over null draws (95%).

    `threshold` is that largest threshold, `null` the one that sets it, `share_above` the share of runs above it,
    `draws` the null values the threshold is a quantile of: from 8 values a 95th percentile is nearly their maximum
    and lies low on average, so the ratio lies high.
    """

    value: float
    lo: float
    hi: float
    threshold: float
    null: str
    share_above: float
    draws: int


def top1(diagram: np.ndarray) -> float:
    """Largest finite persistence of a diagram of (birth, death) pairs [n, 2]; 0 for a diagram without loops."""
    pairs = np.asarray(diagram, np.float64).reshape(-1, 2)
    life = pairs[:, 1] - pairs[:, 0]
    life = life[np.isfinite(life)]
    return float(life.max()) if life.size else 0.0


def top1_quantile(diagram: np.ndarray, distance_NN: np.ndarray) -> float:
    """Largest F(death) − F(birth) over the finite loops [n, 2], F the distribution of the pairwise distances.

    A monotone map of all distances (d → d^q, say) changes every persistence, but not this share of the distances that
    lie within a loop's life, so it may be compared across metrics. 0 for a diagram without loops.
    """
    pairs = np.asarray(diagram).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    if not len(pairs):
        return 0.0
    ends, back = np.unique(pairs, return_inverse=True)
    distances = np.sort(np.asarray(distance_NN)[np.triu_indices(len(distance_NN), 1)].astype(ends.dtype, copy=False))
    share = np.searchsorted(distances, ends, side="right") / distances.size
    birth_P, death_P = share[back.reshape(pairs.shape)].T
    return float((death_P - birth_P).max())


def monte_carlo_p(observed: float, null_B: np.ndarray) -> float:
    """p = (1 + #{null >= observed})/(B + 1): exact under exchangeability, never 0 (Phipson & Smyth 2010).

    Raises:
        ValueError: no null draw, or a value that is not finite.
    """
    null_B = np.asarray(null_B, np.float64).ravel()
    if not null_B.size or not np.isfinite(null_B).all() or not np.isfinite(observed):
        raise ValueError(f"observed={observed} against {null_B.size} null values; give finite values, one or more")
    return float((1 + (null_B >= observed).sum()) / (null_B.size + 1))


def beats_nulls(observed_R: Sequence[float] | np.ndarray, nulls: Mapping[str, np.ndarray]) -> NullTest:
    """The mean of the runs' top 1, against the same mean over the b-th draw of every run, for each null.

    `nulls` maps a name to null_RB, drawn from the same runs in the same order as `observed_R`.

    Raises:
        ValueError: no null, or runs that do not match.
    """
    observed_R = _finite(observed_R, "observed")
    drawn = {name: np.asarray(values, np.float64) for name, values in nulls.items()}
    if not drawn:
        raise ValueError("0 nulls; give one or more to test against")
    for name, values in drawn.items():
        if values.ndim != 2 or len(values) != len(observed_R) or not values.shape[1]:
            raise ValueError(
                f"null {name!r} has shape {list(values.shape)} for {len(observed_R)} observed runs; "
                f"give [runs, draws], the same runs in the same order"
            )
    p_by_null = {name: monte_carlo_p(observed_R.mean(), null_RB.mean(axis=0)) for name, null_RB in drawn.items()}
    worst = max(p_by_null, key=lambda name: p_by_null[name])
    draws = drawn[worst].shape[1]
    exceed = round(p_by_null[worst] * (draws + 1)) - 1
    interval = stats.binomtest(exceed, draws).proportion_ci(0.95)
    return NullTest(
        p=p_by_null[worst],
        null=worst,
        p_by_null=p_by_null,
        draws=draws,
        p_lo=float(interval.low),
        p_hi=float(interval.high),
    )


def top1_ratio(
    observed_R: Sequence[float] | np.ndarray,
    nulls: Mapping[str, np.ndarray],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """The published statistic: mean over runs of top 1 / max over nulls of `np.quantile(null top 1, 0.95)`.

    `nulls` maps a name to the top 1 of all its draws, of any shape; runs need not match. The interval resamples the
    draws of each null (percentile bootstrap) and holds the observed mean, so it is the noise of the null draws alone.

    Raises:
        ValueError: no run, no null, or values that are not finite.
    """
    observed_R = _finite(observed_R, "observed")
    drawn = {name: _finite(values, name) for name, values in nulls.items()}
    if not drawn:
        raise ValueError("0 nulls; give one or more, a ratio needs a denominator")
    thresholds = {name: float(np.quantile(values, QUANTILE)) for name, values in drawn.items()}
    rng = np.random.default_rng(seed)
    resampled = np.max([_resampled_quantiles(values, resamples, rng) for values in drawn.values()], axis=0)
    return _ratio(observed_R, thresholds, resampled, {name: values.size for name, values in drawn.items()})


def pooled_ratio(
    observed_R: Sequence[float] | np.ndarray,
    null_diagrams: Mapping[str, Sequence[np.ndarray]],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> Ratio:
    """Like `top1_ratio`, with the 95th percentile of ALL loops of a null's diagrams pooled as its threshold.

    A far lower bar than the largest loop of each draw: most loops are short. The interval resamples whole diagrams.

    Raises:
        ValueError: no run, no null, a null without a diagram, or nulls that have no loop at all.
    """
    observed_R = _finite(observed_R, "observed")
    lives = {name: [_lives(d) for d in diagrams] for name, diagrams in null_diagrams.items()}
    if not lives or any(not drawn or not sum(map(len, drawn)) for drawn in lives.values()):
        raise ValueError(f"nulls {sorted(lives)} have a null without loops; draw more, or use top1_ratio")
    thresholds = {name: float(np.quantile(np.concatenate(drawn), QUANTILE)) for name, drawn in lives.items()}
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(lives)))
    for column, drawn in enumerate(lives.values()):
        draws[:, column] = _pooled_quantiles(drawn, resamples, rng)
    return _ratio(observed_R, thresholds, draws.max(axis=1), {name: sum(map(len, d)) for name, d in lives.items()})


def _ratio(
    observed_R: np.ndarray, thresholds: Mapping[str, float], resampled_S: np.ndarray, draws: Mapping[str, int]
) -> Ratio:
    """Over the hardest null; resampled_S: its threshold in each bootstrap resample."""
    name = max(thresholds, key=lambda key: thresholds[key])
    hi, lo = _divide(observed_R.mean(), np.quantile(resampled_S, (0.025, 0.975)))
    return Ratio(
        value=float(_divide(observed_R.mean(), thresholds[name])),
        lo=float(lo),
        hi=float(hi),
        threshold=thresholds[name],
        null=name,
        share_above=float((observed_R > thresholds[name]).mean()),
        draws=draws[name],
    )


def _finite(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64).ravel()
    if not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"{name} has {array.size} values, {int((~np.isfinite(array)).sum())} not finite; give finite values"
        )
    return array


def _lives(diagram: np.ndarray) -> np.ndarray:
    pairs = np.asarray(diagram, np.float64).reshape(-1, 2)
    life = pairs[:, 1] - pairs[:, 0]
    return life[np.isfinite(life)]


def _resampled_quantiles(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    return np.quantile(rng.choice(values, size=(resamples, values.size)), QUANTILE, axis=1)


def _pooled_quantiles(lives: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """QUANTILE of the pooled loops of diagrams drawn with replacement; 0 where none has a loop.

    A diagram drawn c times weighs its loops by c, so all loops are sorted once, and as the quantile lies high only
    the longest of them are counted, from the top down, until it is passed.
    """
    owner = np.repeat(np.arange(len(lives)), [len(life) for life in lives])
    pool = np.concatenate(lives)
    order = np.argsort(-pool, kind="stable")
    pool, owner = pool[order], owner[order]
    size_D = np.array([len(life) for life in lives])
    out = np.zeros(resamples)
    for row in range(resamples):
        weight_D = np.bincount(rng.integers(len(lives), size=len(lives)), minlength=len(lives))
        total = int(weight_D @ size_D)
        if not total:
            continue
        at = QUANTILE * (total - 1)  # position of the quantile, counted from the shortest loop
        below = int(at)
        from_top = total - 1 - below  # loops above the one at `below`
        looked = min(len(pool), 2 * from_top + 64)
        reached = np.cumsum(weight_D[owner[:looked]])
        while reached[-1] <= from_top:
            looked = min(len(pool), 2 * looked)
            reached = np.cumsum(weight_D[owner[:looked]])
        low = pool[np.searchsorted(reached, from_top, side="right")]
        high = pool[np.searchsorted(reached, max(0, from_top - 1), side="right")]
        out[row] = low + (at - below) * (high - low)
    return out


def _divide(numerator: float, denominator: np.ndarray | float) -> np.ndarray:
    """Division where a null without loops gives infinity, and 0/0 gives 1: nothing against nothing."""
    below = np.asarray(denominator, np.float64)
    if numerator == 0:
        return np.where(below > 0, 0.0, 1.0)
    return np.divide(numerator, below, out=np.full_like(below, np.inf), where=below > 0)
