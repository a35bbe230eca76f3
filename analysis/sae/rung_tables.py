"""Tables of the proxy-gap report on the rungs of the ladder: what each says of a configuration."""

from __future__ import annotations

import math

import numpy as np

from analysis.sae.columns import RUNG_COLUMNS
from analysis.sae.measured import Study, limited, number
from analysis.sae.tables import Section, each, identity


def rungs(study: Study) -> Section:
    """First order, Fisher forms, KL and attention plans of every configuration, and how the rungs agree."""
    title = "The ladder of proxies, every configuration"
    if study.means[list(RUNG_COLUMNS)].isna().all(axis=None):
        return Section(title, needs="cells of a ledger that has the rungs; a new ledger (another --storage) has them")
    part, lines = limited(study)
    rows = [
        identity(row)
        | {"L(â) − L(a)": _plain(row["loss_recon"] - row["loss_orig"], sign=True)}
        | {"first order Σgᵀδ": _plain(row["first_order"], sign=True), "slope": _plain(row["first_order_slope"], 2)}
        | {"correlation": _plain(row["first_order_correlation"], 2), "equal signs": _plain(row["first_order_signs"], 2)}
        | {"½ Fisher form": _plain(row["fisher"] / 2), "KL": _plain(row["kl"])}
        | {"KL / ½ Fisher": _plain(_ratio(row["kl"], row["fisher"] / 2), 2)}
        | {"diagonal / Fisher": _plain(_ratio(row["fisher_diag"], row["fisher"]), 2)}
        | {"drawn / Fisher": _plain(_ratio(row["fisher_sampled"], row["fisher"]), 2)}
        | {"Fisher / Euclidean": _plain(row["fisher_deviation"], 2), "attention plans": _plain(row["attention_plan"])}
        for row in each(part)
    ]
    text = (
        "Means over seeds, nats per prediction. Slope: of the true rise of a sequence's loss on the first order Σgᵀδ, "
        "through 0. Fisher form: Var_p of the logits' change under J·δ, all positions moved at once; half of it is the "
        "KL of a small error, so KL / ½ Fisher tells how far the error is beyond small. Diagonal: E_p[(Jδ)²]; drawn: "
        "(sᵀδ)² with the scores s of one label drawn per position, unbiased and noisy. Fisher / Euclidean: F(δ) over "
        "what random directions with the same norms give; above 1 the error points where the predictions are "
        "sensitive. Attention plans: KL(P̂ ‖ P) of attention rows, mean over heads and rows, summed over later layers."
    )
    reasons = [f"Not measured: {name} ({reason})." for name, reason in study.costs["reason"].items() if reason]
    return Section(title, rows, [text, *reasons, *lines])


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _plain(value: float, digits: int = 3, *, sign: bool = False) -> str:
    return number(value, digits, sign=sign) if np.isfinite(value) else "–"
