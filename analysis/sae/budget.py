"""What a sparse code costs, what it uses, and how many active features a target fidelity takes.

Shape suffixes: N tokens, K active features per token, F features (d_sae), G grid points of k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

DENSE = 0.1  # share of tokens above which a feature counts as dense
VALUE_BITS = 8  # the study quantises each active value to one byte


def rate_bits(d_sae: int, k: int) -> float:
    """Bits per token with all supports equally likely: log2 C(d_sae, k) + 8k, exact to float64 rounding."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k={k} must lie in 1..d_sae={d_sae}; choose k <= d_sae")
    return math.log2(math.comb(d_sae, k)) + VALUE_BITS * k


def rate_bits_entropy(index_entropy: float, k: int) -> float:
    """Bits per token with indices entropy-coded by how often each feature fires: k·H − log2 k! + 8k.

    The order of the k indices carries no information, so its log2 k! bits are taken off, as in the uniform
    bound log2 C(d_sae, k); with equal use of all features and k ≪ d_sae the two agree.

    Args:
        index_entropy: H in bits, the entropy of the feature index of a randomly chosen activation.
        k: active features per token.
    """
    if k < 1 or not index_entropy >= 0:
        raise ValueError(f"index_entropy={index_entropy} bits must be >= 0 and k={k} >= 1")
    return max(0.0, k * index_entropy - math.lgamma(k + 1) / math.log(2)) + VALUE_BITS * k


class FeatureCounts:
    """How often each of F features fires on the evaluation set, counted on the indices' device."""

    def __init__(self, d_sae: int) -> None:
        if d_sae < 1:
            raise ValueError(f"d_sae={d_sae} must be >= 1")
        self.d_sae = d_sae
        import torch  # here: reports, which count nothing, do without it

        self._counts_F = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, index_NK: torch.Tensor, value_NK: torch.Tensor | None = None) -> None:
        """Add the active indices of some tokens, any leading shape.

        Args:
            index_NK: feature indices, integers in [0, d_sae).
            value_NK: their activations; an entry of value <= 0 did not fire and is not counted.
        """
        index = index_NK.reshape(-1)
        if value_NK is not None:
            index = index[value_NK.reshape(-1) > 0]
        counts = index.bincount(minlength=self.d_sae)
        if counts.numel() > self.d_sae:
            raise ValueError(f"feature index {int(index.max())} is outside [0, d_sae={self.d_sae})")
        self._counts_F = self._counts_F.to(counts.device) + counts

    @property
    def counts_F(self) -> npt.NDArray[np.int64]:
        """Firings of each feature."""
        return self._counts_F.cpu().numpy()

    def alive(self) -> float:
        """Share of features that fired at least once, in [0, 1]."""
        return float((self.counts_F > 0).mean())

    def density(self, tokens: int) -> dict[str, float]:
        """How the firings are spread (`columns.FIRING_COLUMNS`), over all `tokens` that were counted.

        `l0` features fire per token; of those that fire at all, half do on at least `density_median` of the tokens;
        `dense_share` of all features fire on more than DENSE of them.
        """
        density_F = self.counts_F / tokens
        alive = density_F[density_F > 0]
        return {
            "l0": float(density_F.sum()),
            "density_median": float(np.median(alive)) if len(alive) else math.nan,
            "dense_share": float((density_F > DENSE).mean()),
        }

    def index_entropy(self) -> float:
        """H = −Σ p log2 p in bits, p_j feature j's share of all firings."""
        counts = self.counts_F[self.counts_F > 0].astype(float)
        if not len(counts):
            raise ValueError("no feature fired; the index entropy needs at least one active feature")
        share = counts / counts.sum()
        return max(0.0, float(-(share * np.log2(share)).sum()))

    def rate_bits_entropy(self, k: int) -> float:
        """`rate_bits_entropy` at the measured index entropy."""
        return rate_bits_entropy(self.index_entropy(), k)


@dataclass(frozen=True)
class Censored:
    """A k* known only to lie beyond the grid: side ">" above its largest k, side "<=" at or below its smallest."""

    side: str
    limit: float

    def __str__(self) -> str:
        return f"{self.side} {self.limit:g}"


KStar = float | Censored


@dataclass(frozen=True)
class KStarInterval:
    """k* of a curve and its limits."""

    value: KStar
    lo: KStar
    hi: KStar

    def __str__(self) -> str:
        return f"{format_k_star(self.value)} [{format_k_star(self.lo)}, {format_k_star(self.hi)}]"


def format_k_star(value: KStar) -> str:
    """One decimal, or the censored marker: "71.2", "> 256"."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def k_star_interval(
    k: npt.ArrayLike, ce_rec: npt.ArrayLike, lo: npt.ArrayLike, hi: npt.ArrayLike, target: float
) -> KStarInterval:
    """k* of a curve and where the limits of its CE_rec cross the target; arguments as in `k_star`.

    At the true k* the true curve is the target, so the limits hold it as often as those of CE_rec hold the curve there.
    """
    return KStarInterval(k_star(k, ce_rec, target), k_star(k, hi, target), k_star(k, lo, target))


def k_star(k: npt.ArrayLike, ce_rec: npt.ArrayLike, target: float) -> KStar:
    """The smallest k with CE_rec >= target, linearly interpolated on the grid and never extrapolated.

    Args:
        k: (G,) the grid, in any order.
        ce_rec: (G,) the curve.
        target: the CE_rec to reach, 0.85 or 0.90 in the study.
    Returns:
        A float, or Censored("> largest k") when the grid never reaches the target, or Censored("<= smallest k") when
        it starts above it.
    """
    grid = np.asarray(k, dtype=float)
    curve = np.asarray(ce_rec, dtype=float)
    if grid.ndim != 1 or not len(grid) or curve.shape != grid.shape:
        raise ValueError(f"k has shape {grid.shape} and ce_rec {curve.shape}; give (G,) and (G,)")
    if len(np.unique(grid)) != len(grid) or not np.isfinite(curve).all():
        raise ValueError(f"k={grid.tolist()} must be distinct and every ce_rec finite; average or drop duplicates")
    order = np.argsort(grid)
    return _crossing(grid[order], curve[order], target)


def _crossing(grid: npt.NDArray[np.float64], curve: npt.NDArray[np.float64], target: float) -> KStar:
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return Censored(">", float(grid[-1]))
    first = int(reached[0])
    if first == 0:
        return Censored("<=", float(grid[0]))
    share = (target - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float(grid[first - 1] + share * (grid[first] - grid[first - 1]))
