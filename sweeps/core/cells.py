"""The words of every sweep: frozen cells, rows, packs of cells that share work, estimates, published cells."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    import pandas as pd


class UserError(ValueError):
    """Bad input: one line that states the value, the rule and the remedy. Never retried."""


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no blanks, tuples as lists, no NaN.

    Raises ValueError for a float that JSON cannot spell.
    """
    return _CANONICAL.encode(value)


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@functools.cache
def _reader(kind: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """(names of a kind of cell's fields, what reads their values): a plan reads a hundred thousand cells."""
    names = tuple(f.name for f in dataclasses.fields(kind))
    if len(names) > 1:
        return names, operator.attrgetter(*names)
    return names, lambda cell: tuple(getattr(cell, name) for name in names)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a grid. Subclasses add identity fields and set SWEEP and VERSION.

    Every field, defaults included, enters the key, so editing a default makes a new cell and can never
    hand an old result to a new question.
    """

    SWEEP: ClassVar[str] = ""
    VERSION: ClassVar[str] = ""

    def identity(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        names, values = _reader(type(self))  # type: ignore[arg-type]
        return dict(zip(names, values(self), strict=True))

    @functools.cached_property
    def key(self) -> str:
        """Short name of the cell: 16 hex digits of the digest of (sweep, version, fields)."""
        return digest({"sweep": self.SWEEP, "version": self.VERSION, "fields": self.identity()})[:16]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.identity().items())


def varying(cells: Sequence[Cell]) -> tuple[list[str], str]:
    """(names of the fields that differ among the cells, the others as text)."""
    identities = [cell.identity() for cell in cells]
    names = dict.fromkeys(name for identity in identities for name in identity)
    differ = [name for name in names if len({str(i.get(name)) for i in identities}) > 1]
    return differ, " ".join(f"{name}={value}" for name, value in identities[0].items() if name not in differ)


def described(cell: Cell, names: Iterable[str]) -> str:
    """The cell's fields among `names`: `k=8 seed=0`."""
    wanted = set(names)
    return " ".join(f"{name}={value}" for name, value in cell.identity().items() if name in wanted)


CellT = TypeVar("CellT", bound=Cell)
_OfPack = TypeVar("_OfPack", bound=Cell, covariant=True)


@dataclass(frozen=True)
class Row:
    """One measured number of the tidy long table; parameters are columns, never parts of the name."""

    metric: str
    value: float
    unit: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pack(Generic[_OfPack]):
    """Cells that run together as one Tune trial, with the share of the machine that the trial holds.

    workers: processes of Ray Train that do the pack's work and hold that share together, evenly; the trial itself
    then holds nothing. 0: the trial does the work.
    """

    name: str
    cells: tuple[_OfPack, ...]
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    workers: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What finishing some cells takes; the numbers behind `--plan`. Times are for the whole list.

    `bytes` is the traffic to and from memory that the arithmetic cannot hide, 0 where the sweep does not know it.
    `shared` names work that several cells share and that is done once, a line each, where it is no LM pass.
    """

    lm_passes: int = 0
    shared: tuple[str, ...] = ()
    tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    memory_bytes: int = 0
    seconds: float = math.nan
    basis: str = ""


@dataclass(frozen=True)
class PublishedCell:
    """A finished cell as the ledger holds it: its identity, its rows and where its files are."""

    key: str
    identity: Mapping[str, Any]
    rows: pd.DataFrame
    files: tuple[str, ...]
    uri: str
    meta: Mapping[str, Any]

    def numbers(self) -> dict[str, float]:
        """{metric: value} of the rows without parameters: what was measured of the cell as a whole."""
        whole = self.rows[self._parameters().isna().all(axis=1)]
        return dict(zip(whole["metric"], whole["value"], strict=True))

    def table(self, *parameters: str) -> pd.DataFrame:
        """The rows that have these parameters and no others: a row per combination of their values, as its index, and
        a column per metric. Empty where there are none."""
        present = self._parameters().notna()
        named = present.columns.isin(parameters)
        own = present.loc[:, named].all(axis=1) & ~present.loc[:, ~named].any(axis=1)
        rows = self.rows[own & (named.sum() == len(parameters))]
        if rows.empty:
            return rows.iloc[:, :0]
        return rows.pivot(index=list(parameters), columns="metric", values="value")

    def _parameters(self) -> pd.DataFrame:
        return self.rows.drop(columns=["metric", "value", "unit"], errors="ignore")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name most like `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
