"""What a search optimises, and the conditions that its settings must meet, measured in published cells.

A column is the name of a number, `ce_rec`, or of one with a parameter's value, `final_val_nll/raw`, as MLflow spells
it. The name alone of a number that exists with parameters only is its first row with tracked parameters: the one that
MLflow's pages open on.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sweeps.core.cells import PublishedCell, UserError, nearest

_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_WHERE = re.compile(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Objective:
    """A column to make small or large."""

    column: str
    direction: str  # "min" or "max"

    def __str__(self) -> str:
        return f"{self.column}:{self.direction}"

    def loss(self, value: float) -> float:
        """The value, or its negative: smaller is better."""
        return -value if self.direction == "max" else value


@dataclass(frozen=True)
class Condition:
    """`alive>=0.5`: what a setting must meet, its column's mean over the trial's cells."""

    column: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.column}{self.sign}{self.bound:g}"

    def excess(self, value: float) -> float:
        """How far a value is beyond the bound; above 0 where it breaks the condition."""
        if _SIGNS[self.sign](value, self.bound):
            return min(0.0, -abs(value - self.bound))
        return max(abs(value - self.bound), 1e-12)


def read_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives of `ce_rec:max,rate_bits:min`; raises UserError."""
    out = []
    for part in text.split(","):
        column, _, direction = part.strip().rpartition(":")
        if not column or direction not in ("min", "max"):
            raise UserError(
                f"--objective {part.strip()!r} does not say which way; write COLUMN:min or COLUMN:max, several with "
                "commas"
            )
        out.append(Objective(column, direction))
    if len({o.column for o in out}) < len(out):
        raise UserError(f"--objective {text} names a column twice; name each once")
    return tuple(out)


def read_conditions(texts: Sequence[str]) -> tuple[Condition, ...]:
    """Conditions of `--where` texts; raises UserError."""
    out = []
    for text in texts:
        match = _WHERE.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            out.append(Condition(match[1], match[2], float(match[3])))
        except ValueError:
            raise UserError(f"--where {text!r} is no condition; write COLUMN>=NUMBER, with >=, <=, > or <") from None
    return tuple(out)


def number(rows: pa.RecordBatch, column: str, tracked: Sequence[str]) -> float | None:
    """The column of a cell by its rows; None where the cell has no such row. `tracked`: see `Sweep`."""
    metric, _, wanted = column.partition("/")
    found: dict[str, float] = {}
    for record in rows.filter(pc.equal(rows["metric"], metric)).to_pylist():
        row = {n: v for n, v in record.items() if n not in ("metric", "value", "unit") and not _missing(v)}
        if row.keys() <= set(tracked):
            value = math.nan if record["value"] is None else float(record["value"])
            found.setdefault("/".join(_plain(row[name]) for name in tracked if name in row), value)
    if not wanted and "" not in found and found:
        wanted = next(iter(found))
    return found.get(wanted)


def columns(cells: Iterable[PublishedCell], tracked: Sequence[str]) -> list[str]:
    """All columns that some cell has, sorted."""
    out = set()
    for cell in cells:
        used = [name for name in tracked if name in cell.rows]
        others = [n for n in cell.rows.columns if n not in ("metric", "value", "unit", *used)]
        rows = cell.rows[cell.rows[others].isna().all(axis=1)] if others else cell.rows
        for row in rows[["metric", *used]].itertuples(index=False):
            out.add("/".join([row[0], *(_plain(value) for value in row[1:] if not _missing(value))]))
    return sorted(out)


def unknown(option: str, column: str, cells: Sequence[PublishedCell], tracked: Sequence[str]) -> UserError:
    """The error for a column that none of these cells has."""
    known = columns(cells, tracked)
    listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return UserError(f"{option} {column!r} is measured by no cell{nearest(column, known)}; columns: {listed}")


def mean_of(values: Mapping[str, float | None], column: str) -> tuple[float, str]:
    """(mean over the trial's cells that have the column, why there is none); values: {cell key: number}."""
    known = {key: value for key, value in values.items() if value is not None}
    if not known:
        return math.nan, f"no cell measures {column}"
    for key, value in known.items():
        if not math.isfinite(value):
            return math.nan, f"{column} is {value} in cell {key}"
    return math.fsum(known.values()) / len(known), ""


def _missing(value: object) -> bool:
    return value is None or value != value


def _plain(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
