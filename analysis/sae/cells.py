"""The cells table of the proxy gap: its columns, one row per cell, and the order in which reports list them.

The unit of every interval is the document where the cells' tables tell the document of each sequence: its sequences
are alike, and count as one. Where they do not (ready-made tokens, older ledgers), it is the sequence.

Shape suffixes: C cells, S sequences, U units (documents or sequences), R resamples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.bootstrap import Floats, count_blocks
from analysis.crossed import Component, Effect, effects, ratio_influence, skew_factor, units_component
from analysis.sae.budget import FeatureCounts, rate_bits
from analysis.sae.columns import (
    CELL_COLUMNS,
    CONFIGURATION,
    IDENTITY,
    LATER_COLUMNS,
    LOSSES,
    NUMBERS,
    RUNG_SUMS,
    SEQUENCE_COLUMNS,
    SEQUENCE_SUMS,
)

if TYPE_CHECKING:
    from analysis.sae.fidelity import SequenceSums

# Fewer units leave 95% intervals below .93 (simulated).
MIN_UNITS = 10
_DEPTHS = {"early": 0, "mid": 1, "late": 2}


def cell_numbers(
    k: int,
    sums: SequenceSums,
    features: FeatureCounts,
    geometry: Mapping[str, float],
    documents_S: npt.NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """What the cells table holds of one cell besides its identity, keys NUMBERS in their order.

    Args:
        k: active features per token.
        sums: the evaluated sequences, with their losses.
        features: what fired on the same tokens.
        geometry: `pr` and `pr_deflated` of the hooked layer (`CovarianceSums.summary`), and AUDIT_COLUMNS
            (`VarianceSums.summary`, `ControlledErrors.metrics`), RUNG_COLUMNS (`rungs.rung_numbers`) and FIRING_COLUMNS
            (`FeatureCounts.density`); those that are not given are NaN.
        documents_S: the document that each sequence is of, where that is known.

    Raises:
        ValueError: sequences without losses.
    """
    table = sums.table()
    absent = int(table[list(LOSSES)].isna().any(axis=1).sum())
    if absent:
        raise ValueError(f"{absent} of {len(table)} sequences have no losses; call add_losses for every sequence")
    interval = ce_rec_interval(table if documents_S is None else table.assign(document=documents_S))
    values: dict[str, float] = {
        **sums.metrics(),
        "ce_rec_lo": interval.lo,
        "ce_rec_hi": interval.hi,
        "alive": features.alive(),
        "rate_bits": rate_bits(features.d_sae, k),
        "rate_bits_entropy": features.rate_bits_entropy(k),
        "pr": geometry["pr"],
        "pr_deflated": geometry["pr_deflated"],
        "d_model": sums.mean_D.numel(),
        "d_sae": features.d_sae,
        **{name: geometry.get(name, float("nan")) for name in LATER_COLUMNS},
    }
    return {name: float(values[name]) for name in NUMBERS}


def ce_rec_interval(table: pd.DataFrame) -> Effect:
    """CE_rec of one trained SAE for other sequences; NaN limits where `needs` says what they would need.

    Args:
        table: one row per evaluated sequence, columns `columns.SEQUENCE_COLUMNS` and, where known, `document`.
    """
    columns, documents_U = _of_units(_summands(table), _documents(table))
    return _trained(_METRICS["ce_rec"].influence(columns), "sequences" if documents_U is None else "documents")[0]


def _trained(influence_CU: Floats, unit: str) -> list[Effect]:
    """CE_rec of trained SAEs that share their sequences, for other sequences."""
    values, needs = influence_CU.mean(axis=1).tolist(), needs_units(influence_CU.shape[1], unit)
    if needs:
        return [Effect(value, math.nan, math.nan, math.nan, needs) for value in values]
    return effects(values, [[sequence_component(row)] for row in influence_CU])


def needs_units(units: int, unit: str) -> str:
    """What an interval over sequences would need, empty where there are enough units. `unit`: their name."""
    return "" if units >= MIN_UNITS else f"needs ≥ {MIN_UNITS} evaluated {unit}"


def sequence_component(mean_U: Floats, twice: float = 0.0) -> Component:
    """Variance of a mean over sequences, widened for the units' skewness; `twice` as in `crossed.units_component`."""
    plain = units_component(mean_U, twice)
    return Component(plain.variance * skew_factor(mean_U) ** 2, plain.df)


