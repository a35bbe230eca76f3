"""The gap between two models after endless training, from its values at several budgets.

    Δ(b) = Δ∞ + c · b^(−α)

For a given α this is linear: Δ∞ is a weighted sum of the Δ(b), and so is each seed's and each sequence's influence on
it. Its interval is therefore that of `contrasts` for any difference (seeds of both models, sequences; budgets of one
trajectory stay together). α is not known, and four budgets tell little about it: an interval at the best α is far too
narrow. So every α of a grid is kept whose fit the data do not reject (LACK, Holm over the contrasts that the curve
leaves free), and the interval of Δ∞ is the union of theirs. If the true α is among them the union covers as its own
interval does; that it is not costs at most LACK (Berger & Boos 1994, "P values maximized over a confidence set for the
nuisance parameter", JASA 89).

Shape suffixes: G budgets, S seeds, U sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.bootstrap import Floats
from analysis.multiplicity import holm_list
from analysis.sae.contrasts import Measured, combination, difference_effects

ALPHAS: Floats = np.geomspace(0.15, 2.0, 32)
LACK = 0.01  # level at which an α is left out
MIN_BUDGETS = 4


@dataclass(frozen=True)
class Asymptote:
    """Δ∞ with its 95% limits, and the range of α that the data allow; NaN where `needs` says what they would need."""

    value: float
    lo: float
    hi: float
    alphas: tuple[float, float] = (math.nan, math.nan)
    needs: str = ""


def asymptote(budgets: Sequence[float], large: Sequence[Measured], small: Sequence[Measured]) -> Asymptote:
    """Δ∞ of `large` less `small`.

    Args:
        budgets: G training budgets, ascending.
        large, small: a metric of each model's trained SAEs at each budget, seeds in the same order.
    """
    if len(budgets) < MIN_BUDGETS:
        return _none(f"≥ {MIN_BUDGETS} budgets of both models")
    for models in (large, small):
        if len({m.table_SU.shape for m in models}) > 1 or len({m.sequences for m in models}) > 1:
            return _none("the same seeds and evaluated sequences at every budget")
    x_G = np.asarray(budgets, float) / budgets[0]
    gap_G = np.array([a.table_SU.mean() - b.table_SU.mean() for a, b in zip(large, small, strict=True)])
    curves = [_Curve.of(x_G**-alpha, gap_G) for alpha in ALPHAS]
    pairs = [_weighted(w_G, large, small) for curve in curves for w_G in (curve.limit_G, *curve.free_FG)]
    found = difference_effects(pairs)
    if found[0].needs:
        return _none(found[0].needs)
    step = len(found) // len(curves)
    limits = [found[i * step] for i in range(len(curves))]
    fits = [min(holm_list([e.p for e in found[i * step + 1 : (i + 1) * step]])) > LACK for i in range(len(curves))]
    fitting = [i for i, fit in enumerate(fits) if fit]
    kept = sorted({j for i in fitting for j in (i - 1, i, i + 1) if 0 <= j < len(curves)})  # α between grid points, too
    best = min(range(len(curves)), key=lambda i: curves[i].misfit)
    if not kept:
        return _none("a gap that follows Δ∞ + c·b^(−α): no α fits")
    return Asymptote(
        limits[best if best in kept else kept[0]].value,
        min(limits[i].lo for i in kept),
        max(limits[i].hi for i in kept),
        (float(ALPHAS[kept[0]]), float(ALPHAS[kept[-1]])),
    )


@dataclass(frozen=True)
class _Curve:
    """One α: weights of the budgets that give Δ∞, and those of the contrasts that the curve leaves free."""

    limit_G: Floats
    free_FG: Floats
    misfit: float

    @classmethod
    def of(cls, decay_G: Floats, gap_G: Floats) -> _Curve:
        design_G2 = np.stack([np.ones_like(decay_G), decay_G], axis=1)
        basis_GG, _ = np.linalg.qr(design_G2, mode="complete")
        free_FG = basis_GG[:, 2:].T
        return cls(np.linalg.pinv(design_G2)[0], free_FG, float(((free_FG @ gap_G) ** 2).sum()))


def _weighted(w_G: Floats, large: Sequence[Measured], small: Sequence[Measured]) -> tuple[Measured, Measured]:
    return combination(w_G, large), combination(w_G, small)


def _none(needs: str) -> Asymptote:
    return Asymptote(math.nan, math.nan, math.nan, needs=needs)


def equal_alive(
    budgets: Sequence[float], alive: tuple[Sequence[float], Sequence[float]], models: Sequence[Sequence[Measured]]
) -> tuple[float, tuple[Measured, Measured]] | None:
    """(alive share, the two models' metric at it), interpolated over log budgets; None where the curves do not meet.

    The share is the largest that both models reach; what is alive is taken as known, without an error of its own.

    Args:
        alive: each model's mean share of features alive at each budget.
        models: each model's metric at each budget.
    """
    share = min(max(curve) for curve in alive)
    weights = [_crossing(np.log(np.asarray(budgets, float)), np.asarray(curve, float), share) for curve in alive]
    if any(w is None for w in weights):
        return None
    a, b = (combination(w, m) for w, m in zip(weights, models, strict=True) if w is not None)
    return share, (a, b)


def _crossing(log_b_G: Floats, curve_G: Floats, share: float) -> Floats | None:
    """Weights of the budgets that interpolate where the curve first reaches the share."""
    reached = np.flatnonzero(curve_G >= share)
    if not len(reached) or (reached[0] == 0 and curve_G[0] > share):
        return None
    weights, i = np.zeros(len(curve_G)), int(reached[0])
    if i == 0 or curve_G[i] == share:
        weights[i] = 1.0
        return weights
    part = (share - curve_G[i - 1]) / (curve_G[i] - curve_G[i - 1])
    weights[i - 1 : i + 1] = 1 - part, part
    return weights
