"""Probes on the held-out tokens of a pack: drawn once per layer, answered by every SAE (`--set legibility=on`).

Shape suffixes: S sequences, B sequences of a chunk, T context, D = d_model, k active features, A tokens drawn for any
label, n of them in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_array

from analysis.sae.columns import LEGIBILITY
from analysis.sae.legibility import Task, dense_probes, drawn_tokens, sparse_probes, tasks
from data.token_labels import DOCUMENTATION, NONE, PYTHON, TokenLabels
from sweeps.core.cells import Row
from sweeps.ledger.published import parquet_bytes
from sweeps.sae.report import LEGIBILITY_TABLE

_KINDS = {"python": PYTHON, "documentation": DOCUMENTATION}
_BITS = ("mdl", "mdl_dense")


@dataclass(frozen=True)
class LayerProbes:
    """What all SAEs of a layer are asked, and the dense probes' answer."""

    tasks: list[Task]
    drawn_A: np.ndarray
    dense: pd.DataFrame

    @classmethod
    def of(cls, labels: TokenLabels, a_STD: torch.Tensor, usable_ST: torch.Tensor) -> LayerProbes:
        """From the activations of a layer and which tokens are looked at (no sinks, none that is left out)."""
        class_T = np.where(usable_ST.cpu().numpy(), labels.class_ST, NONE).ravel()
        asked = tasks(class_T, labels.document_ST.ravel(), _KINDS)
        drawn_A = drawn_tokens(asked)
        a_AD = a_STD.flatten(0, 1)[torch.from_numpy(drawn_A).to(a_STD.device)]
        return cls(asked, drawn_A, dense_probes(asked, drawn_A, a_AD.float().cpu().numpy()))


class CellLegibility:
    """One SAE's answers; call `update` for each chunk, in order."""

    def __init__(self, layer: LayerProbes, d_sae: int) -> None:
        self.layer, self.d_sae = layer, d_sae
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # row in A, feature, activation

    def update(self, rows: slice, index_BTk: torch.Tensor, value_BTk: torch.Tensor) -> None:
        """Add the features that fire in the sequences `rows`."""
        context = index_BTk.shape[1]
        first, last = np.searchsorted(self.layer.drawn_A, [rows.start * context, rows.stop * context])
        places = torch.from_numpy(self.layer.drawn_A[first:last] - rows.start * context).to(index_BTk.device)
        index_nk, value_nk = (x.flatten(0, 1)[places].cpu().numpy() for x in (index_BTk, value_BTk))
        self._parts.append((np.repeat(np.arange(first, last), index_nk.shape[1]), index_nk.ravel(), value_nk.ravel()))

    def table(self) -> pd.DataFrame:
        """One row per label: LEGIBILITY, how many tokens and documents answer for it, and why it is not measured."""
        row_n, index_n, value_n = (np.concatenate(x) for x in zip(*self._parts, strict=True))
        shape = (len(self.layer.drawn_A), self.d_sae)
        features_AD = csr_array((value_n.astype(np.float64), (row_n, index_n)), shape=shape)
        asked = self.layer.tasks
        probed = sparse_probes(asked, self.layer.drawn_A, features_AD).join(self.layer.dense)[list(LEGIBILITY)]
        probed = probed.assign(
            tokens=[len(task.token_N) for task in asked],
            training_documents=[task.documents(train=True) for task in asked],
            test_documents=[task.documents(train=False) for task in asked],
            reason=[task.reason for task in asked],
        )
        return probed.reset_index()

    def published(self) -> tuple[list[Row], dict[str, bytes]]:
        """LEGIBILITY_COLUMNS, means over the labels that are measured (NaN where none is), and the table as a file."""
        table = self.table()
        rows = [
            Row(f"legibility_{name}", float(table[name].mean()), "bits/label" if name in _BITS else "")
            for name in LEGIBILITY
        ]
        return rows, {LEGIBILITY_TABLE: parquet_bytes(table)}
