"""What a sweep is: frozen cells, packs of cells that share work, tidy rows, and the protocol they serve.

Only identity lives in a cell (what is computed). Where and how it runs (paths, devices, addresses) is
`_where.RunSettings` and never enters a key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import pandas as pd

    from sweeps._context import PackContext
    from sweeps._where import Machine, RunSettings


class UserError(ValueError):
    """Bad input: one line that states the value, the rule and the remedy. Never retried."""


_DIGITS = 18  # of a whole number: what fits 64 bits, where arrays and tables keep it
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
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


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
        return {name: getattr(self, name) for name in _field_names(type(self))}  # type: ignore[arg-type]

    @functools.cached_property
    def key(self) -> str:
        """Short name of the cell: 16 hex digits of the digest of (sweep, version, fields)."""
        return digest({"sweep": self.SWEEP, "version": self.VERSION, "fields": self.identity()})[:16]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.identity().items())


@dataclass(frozen=True)
class Row:
    """One measured number of the tidy long table; parameters are columns, never parts of the name."""

    metric: str
    value: float
    unit: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Cells that run together as one Tune trial, with the share of the machine that the trial holds.

    workers: processes of Ray Train that do the pack's work and hold that share together, evenly; the trial itself
    then holds nothing. 0: the trial does the work.
    """

    name: str
    cells: tuple[Cell, ...]
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


class Sweep(Protocol):
    """What `_launch.main` needs of a sweep. `report` touches neither Ray nor a checkpoint.

    Seven more are used where a sweep has them: `headline`, the name of the number that `progress(best=…)` carries,
    `named`, the fields of a cell that name its run in MLflow (without them it is called by its key),
    `tracked`, the parameters of rows that MLflow gets as `metric/value` (rows with others are in the ledger alone),
    `threads(planned, preset, machine, run)`, the CPU threads of a pack, as they follow from all planned cells (never
    from those that are missing, or an interrupted run would go on with another number and other last bits),
    `remarks(preset, run)`, lines on the files that the settings name, for the banner,
    `preflight(cells, preset, run)`, which raises UserError before Ray starts when data or weights are out of reach or
    do not fit, and returns lines on what else it found (or None), and
    `pin(cells, run)`, which returns the settings with the commits of what is read from the Hugging Face hub.
    """

    name: str
    version: str
    question: str
    default_preset: str
    presets: Mapping[str, Any]

    def plan(self, preset: Any) -> Sequence[Cell]:
        """All cells of a preset (a frozen dataclass value); raises UserError for a preset that makes no sense."""
        ...

    def pack(self, cells: Sequence[Cell], preset: Any, machine: Machine, run: RunSettings) -> list[Pack]:
        """Group cells that share work within the memory and devices of the machine.

        Cells that need the results of others may be left out, never all of them: packing is asked for again with
        what is left once the returned packs have ended.
        """
        ...

    def run(self, pack: Pack, preset: Any, context: PackContext) -> None:
        """Compute every cell of the pack and publish each as soon as it is finished."""
        ...

    def fingerprint(self, cell: Cell, preset: Any, run: RunSettings) -> str:
        """Digest of all that decides the cell's numbers, the content of its data and weights included."""
        ...

    def estimate(self, cells: Sequence[Cell], preset: Any, machine: Machine, run: RunSettings) -> Estimate:
        """Work left in `cells`."""
        ...

    def report(self, cells: Sequence[PublishedCell], preset_name: str, preset: Any, out: Path) -> list[str]:
        """Write the report into the folder `out`; return lines to print (headline numbers, caveats)."""
        ...

    def banner(self, preset_name: str, preset: Any) -> list[str]:
        """What this run stands on, in plain words: real or stand-in models, data and weights."""
        ...


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name most like `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def apply_settings(values: Sequence[str], *targets: Any) -> list[Any]:
    """Apply `field=value` texts to the first of the frozen dataclass values that has the field.

    The text is parsed by the field's annotation: int, float, bool, str, tuple[X, ...] (comma-separated), X | None.
    Returns the replaced values in order. Raises UserError for an unknown field or an unreadable value.
    """
    out = list(targets)
    hints = [typing.get_type_hints(type(t)) for t in targets]
    names = {f.name for t in targets for f in dataclasses.fields(t)}
    for text in values:
        name, sep, raw = text.partition("=")
        if not sep:
            raise UserError(f"--set {text!r} has no '='; write --set field=value")
        for i, target in enumerate(targets):
            if name in {f.name for f in dataclasses.fields(target)}:
                try:
                    out[i] = dataclasses.replace(out[i], **{name: _parse(raw, hints[i][name])})
                except UserError:
                    raise
                except ValueError as error:
                    raise UserError(f"--set {name}={raw!r} is not a {hints[i][name]}: {error}") from error
                break
        else:
            raise UserError(
                f"--set {name!r} is not a field of this sweep{nearest(name, names)}; fields: {', '.join(sorted(names))}"
            )
    return out


def _parse(raw: str, kind: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if raw.lower() in ("none", ""):
            return None
        return _parse(raw, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        return tuple(_parse(part.strip(), arguments[0]) for part in raw.split(",") if part.strip())
    if kind is bool:
        if raw.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("write true or false")
        return raw.lower() in ("true", "1", "yes")
    if kind is int:
        try:
            return int(raw)
        except ValueError:
            try:
                number = Decimal(raw.replace("_", ""))  # 2e6 and 4.0 are whole numbers, exactly, however large
            except ArithmeticError:
                raise ValueError("write a whole number") from None
        if not number.is_finite() or number != number.to_integral_value() or number.adjusted() > _DIGITS:
            raise ValueError(f"write a whole number of at most {_DIGITS} digits")
        return int(number)
    if kind is float:
        value = float(raw)
        if math.isinf(value) and "inf" not in raw.lower():
            raise ValueError("write a number that a float64 holds")
        return value
    if kind is str:
        return raw
    raise ValueError(f"fields of type {kind} cannot be set from the command line")
