"""Quantiles of null draws as thresholds, with intervals that count the values that are really independent.

A 95th percentile lies among the few largest draws. No resample exceeds the sample's maximum, so a bootstrap interval of
it is far too short; order statistics have the exact coverage for independent draws, whatever their law. Draws that
share a subsample (run), or a realisation of the null, are not independent: their number is then replaced by that of
independent draws worth as much (Korn & Graubard 1998), from the variance between the groups. Where that is too small
for a limit, the limit is infinite.

Shapes: V values, R runs, B draws a run (`values_V`, `null_RB`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

QUANTILE, LEVEL = 0.95, 0.95
_WIDER_TAIL = 3  # few values lie beyond a far quantile, so that groups which differ may look alike there by chance


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A quantile of null values and its interval; `hi` is inf and `lo` −inf where the draws are too few.

    `effective`: the number of independent values that these are worth; `draws`: their number.
    """

    value: float
    lo: float
    hi: float
    draws: int
    effective: float


def least_draws(quantile: float = QUANTILE, level: float = LEVEL, *, two_sided: bool = True) -> int:
    """Fewest independent draws whose largest is an upper limit of the quantile at that level: 72 (one-sided 59).

    Raises:
        ValueError: quantile or level outside (0, 1).
    """
    _check(quantile, level)
    return math.ceil(math.log((1 - level) / (2 if two_sided else 1)) / math.log(quantile))


def threshold(
    values: Sequence[float] | np.ndarray,
    *,
    runs: np.ndarray | None = None,
    draws: np.ndarray | None = None,
    quantile: float = QUANTILE,
    level: float = LEVEL,
) -> Threshold:
    """`np.quantile(values, quantile)` and its interval, each limit missed with probability at most (1 − level)/2.

    Args:
        values: independent draws [B]; or runs × draws [R, B], where column b may be one realisation of the null for all
            runs; or any values [V] with labels.
        runs: [V], the run of each value; [R, B] values have theirs by row.
        draws: [V], the realisation of each value, shared by the runs that name it.
        quantile, level: within (0, 1).

    Raises:
        ValueError: no value, one that is not finite, or labels of another length.
    """
    _check(quantile, level)
    array = np.asarray(values, np.float64)
    if array.ndim == 2 and runs is None and draws is None:
        runs, draws = (label.ravel() for label in np.indices(array.shape))
    values_V = array.ravel()
    if not values_V.size or not np.isfinite(values_V).all():
        raise ValueError(f"{values_V.size} null values, not all finite; give finite values, one or more")
    for name, label in (("runs", runs), ("draws", draws)):
        if label is not None and np.shape(label) != values_V.shape:
            raise ValueError(f"{name} has shape {list(np.shape(label))} for {values_V.size} values; label each value")
    value = float(np.quantile(values_V, quantile))
    groupings = [label for label in (runs, draws) if label is not None]
    bars = (value, float(np.quantile(values_V, 1 - _WIDER_TAIL * (1 - quantile))))
    effective = min(_effective(values_V <= bar, groupings, level) for bar in bars)
    lo, hi = _order_interval(np.sort(values_V), effective, quantile, level)
    return Threshold(value=value, lo=lo, hi=hi, draws=values_V.size, effective=effective)


def largest_threshold(
    nulls: Mapping[str, np.ndarray | Sequence[float]],
    *,
    labels: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    quantile: float = QUANTILE,
    level: float = LEVEL,
) -> tuple[str, Threshold]:
    """The largest of several nulls' quantiles, the null that has it, and an interval of the largest true quantile.

    The lower limit is the largest of the nulls' lower limits, each at a K-th of its error (K nulls: any of them might
    lie too high); the upper limit is the largest of the upper limits, which misses only if that of the null with the
    largest true quantile does. `labels` maps a null to the runs and draws of its values, as in `threshold`.

    Raises:
        ValueError: no null, or values that `threshold` refuses.
    """
    if not nulls:
        raise ValueError("0 nulls; give one or more")
    strict = 1 - (1 - level) / len(nulls)
    found, lows = {}, []
    for name, values in nulls.items():
        runs, draws = labels[name] if labels else (None, None)
        found[name] = threshold(values, runs=runs, draws=draws, quantile=quantile, level=level)
        lows.append(threshold(values, runs=runs, draws=draws, quantile=quantile, level=strict).lo)
    worst = max(found, key=lambda name: found[name].value)
    least = min(found.values(), key=lambda one: one.effective)
    return worst, Threshold(
        value=found[worst].value,
        lo=max(lows),
        hi=max(one.hi for one in found.values()),
        draws=found[worst].draws,
        effective=least.effective,
    )


def _check(quantile: float, level: float) -> None:
    if not (0 < quantile < 1 and 0 < level < 1):
        raise ValueError(f"quantile={quantile}, level={level}; choose both within (0, 1)")


def _effective(below_V: np.ndarray, groupings: Sequence[np.ndarray], level: float) -> float:
    """Number of independent values whose share `below` would be as uncertain as that of these.

    The variance of the share is that of the sums over groups; for two crossed groupings, both less that of their cells
    (Cameron, Gelbach & Miller 2011), no less than any one of them. Few groups estimate it poorly: the ratio of the t
    quantiles squared shrinks the number (Korn & Graubard 1998).
    """
    n = below_V.size
    share = below_V.mean()
    residual_V = (below_V - share) / n
    crossed = [label for label in groupings if len(np.unique(label)) > 1]
    if not crossed or share in (0.0, 1.0):
        return float(n if not crossed else min(len(np.unique(label)) for label in crossed))
    parts, freedom = zip(*[_between(residual_V, label) for label in crossed], strict=True)
    variance, df = max(parts), min(freedom)
    if len(crossed) == 2:
        cells = np.unique(np.stack(crossed, axis=1), axis=0, return_inverse=True)[1].ravel()
        both = sum(parts) - _between(residual_V, cells)[0]
        variance = max(variance, both)
        df = variance**2 / sum(part**2 / f for part, f in zip(parts, freedom, strict=True))
        df = max(min(freedom), min(df, max(freedom)))
    if variance <= 0:
        return float(n)
    tail = 1 - (1 - level) / 2
    all_apart, as_grouped = special.stdtrit([n - 1, df], tail)
    shrink = (all_apart / as_grouped) ** 2
    return float(min(n, shrink * share * (1 - share) / variance))


def _between(residual_V: np.ndarray, label_V: np.ndarray) -> tuple[float, int]:
    """Variance of the sum of all residuals from its sums over groups, and its degrees of freedom."""
    _, group_V = np.unique(label_V, return_inverse=True)
    sums = np.bincount(group_V.ravel(), weights=residual_V)
    groups = len(sums)
    return float(groups / (groups - 1) * (sums**2).sum()), groups - 1


def _order_interval(sorted_V: np.ndarray, effective: float, quantile: float, level: float) -> tuple[float, float]:
    """Order statistics at the ranks that a sample of `effective` independent values would take, as shares."""
    n, m = sorted_V.size, math.floor(effective)
    tail = (1 - level) / 2
    low, high = stats.binom.ppf([tail, 1 - tail], m, quantile).astype(int)
    high += 1  # P(the value at rank `low` > quantile) = P(binomial < low) <= tail; likewise above `high`
    lo = sorted_V[max(1, math.floor(low / m * n)) - 1] if low >= 1 else -math.inf
    hi = sorted_V[min(n, math.ceil(high / m * n)) - 1] if high <= m else math.inf
    return float(lo), float(hi)
