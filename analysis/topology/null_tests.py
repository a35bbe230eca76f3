"""Is the largest loop larger than chance? Monte-Carlo tests against matched nulls, and the published ratio.

The statistic everywhere is the largest finite H1 persistence of a diagram ("top 1").

Shapes: R runs (subsamples), B null draws a run (`observed_R`, `null_RB`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.thresholds import Threshold, largest_threshold

SKEW_LEVEL = 0.985


@dataclass(frozen=True, kw_only=True)
class NullTest:
    """Test of "the largest loop is no larger than under any of the nulls".

    `p` is the largest over the nulls of their Monte-Carlo p-values (intersection-union: every null must be beaten,
    Berger 1982), `null` the one that attains it. `p_lo` and `p_hi` bound the largest p-value over the nulls that
    endless draws would give (Clopper & Pearson, 95%; NaN where p is merged from runs). `least_p` is the smallest p that
    these numbers of draws can give.
    """

    p: float
    null: str
    p_by_null: dict[str, float]
    draws: int
    p_lo: float
    p_hi: float
    least_p: float

    def draws_needed(self, alpha: float, tests: int = 1) -> int:
        """Fewest draws with which `tests` times this test's least p is below alpha: Holm's first step."""
        return draws_needed(alpha, tests * round(self.least_p * (self.draws + 1)))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Observed mean of a statistic over the largest null threshold, with its 95% interval over runs and draws.

    `threshold` is that largest threshold, `null` the one that sets it, `share_above` the share of runs above it. From
    few draws a 95th percentile is nearly their maximum and lies low on average, so the ratio lies high; `lo` is then 0,
    since the draws give the threshold no upper limit. `effective`: independent draws that its `draws` are worth.
    """

    value: float
    lo: float
    hi: float
    threshold: float
    null: str
    share_above: float
    draws: int
    effective: float


def draws_needed(alpha: float, tests: int = 1) -> int:
    """Fewest null draws B with which a Monte-Carlo p, at best 1/(B + 1), can fall below alpha after Holm over `tests`.

    Raises:
        ValueError: alpha outside (0, 1), or tests below 1.
    """
    if not 0 < alpha < 1 or tests < 1:
        raise ValueError(f"alpha={alpha}, tests={tests}; choose 0 < alpha < 1 and tests >= 1")
    return math.floor(tests / alpha)


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


def beats_nulls(
    observed_R: Sequence[float] | np.ndarray, nulls: Mapping[str, np.ndarray], *, joint: bool = False
) -> NullTest:
    """Is the runs' top 1 larger than under every null? One test of all runs together.

    `nulls` maps a name to null_RB, drawn for the same runs in the same order as `observed_R`.

    joint: column b holds ONE realisation of the whole table, cut to every run's rows. Then the mean over the runs is
    exchangeable with that of each column, whatever the runs share, and p is exact. Without it each run's draws are its
    own: the observed runs overlap and vary together, their null columns do not, and comparing means would reject a
    true null three times too often (.16 at 80% overlap). Then every run gets its own p, and p is twice their average,
    which is valid under any dependence (Rüschendorf 1982; Vovk & Wang 2020); one run needs no factor.

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
    if not joint and len(observed_R) > 1:
        return _merged(observed_R, drawn)
    means = {name: null_RB.mean(axis=0) for name, null_RB in drawn.items()}
    p_by_null = {name: monte_carlo_p(observed_R.mean(), mean_B) for name, mean_B in means.items()}
    exceed = {name: (int((mean_B >= observed_R.mean()).sum()), len(mean_B)) for name, mean_B in means.items()}
    lows = [_clopper_pearson(*counts, 0.025 / len(means))[0] for counts in exceed.values()]
    highs = [_clopper_pearson(*counts, 0.025)[1] for counts in exceed.values()]
    worst = max(p_by_null, key=lambda name: p_by_null[name])
    return NullTest(
        p=p_by_null[worst],
        null=worst,
        p_by_null=p_by_null,
        draws=min(map(len, means.values())),
        p_lo=max(lows),
        p_hi=max(highs),
        least_p=max(1 / (len(mean_B) + 1) for mean_B in means.values()),
    )


def _merged(observed_R: np.ndarray, drawn: Mapping[str, np.ndarray]) -> NullTest:
    """Twice the average of the runs' p-values, for each null."""
    p_by_null = {
        name: min(
            1.0, 2 * float(np.mean([monte_carlo_p(o, null_B) for o, null_B in zip(observed_R, null_RB, strict=True)]))
        )
        for name, null_RB in drawn.items()
    }
    worst = max(p_by_null, key=lambda name: p_by_null[name])
    draws = min(null_RB.shape[1] for null_RB in drawn.values())
    return NullTest(
        p=p_by_null[worst],
        null=worst,
        p_by_null=p_by_null,
        draws=draws,
        p_lo=math.nan,
        p_hi=math.nan,
        least_p=min(1.0, 2 / (draws + 1)),
    )


def _clopper_pearson(exceed: int, draws: int, tail: float) -> tuple[float, float]:
    """Limits of the share that endless draws would have above, each missed with probability `tail` at most."""
    low = stats.beta.ppf(tail, exceed, draws - exceed + 1) if exceed else 0.0
    high = stats.beta.isf(tail, exceed + 1, draws - exceed) if exceed < draws else 1.0
    return float(low), float(high)


