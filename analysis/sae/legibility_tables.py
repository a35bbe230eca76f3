"""Tables of the proxy-gap report on legibility: which classes of tokens a few features tell apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.sae.columns import LEGIBILITY, LEGIBILITY_COLUMNS, PROBED_K
from analysis.sae.measured import Study, limited, number
from analysis.sae.tables import Section, each, identity

HEADS = {
    **{f"k{k}": f"{k} feature{'s' * (k > 1)}" for k in PROBED_K},
    "dense": "activations",
    "mdl": f"bits, {max(PROBED_K)} features",
    "mdl_dense": "bits, activations",
}
MEANING = (
    "Accuracies of logistic regressions that tell a token's class (of Python's `tokenize`, or of a part of "
    "documentation) from the other classes: on the features whose means differ most, and on all coordinates of the "
    "activations. Half of the drawn tokens are of the class, so chance is 0.500. Bits: a prequential code of the "
    "classes, in bits per label; 1.000 is a code without any knowledge, and worse guesses cost more. Probes are "
    "trained on half of the documents and tested on the others. Sinks are left out. Means over the classes that could "
    "be measured; no interval, because the documents are few."
)


def legibility(study: Study) -> Section:
    """Sparse probes, dense probes and code lengths of every configuration, beside CE_rec and R²."""
    title = "Legibility: probes for classes of tokens"
    if not set(LEGIBILITY_COLUMNS) <= set(study.means) or study.means[list(LEGIBILITY_COLUMNS)].isna().all(axis=None):
        asked = "a text whose tokens have classes (see below)"
        return Section(title, needs="--set legibility=on" if study.legibility.empty else asked)
    part, lines = limited(study)
    rows = [
        identity(row) | {"CE_rec": number(row["ce_rec"]), "R²": number(row["r2"])} | cells_of(row) for row in each(part)
    ]
    return Section(title, rows, [f"{MEANING} Means over seeds.", *lines])


def cells_of(row: pd.Series) -> dict[str, str]:
    """LEGIBILITY_COLUMNS of one row as a table prints them; “–” where there is no number."""
    return {
        HEADS[name]: number(row[column], 3) if np.isfinite(row[column]) else "–"
        for name, column in zip(LEGIBILITY, LEGIBILITY_COLUMNS, strict=True)
    }


def labels(study: Study) -> Section:
    """What each class gives, on the average over all SAEs, and on how many tokens and documents."""
    title = "Legibility by class"
    if study.legibility.empty:
        return Section(title, needs="--set legibility=on")
    return Section(title, rows_of(study.legibility), ["Means over all SAEs of this report."])


def rows_of(table: pd.DataFrame) -> list[dict[str, str]]:
    """One row per class of the cells' tables (LEGIBILITY, tokens, training_documents, test_documents, reason)."""
    rows = []
    for label, part in table.groupby("label", sort=False):
        reasons = sorted({str(r) for r in part["reason"] if r})
        measured = part[part["reason"] == ""]
        means = {HEADS[name]: number(float(measured[name].mean())) if len(measured) else "–" for name in LEGIBILITY}
        rows.append(
            {"class": str(label)}
            | means
            | {"tokens": _range(measured["tokens"]), "documents": _documents(measured)}
            | {"not measured": f"{len(part) - len(measured)} of {len(part)}: {'; '.join(reasons)}" if reasons else ""}
        )
    return rows


def by_cell(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells' tables in one, with their `cell_key`."""
    frames = [table.assign(cell_key=key) for key, table in tables.items()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _range(values: pd.Series) -> str:
    if values.empty:
        return "–"
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _documents(part: pd.DataFrame) -> str:
    if part.empty:
        return "–"
    return f"{_range(part['training_documents'])} + {_range(part['test_documents'])}"
