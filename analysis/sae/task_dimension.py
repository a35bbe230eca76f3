"""The task-relevant dimension k_MI* of a layer: the smallest bottleneck that lets through nearly all information.

Mutual information of an activation X and the model's output Y through critics of k_z dimensions (`models.information`)
rises with k_z to a plateau. k_MI* is the smallest k_z of the grid whose estimate is within TOLERANCE = 5% of the
largest (Gulati, Abdelaleem, Sederberg & Nemenman 2026, arXiv:2602.08105). Every fold of the sequences is held out
once, with a seed of its own, and all k_z share it: differences between k_z are paired by fold. Their t intervals count
that folds share training data: the variance of a mean over F folds is (1/F + 1/(F − 1)) times that between folds
(Nadeau & Bengio 2003, "Inference for the generalization error", Machine Learning 52).

Shape suffixes: F folds, K bottleneck widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.bootstrap import Floats
from analysis.crossed import LEVEL

TOLERANCE = 0.05
LEAST = 0.02  # nats: a smaller plateau counts as no information
AT_CEILING = 0.05  # share of log N: a plateau that near may be the ceiling's


@dataclass(frozen=True)
class TaskDimension:
    """k_MI* with its 95% limits (`hi` is infinite where the grid may end before the plateau) and the plateau in nats.

    NaN where `needs` says what they would need.
    """

    k: float
    lo: float
    hi: float
    plateau: float
    needs: str = ""


def task_dimension(
    dimensions: Sequence[int], estimate_FK: Floats, tolerance: float = TOLERANCE, level: float = LEVEL
) -> TaskDimension:
    """k_MI* from InfoNCE estimates by fold and k_z.

    The limits are those of other seeds and splits: `lo` is the smallest k_z that is not told to lie below the plateau
    by more than the tolerance, `hi` the smallest from which on every k_z is told to lie within it, each at
    (1 − level)/2.

    Raises:
        ValueError: fewer than two folds, estimates of another number of k_z, or estimates that are not finite.
    """
    estimate_FK = np.asarray(estimate_FK, float)
    if estimate_FK.ndim != 2 or len(estimate_FK) < 2 or estimate_FK.shape[1] != len(dimensions):
        raise ValueError(f"estimates of shape {estimate_FK.shape} for {len(dimensions)} k_z; give folds >= 2 x k_z")
    if not np.isfinite(estimate_FK).all():
        raise ValueError("estimates hold NaN or inf; train with fewer steps or a lower rate")
    mean_K = estimate_FK.mean(axis=0)
    top = int(mean_K.argmax())
    plateau = float(mean_K[top])
    if plateau < LEAST:
        return TaskDimension(math.nan, math.nan, math.nan, plateau, f"information above {LEAST:g} nats")
    lack_FK = (1 - tolerance) * estimate_FK[:, [top]] - estimate_FK
    first = int(np.flatnonzero(lack_FK.mean(axis=0) <= 0)[0])
    low_K, high_K = _limits(lack_FK, level)
    lowest = min(int(np.flatnonzero(low_K <= 0)[0]), first)
    outside = np.flatnonzero(high_K[: top + 1] > 0)
    highest = max(int(outside[-1]) + 1 if len(outside) else 0, first)
    last = len(dimensions) - 1
    if first == last:
        lo = float(dimensions[lowest])
        return TaskDimension(math.nan, lo, math.inf, plateau, f"a plateau: k_z beyond {dimensions[last]}")
    hi = math.inf if highest >= last else float(dimensions[highest])
    return TaskDimension(float(dimensions[first]), float(dimensions[lowest]), hi, plateau)


def _limits(lack_FK: Floats, level: float) -> tuple[Floats, Floats]:
    """t limits of the folds' mean lack of information at each k_z."""
    folds = len(lack_FK)
    error_K = lack_FK.std(axis=0, ddof=1) * math.sqrt(1 / folds + 1 / (folds - 1))
    half_K = stats.t.ppf(1 - (1 - level) / 2, folds - 1) * error_K
    mean_K = lack_FK.mean(axis=0)
    return mean_K - half_K, mean_K + half_K


def numbers(dimensions: Sequence[int], estimate_FK: Floats, ratio_F: Floats, ceiling: float) -> dict[str, float]:
    """INFORMATION_COLUMNS of a layer: k_MI* with its limits (NaN: open, or not known), the one-shot estimate of the
    dimension, plateau and ceiling in nats."""
    found = task_dimension(dimensions, estimate_FK)
    return {
        "k_mi": found.k,
        "k_mi_lo": found.lo,
        "k_mi_hi": found.hi if math.isfinite(found.hi) else math.nan,
        "k_mi_one_shot": float(np.mean(ratio_F)),
        "mi_nats": found.plateau,
        "mi_ceiling": ceiling,
    }


def at_ceiling(plateau: float, ceiling: float) -> bool:
    """Whether InfoNCE may hide information beyond its ceiling: k_MI* is then a lower bound."""
    return plateau > (1 - AT_CEILING) * ceiling