def mean_interval(values_R: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95% interval of the expected value over subsamples of this table; (NaN, NaN) for fewer than 2 runs.

    Given the table, its subsamples are independent draws of rows, however much they overlap, so it is a t interval, but
    of level SKEW_LEVEL: the top 1 of a few subsamples is skewed, and the plain one covers .88 to .95. Also NaN where
    all runs are equal: their spread is then unknown, not zero.
    """
    values_R = _finite(values_R, "runs")
    if len(values_R) < 2 or np.ptp(values_R) == 0:
        return math.nan, math.nan
    half = stats.t.ppf((1 + SKEW_LEVEL) / 2, len(values_R) - 1) * stats.sem(values_R)
    return float(values_R.mean() - half), float(values_R.mean() + half)


def top1_ratio(observed_R: Sequence[float] | np.ndarray, nulls: Mapping[str, np.ndarray]) -> Ratio:
    """The published statistic: mean over runs of top 1 / max over nulls of `np.quantile(null top 1, 0.95)`.

    `nulls` maps a name to its draws: independent [B], or [R, B] with one row per run, where a column may be one
    realisation for all runs. The interval is that of E/Q, for subsamples of this table: E the expected top 1 of a
    subsample, Q the largest over nulls of the 95th percentile over subsamples and draws. It joins the t interval of the
    observed mean with the order-statistic interval of the threshold (`thresholds.largest_threshold`) as Donner & Zou
    2012 do; one observed value, or several that are all equal, is taken as known (the whole table).

    Raises:
        ValueError: no run, no null, or values that are not finite.
    """
    observed_R = _finite(observed_R, "observed")
    if not nulls:
        raise ValueError("0 nulls; give one or more, a ratio needs a denominator")
    name, bar = largest_threshold(nulls)
    return _ratio(observed_R, name, bar)


def pooled_ratio(
    observed_R: Sequence[float] | np.ndarray, null_diagrams: Mapping[str, Mapping[int, Sequence[np.ndarray]]]
) -> Ratio:
    """Like `top1_ratio`, with the 95th percentile of ALL loops of a null's diagrams pooled as its threshold.

    A far lower bar than the largest loop of each draw: most loops are short. `null_diagrams` maps a null and a run to
    the diagrams [n, 2] of its draws in order; the loops of a run, and those of a draw, count as dependent.

    Raises:
        ValueError: no run, no null, a null without a diagram, or nulls that have no loop at all.
    """
    observed_R = _finite(observed_R, "observed")
    values, labels = {}, {}
    for name, by_run in null_diagrams.items():
        lives = {(run, draw): _lives(d) for run, drawn in by_run.items() for draw, d in enumerate(drawn)}
        sizes = [len(life) for life in lives.values()]
        values[name] = np.concatenate([*lives.values(), np.empty(0)])
        run_V, draw_V = (np.repeat([key[i] for key in lives], sizes) for i in (0, 1))
        labels[name] = (run_V, draw_V)
    if not values or any(not lives.size for lives in values.values()):
        raise ValueError(f"nulls {sorted(values)} have a null without loops; draw more, or use top1_ratio")
    name, bar = largest_threshold(values, labels=labels)
    return _ratio(observed_R, name, bar)


def _ratio(observed_R: np.ndarray, name: str, bar: Threshold) -> Ratio:
    mean = float(observed_R.mean())
    below, above = mean_interval(observed_R)
    if math.isnan(below):
        below = above = mean
    lo, hi = _quotient_interval((mean, below, above), (bar.value, bar.lo, bar.hi))
    return Ratio(
        value=float(_divide(mean, bar.value)),
        lo=lo,
        hi=hi,
        threshold=bar.value,
        null=name,
        share_above=float((observed_R > bar.value).mean()),
        draws=bar.draws,
        effective=bar.effective,
    )


def _quotient_interval(top: tuple[float, float, float], bottom: tuple[float, float, float]) -> tuple[float, float]:
    """Interval of a quotient of two positive numbers from (value, lo, hi) of each, on the log scale.

    Each limit is as far from the quotient as the two limits that drive it there together (Donner & Zou 2012). A bottom
    without an upper limit leaves 0, one without a lower limit, or without a loop, infinity.
    """
    if bottom[0] <= 0:
        return 0.0, math.inf
    if top[0] <= 0:
        return 0.0, 0.0
    down, up, short, long = (
        _log_gap(a, b) for a, b in ((top[0], top[1]), (top[2], top[0]), (bottom[0], bottom[1]), (bottom[2], bottom[0]))
    )
    centre = math.log(top[0] / bottom[0])
    return math.exp(centre - math.hypot(down, long)), _exp(centre + math.hypot(up, short))


def _log_gap(larger: float, smaller: float) -> float:
    return math.inf if smaller <= 0 or math.isinf(larger) else math.log(larger / smaller)


def _exp(x: float) -> float:
    return math.inf if math.isinf(x) else math.exp(x)


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


def _divide(numerator: float, denominator: np.ndarray | float) -> np.ndarray:
    """Division where a null without loops gives infinity, and 0/0 gives 1: nothing compared with nothing."""
    below = np.asarray(denominator, np.float64)
    if numerator == 0:
        return np.where(below > 0, 0.0, 1.0)
    return np.divide(numerator, below, out=np.full_like(below, np.inf), where=below > 0)
