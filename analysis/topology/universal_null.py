"""Significance of every loop from one diagram alone: the universal null of persistent homology.

Bobrowski & Skraba 2023, "A universal null-distribution for topological data analysis", Scientific Reports 13:12274.
With π = death/birth, the values ℓ = A·log log π + B of the noise follow one law whatever the data: the left-skewed
Gumbel law, F(x) = 1 − exp(−eˣ). A = 1 for the Rips complex, and B = −λ − A·mean(log log π), λ Euler's constant,
puts the mean of ℓ at that law's mean. A conjecture, strong in simulations; it says "not noise", which is not the
same question as "larger than matched nulls".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

RIPS_SCALE = 1.0  # the paper's A


@dataclass(frozen=True, kw_only=True)
class UniversalNull:
    """The loops [P, 2] of one diagram that have a p-value, in its order, and those values [P].

    `left_out` counts the others: born at 0, dead at or before their birth, or never.
    """

    pairs_P2: np.ndarray
    p: np.ndarray
    bonferroni: np.ndarray
    benjamini_hochberg: np.ndarray
    left_out: int

    def significant(self, alpha: float = 0.05) -> tuple[int, int]:
        """Number of loops below alpha after Bonferroni, and after Benjamini-Hochberg."""
        return int((self.bonferroni < alpha).sum()), int((self.benjamini_hochberg < alpha).sum())


def universal_null(diagram: np.ndarray) -> UniversalNull:
    """Per-loop p-values of a Rips diagram of (birth, death) pairs [n, 2].

    log log π does not exist for a loop born at 0, or one that never dies: such loops are left out, and counted.

    Raises:
        ValueError: fewer than 2 loops remain, too few to centre ℓ.
    """
    pairs = np.asarray(diagram, np.float64).reshape(-1, 2)
    usable = (pairs[:, 0] > 0) & (pairs[:, 1] > pairs[:, 0]) & np.isfinite(pairs[:, 1])
    kept = pairs[usable]
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {len(pairs)} loops have 0 < birth < death < ∞; the universal null needs 2")
    loglog = np.log(np.log(kept[:, 1] / kept[:, 0]))
    ell = RIPS_SCALE * (loglog - loglog.mean()) - np.euler_gamma
    p = stats.gumbel_l.sf(ell)
    return UniversalNull(
        pairs_P2=kept,
        p=p,
        bonferroni=np.minimum(1.0, p * len(p)),
        benjamini_hochberg=stats.false_discovery_control(p),
        left_out=int((~usable).sum()),
    )