def prepare_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells in report order (model by width, layer, k, tokens, seed), contract columns first.

    LATER_COLUMNS that an older ledger lacks are NaN. Raises ValueError on other missing columns and on two rows of the
    same cell.
    """
    later = [c for c in LATER_COLUMNS if c not in cells.columns]
    cells = cells.assign(**dict.fromkeys(later, float("nan")))
    missing = [c for c in CELL_COLUMNS if c not in cells.columns]
    if missing:
        raise ValueError(f"the cells table lacks columns {missing}; build its rows with cells.cell_numbers")
    if cells.empty:
        raise ValueError("the cells table is empty; finish at least one cell before reporting")
    twice = cells.duplicated(list(IDENTITY)) | cells.duplicated("cell_key")
    if twice.any():
        raise ValueError(f"cells {cells.loc[twice, 'cell_key'].tolist()[:5]} occur twice; keep one row a cell")
    extra = [c for c in cells.columns if c not in CELL_COLUMNS]
    ordered = cells[[*CELL_COLUMNS, *extra]].sort_values(["d_model", "model", "layer", "k", "tokens", "seed"])
    return ordered.reset_index(drop=True)


def models_of(cells: pd.DataFrame) -> list[str]:
    """Models from narrow to wide."""
    return cells.sort_values(["d_model", "model"])["model"].drop_duplicates().tolist()


def family_of(model: str) -> str:
    """A model's name without its size and what follows: "qwen2.5-coder-0.5b" and "-1.5b" are one family."""
    name = model.rsplit("/", 1)[-1].lower()
    match = re.search(r"[-_](\d+(\.\d+)?[mb]|small|medium|large|xl)(?![a-z0-9])", name)
    return name[: match.start()] if match else name


def compared_models(table: pd.DataFrame) -> list[str]:
    """Narrowest and widest model of the family with most configurations (rows), of all models where no family has two.

    One model where there is no other.
    """
    families = table["model"].map(family_of)
    several = [f for f in families.unique() if table.loc[families == f, "model"].nunique() > 1]
    chosen = max(several, key=lambda f: int((families == f).sum()), default=None)
    order = models_of(table if chosen is None else table[families == chosen])
    return order if len(order) < 2 else [order[0], order[-1]]


def depths_of(cells: pd.DataFrame) -> list[str]:
    """Depth names: early, mid, late, then any others by name."""
    return sorted(cells["depth"].unique(), key=lambda depth: (_DEPTHS.get(depth, len(_DEPTHS)), depth))


