"""The ladder of proxies beyond R²: what a cell's sequences say of each rung, and what a rung costs.

Each rung is cheaper and blinder than the next: the first order of the loss (one backward pass), the pullback Fisher
form (a forward-mode pass), the divergence of the patched predictions and of the attention plans (the patched pass).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.sae.columns import RUNG_SUMS


def rung_numbers(table: pd.DataFrame) -> dict[str, float]:
    """RUNG_COLUMNS that follow from a cell's sequences; NaN where one was not measured.

    Args:
        table: one row per sequence: n_tokens, loss_orig, loss_recon, and RUNG_SUMS, each a mean over the sequence's
            predictions (attention_plan: the sum over later layers of the mean over heads and rows).
    Returns:
        RUNG_SUMS as means over sequences, weighted as the losses are, and of the first order
        first_order_slope: least-squares slope through 0 of the true rise of the loss, L(â) − L(a), on the predicted
            one, Σ_t g_tᵀδ_t: 1 where the first order is the whole truth, beyond 1 where curvature adds;
        first_order_correlation: Pearson's, over sequences; first_order_signs: share of sequences with equal signs.
    """
    weight = table["n_tokens"].to_numpy(float)
    numbers = {name: float(np.average(table[name].to_numpy(float), weights=weight)) for name in RUNG_SUMS}
    predicted, rise = table["first_order"].to_numpy(float), (table["loss_recon"] - table["loss_orig"]).to_numpy(float)
    square = float((predicted**2).sum())
    varies = len(table) > 2 and predicted.std() > 0 and rise.std() > 0
    known = bool(np.isfinite(predicted).all())
    numbers["first_order_slope"] = float((predicted * rise).sum()) / square if square > 0 else math.nan
    numbers["first_order_correlation"] = float(np.corrcoef(predicted, rise)[0, 1]) if varies and known else math.nan
    numbers["first_order_signs"] = float((np.sign(predicted) == np.sign(rise)).mean()) if known else math.nan
    return numbers


def deviation(fisher_sum: float, expected_sum: float) -> float:
    """Fisher-Euclidean deviation F(δ) / (‖δ‖² λ̄), λ̄ = E_u[F(u)] / ‖u‖² over directions u with δ's norm at every token.

    Above 1 the error points where the predictions are sensitive. For independent random directions only the diagonal
    blocks of the Fisher information remain: E_u[F(u)] = Σ_t ‖δ_t‖² tr(F_tt) / D, and tr(F_tt) = E‖s_t‖² for the scores
    s of labels that are drawn from the model. So no random direction is ever pushed through the model.

    Args:
        fisher_sum: Σ over sequences of δᵀFδ.
        expected_sum: Σ over tokens of ‖δ_t‖² ‖s_t‖² / D.
    """
    return fisher_sum / expected_sum if expected_sum > 0 else math.nan


@dataclass(frozen=True)
class Cost:
    """What a proxy takes beyond the pass that gives the activations, in forward passes of the whole model.

    own: for every SAE. shared: once for all SAEs of a model. NaN where it was not measured; `reason` says why.
    """

    own: float
    shared: float
    reason: str = ""
    once: bool = False  # whether all of it is shared

    def each(self, saes: float) -> float:
        """Passes per SAE when so many of a model share what can be shared."""
        return self.own + self.shared / saes

    def __str__(self) -> str:
        if math.isnan(self.own + self.shared):
            return f"– ({self.reason})" if self.reason else "–"
        return f"{self.shared:.2f} per model" if self.once else f"{self.own:.2f}"


_SPANS_OF = {
    **dict.fromkeys(("inv_swd", "inv_abs_gdelta", "first_order"), ("backward",)),
    "fisher_sampled": ("drawn",),
    **dict.fromkeys(("fisher", "fisher_diag"), ("fisher",)),
    "kl": ("patched",),
    "ce_rec": ("patched",),
    "attention_plan": ("patched", "plans"),
}


def cost_of(proxy: str, costs: pd.DataFrame) -> Cost:
    """Cost of a proxy (`leaderboard.PROXIES`, or "ce_rec") from `merged_costs`; R² and its like take nothing."""
    spans = list(_SPANS_OF.get(proxy, ()))
    if not set(spans) <= set(costs.index):
        return Cost(math.nan, 0.0)
    part = costs.loc[spans]
    own, shared = (float(part.loc[part["shared"] == once, "passes"].sum(skipna=False)) for once in (False, True))
    reason = "; ".join(reason for reason in part["reason"] if reason)
    return Cost(own, shared, reason, once=bool(spans) and bool(part["shared"].all()))


def merged_costs(costs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Median cost of each rung over the cells that measured it, and the reasons of those that could not.

    Args:
        costs: cell_key → rows of columns rung, passes (forward passes of the whole model for the same tokens), shared
            (whether all SAEs of a model share it) and reason (empty where it was measured).
    Returns:
        Index rung, columns passes, shared, reason.
    """
    if not costs:
        return pd.DataFrame(columns=["passes", "shared", "reason"])
    rows = pd.concat(costs.values(), ignore_index=True)
    grouped = rows.groupby("rung", sort=False)
    return pd.DataFrame(
        {
            "passes": grouped["passes"].median(),
            "shared": grouped["shared"].first().astype(bool),
            "reason": grouped["reason"].agg(lambda text: "; ".join(sorted({t for t in text if t}))),
        }
    )