def tokens_label(tokens: float) -> str:
    """10000000 → "10M", 1048576 → "1.049M", 250000 → "250k", 512 → "512"."""
    for unit, suffix in ((1_000_000, "M"), (1_000, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{suffix}"
    return f"{tokens:.0f}"


@dataclass(frozen=True)
class _Ratio:
    """A metric as base + sign · Σ top / Σ bottom over the evaluated sequences."""

    base: float
    sign: float
    top: str
    bottom: str

    def value(self, sums: Mapping[str, Floats]) -> Floats:
        return self.base + self.sign * (sums[self.top] / sums[self.bottom])

    def influence(self, columns: Mapping[str, Floats]) -> Floats:
        """Arrays (rows, U) whose row means are the metric: each unit's influence on it."""
        return self.base + self.sign * ratio_influence(columns[self.top], columns[self.bottom])


# Later metrics join here.
_METRICS = {
    "r2": _Ratio(1.0, -1.0, "sse", "sst"),
    "cosine": _Ratio(0.0, 1.0, "cos_sum", "n_tokens"),
    "nmse": _Ratio(0.0, 1.0, "sse", "sum_sq"),
    "swd": _Ratio(0.0, 1.0, "swd_sum", "n_tokens"),
    "abs_gdelta": _Ratio(0.0, 1.0, "abs_sum", "n_tokens"),
    "ce_rec": _Ratio(2.0, -1.0, "loss_recon", "loss_orig"),
    "r2_legacy": _Ratio(0.0, 1.0, "legacy_sum", "n_tokens"),
    "r2_no_sinks": _Ratio(1.0, -1.0, *SEQUENCE_SUMS),
    **{name: _Ratio(0.0, 1.0, name, "n_tokens") for name in RUNG_SUMS},
}
RESAMPLED = tuple(_METRICS)
"""Metrics whose sums are known by sequence."""


class SequenceTables:
    """The evaluated sequences of many cells, by unit, ready for paired resampling.

    Cells evaluated on the same sequences (all cells of a model; all models that share a tokenizer) share
    every resample. R² keeps each sequence's Σ‖a − ā‖² around the mean of the whole evaluation set: the
    mean is not drawn again.

    Models of other tokenizers have other sequences under the same numbers. Where every table says which `document` a
    sequence is of, sequences are the same when number and document are; otherwise when the number is.
    """

    def __init__(self, cells: pd.DataFrame, sequences: Mapping[str, pd.DataFrame] | pd.DataFrame | None) -> None:
        self._cells = cells
        self._groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
        tables = _by_key(sequences)
        absent = [key for key in cells["cell_key"] if key not in tables]
        if tables and absent:
            raise ValueError(
                f"cells {absent[:5]} (of {len(absent)}) have no sequence table; give one for all or for none"
            )
        self._columns: list[dict[str, Floats]] = []
        documents = {key: _documents(table) for key, table in tables.items()}
        known = all(document_S is not None for document_S in documents.values())
        self._documents: dict[int, npt.NDArray[np.int64]] = {}
        for row, key in enumerate(cells["cell_key"]):
            if not tables:
                break
            columns = _summands(_checked(key, tables[key]))
            numbers_S = columns["sequence"].astype(np.int64)
            document_S = documents[key] if known else None
            shown_S = np.zeros_like(numbers_S) if document_S is None else document_S
            self._groups.setdefault(tuple(zip(numbers_S.tolist(), shown_S.tolist(), strict=True)), []).append(row)
            columns, document_U = _of_units(columns, document_S)
            if document_U is not None:
                self._documents[row] = document_U
            self._columns.append(columns)

    @property
    def given(self) -> bool:
        """Whether there are sequence tables."""
        return bool(self._columns)

    @property
    def unit(self) -> str:
        """What the units are: "documents" or "sequences"."""
        return "documents" if self._documents else "sequences"

    def influence(self, metric: str) -> list[Floats]:
        """Each cell's row of the units' influence on a metric (its mean is the metric).

        Without sequence tables a row holds the cell's own value alone.
        """
        if not self._columns:
            return [np.array([value]) for value in self._cells[metric].to_numpy(float)]
        ratio, result = _METRICS[metric], [np.empty(0)] * len(self._cells)
        for rows in self._groups.values():
            stacked = {c: np.stack([self._columns[r][c] for r in rows]) for c in (ratio.top, ratio.bottom)}
            for row, influence_U in zip(rows, ratio.influence(stacked), strict=True):
                result[row] = influence_U
        return result

    def ce_rec_intervals(self) -> list[Effect] | None:
        """`ce_rec_interval` of every cell; None without sequence tables."""
        if not self._columns:
            return None
        influence = self.influence("ce_rec")
        result: dict[int, Effect] = {}
        for rows in self._groups.values():
            found = _trained(np.stack([influence[r] for r in rows]), self.unit)
            result |= dict(zip(rows, found, strict=True))
        return [result[row] for row in range(len(self._cells))]

    def documents(self, row: int) -> npt.NDArray[np.int64] | None:
        """The document that each unit of a cell is; None where not every table tells."""
        return self._documents.get(row)

    @property
    def sequence_set(self) -> npt.NDArray[np.int64]:
        """A number per cell; equal for cells that were evaluated on the same sequences."""
        result = np.zeros(len(self._cells), dtype=np.int64)
        for number, rows in enumerate(self._groups.values()):
            result[rows] = number
        return result

    @property
    def unit_counts(self) -> npt.NDArray[np.int64]:
        """How many units each cell was evaluated on; 0 without sequence tables."""
        if not self._columns:
            return np.zeros(len(self._cells), dtype=np.int64)
        return np.array([len(columns["n_tokens"]) for columns in self._columns], dtype=np.int64)

    def blocks(
        self, metrics: Sequence[str], *, n_resamples: int, seed: int, block: int = 250
    ) -> Iterator[dict[str, Floats]]:
        """Each metric of every cell in every resample of the units, (R, C) arrays a block of R at a time.

        Without sequence tables every resample repeats the cell's own value.
        """
        size = len(self._cells)
        if not self._columns:
            for start in range(0, n_resamples, block):
                shape = (min(block, n_resamples - start), size)
                yield {name: np.broadcast_to(self._cells[name].to_numpy(float), shape) for name in metrics}
            return
        needed = sorted({column for name in metrics for column in (_METRICS[name].top, _METRICS[name].bottom)})
        stacked = [
            (rows, np.stack([np.stack([self._columns[r][c] for r in rows], axis=1) for c in needed], axis=1))
            for rows in self._groups.values()
        ]
        counts_C = self.unit_counts
        draws = [
            count_blocks(int(counts_C[rows[0]]), n_resamples, [seed, position], block)
            for position, rows in enumerate(self._groups.values())
        ]
        for counts in zip(*draws, strict=True):
            result = {name: np.empty((len(counts[0]), size)) for name in metrics}
            for (rows, columns_UMC), counts_RU in zip(stacked, counts, strict=True):
                flat = counts_RU @ columns_UMC.reshape(len(columns_UMC), -1)
                sums = dict(zip(needed, np.moveaxis(flat.reshape(len(counts_RU), len(needed), -1), 1, 0), strict=True))
                for name in metrics:
                    result[name][:, rows] = _METRICS[name].value(sums)
            yield result


def _summands(table: pd.DataFrame) -> dict[str, Floats]:
    """What the metrics' sums run over, by sequence: token sums as they are, means times the sequence's tokens.

    Columns that an older ledger lacks are NaN.
    """
    names = (*SEQUENCE_COLUMNS, *SEQUENCE_SUMS, *RUNG_SUMS)
    columns_CS = table.reindex(columns=names).to_numpy(float).T
    columns_CS = np.ascontiguousarray(columns_CS[:, np.argsort(columns_CS[0], kind="stable")])
    columns = dict(zip(names, columns_CS, strict=True))
    return columns | {name: columns["n_tokens"] * columns[name] for name in (*LOSSES, *RUNG_SUMS)}


def _documents(table: pd.DataFrame) -> npt.NDArray[np.int64] | None:
    """The document of each sequence, sequences in order; None where the table does not tell."""
    if "document" not in table or table["document"].isna().any():
        return None
    return table["document"].to_numpy(np.int64)[np.argsort(table["sequence"].to_numpy(), kind="stable")]


def _of_units(
    columns: dict[str, Floats], document_S: npt.NDArray[np.int64] | None
) -> tuple[dict[str, Floats], npt.NDArray[np.int64] | None]:
    """(summands by unit, the document that each unit is): summed over a document's sequences where they are known."""
    if document_S is None:
        return columns, None
    document_U, place_S = np.unique(document_S, return_inverse=True)
    summed = {name: np.asarray(np.bincount(place_S, values), np.float64) for name, values in columns.items()}
    return summed, document_U


def _checked(key: str, table: pd.DataFrame) -> pd.DataFrame:
    missing = [c for c in SEQUENCE_COLUMNS if c not in table.columns]
    if missing:
        raise ValueError(f"the sequence table of cell {key} lacks columns {missing}; save SequenceSums.table() whole")
    if table["sequence"].duplicated().any() or table.empty:
        raise ValueError(f"cell {key} has {len(table)} rows for {table['sequence'].nunique()} sequences; one row each")
    return table


def _by_key(sequences: Mapping[str, pd.DataFrame] | pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    if sequences is None:
        return {}
    if isinstance(sequences, pd.DataFrame):
        return {str(key): table for key, table in sequences.groupby("cell_key", sort=False)}
    return dict(sequences)


def configurations(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[npt.NDArray[np.int64]]]:
    """The distinct (model, depth, layer, k, tokens) in report order and the rows (seeds) of each."""
    codes = cells.groupby(list(CONFIGURATION), sort=False).ngroup().to_numpy()
    rows = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    table = cells.loc[[r[0] for r in rows], [*CONFIGURATION, "d_model"]].reset_index(drop=True)
    table["n_seeds"] = [len(r) for r in rows]
    return table, rows
