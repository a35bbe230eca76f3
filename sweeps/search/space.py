"""What a search varies: ranges of preset fields, written as `--set field=RANGE`.

log:LO:HI and lin:LO:HI hold real or whole numbers, int:LO:HI whole ones, choice:A,B,... any values of the field. A
third number, log:LO:HI:9, is how many values `--search grid` takes of the range.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sweeps.core.cells import UserError, nearest
from sweeps.core.settings import RunSettings, parse_text

KINDS = ("log", "lin", "int", "choice")
_DIGITS = 4  # significant ones of a real value, so that a grid can name the same point
Value = int | float | str | bool | None
Point = dict[str, Value]


@dataclass(frozen=True)
class Dimension:
    """A searched field. lo, hi: ends of a range, both included; choices: of a `choice`, otherwise empty.

    whole: the values are whole numbers. levels: values that a grid takes of the range; 0 where none were named.
    """

    field: str
    kind: Literal["log", "lin", "int", "choice"]
    lo: float = 0.0
    hi: float = 0.0
    levels: int = 0
    choices: tuple[Value, ...] = ()
    whole: bool = False

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.field}=choice:{','.join(map(str, self.choices))}"
        levels = f":{self.levels}" if self.levels else ""
        return f"{self.field}={self.kind}:{self.lo:.12g}:{self.hi:.12g}{levels}"

    def at(self, u: float) -> Value:
        """The value at place u of [0, 1): equal shares of the (logarithmic) range to equal lengths of u.

        Real values are rounded: to four significant digits on a log range, to 1/1000 of the range's power of ten else.
        """
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.whole:
            lo, hi = self._whole_ends()
            place = math.floor(math.exp(lo + u * (hi - lo)) + 0.5) if self.kind == "log" else math.floor(lo + u * hi)
            return int(min(max(place, self.lo), self.hi))
        if self.kind == "log":
            return self.rounded(math.exp(math.log(self.lo) + u * math.log(self.hi / self.lo)))
        return self.rounded(self.lo + u * (self.hi - self.lo))

    def _whole_ends(self) -> tuple[float, float]:
        """Log range: logarithms of the ends, half a number further out. Else: lowest number, and how many there are."""
        if self.kind == "log":
            return math.log(self.lo - 0.5), math.log(self.hi + 0.5)
        return self.lo, self.hi - self.lo + 1

    def rounded(self, value: float) -> float:
        """A real value of the range as a search spells it."""
        size = abs(value) if self.kind == "log" else self.hi - self.lo
        digits = _DIGITS - 1 - math.floor(math.log10(size)) if size else 0
        return float(min(max(round(value, digits), self.lo), self.hi))

    def unit(self, value: Value) -> float:
        """Place of a value in [0, 1], the middle of its share where values have one; inverse of `at` up to rounding."""
        if self.kind == "choice":
            return (self.choices.index(value) + 0.5) / len(self.choices)
        x = float(value)  # type: ignore[arg-type]
        if self.whole:
            lo, hi = self._whole_ends()
            return (math.log(x) - lo) / (hi - lo) if self.kind == "log" else (x - lo + 0.5) / hi
        if self.kind == "log":
            return math.log(x / self.lo) / math.log(self.hi / self.lo)
        return (x - self.lo) / (self.hi - self.lo)

    def grid(self) -> list[Value]:
        """The values that a grid takes; raises UserError for a range of real numbers without their count."""
        if self.kind == "choice":
            return list(self.choices)
        count = self.levels
        if self.whole and not count:
            count = int(self.hi - self.lo) + 1
        if not count:
            raise UserError(f"--search grid: {self} does not say how many values; write {self}:9 for nine")
        spaced = np.geomspace if self.kind == "log" else np.linspace
        values = spaced(self.lo, self.hi, count).tolist() if count > 1 else [self.lo]
        return list(dict.fromkeys(round(v) if self.whole else self.rounded(v) for v in values))

    def ends(self) -> tuple[Value, ...]:
        """The lowest and the highest value, or every choice."""
        if self.kind == "choice":
            return self.choices
        return (int(self.lo), int(self.hi)) if self.whole else (self.lo, self.hi)


Space = tuple[Dimension, ...]


def is_range(text: str) -> bool:
    """Whether a `--set` text names a range."""
    _, _, value = text.partition("=")
    return value.partition(":")[0] in KINDS and ":" in value


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`--set` texts of single values and lists, those of ranges); raises UserError for a field with both."""
    plain = [text for text in settings if not is_range(text)]
    ranges = [text for text in settings if is_range(text)]
    swept, seen = {text.partition("=")[0] for text in plain}, set[str]()
    for text in ranges:
        field = text.partition("=")[0]
        if field in swept:
            raise UserError(f"--set {field} is both swept and searched; leave one of its two --set out")
        if field in seen:
            raise UserError(f"--set {field} names two ranges; leave one of them out")
        seen.add(field)
    return plain, ranges


def read_space(ranges: Sequence[str], preset: Any, fixed: Mapping[str, str]) -> Space:
    """The dimensions of `--set field=RANGE` texts for a preset.

    fixed: {field: reason} of fields that no search may vary. Raises UserError.
    """
    hints = typing.get_type_hints(type(preset))
    return tuple(_read(text, preset, hints, fixed) for text in ranges)


def _read(text: str, preset: Any, hints: Mapping[str, Any], fixed: Mapping[str, str]) -> Dimension:
    field, _, value = text.partition("=")
    kind, _, rest = value.partition(":")
    names = {f.name for f in dataclasses.fields(preset)}
    if field in {f.name for f in dataclasses.fields(RunSettings)} - names:
        raise UserError(f"--set {text}: {field} says how to run and changes no result; search fields of the preset")
    if field not in names:
        raise UserError(f"--set {text}: {field!r} is not a field of this sweep{nearest(field, names)}")
    if field in fixed:
        raise UserError(f"--set {text}: no search may vary {field}, as {fixed[field]}; sweep it instead")
    element = _element(hints[field])
    if kind == "choice":
        return _read_choice(text, field, rest, element)
    if element not in (int, float):
        raise UserError(f"--set {text}: {field} holds no numbers; write {field}=choice:A,B")
    if kind == "int" and element is float:
        raise UserError(f"--set {text}: {field} holds real numbers; write {field}=lin:{rest} or {field}=log:{rest}")
    return _read_numbers(text, field, kind, rest, whole=element is int)


def _read_choice(text: str, field: str, rest: str, element: Any) -> Dimension:
    try:
        values = tuple(dict.fromkeys(parse_text(part.strip(), element) for part in rest.split(",") if part.strip()))
    except ValueError as error:
        raise UserError(f"--set {text}: {error}") from error
    if len(values) < 2:
        raise UserError(f"--set {text} leaves nothing to choose; write at least two values, {field}=choice:A,B")
    return Dimension(field, "choice", choices=values)


def _read_numbers(text: str, field: str, kind: str, rest: str, *, whole: bool) -> Dimension:
    parts = rest.split(":")
    try:
        lo, hi = (float(parse_text(part, int if whole else float)) for part in parts[:2])
        levels = int(parts[2]) if len(parts) == 3 else 0
        if len(parts) > 3 or (len(parts) == 3 and levels < 1) or not math.isfinite(lo) or not math.isfinite(hi):
            raise ValueError
    except ValueError:
        numbers = "two whole numbers" if whole else "two numbers"
        raise UserError(f"--set {text} is not {kind}:LO:HI or {kind}:LO:HI:LEVELS with {numbers} LO < HI") from None
    if not lo < hi:
        raise UserError(f"--set {text} is empty: LO={lo:g} is not below HI={hi:g}; write {kind}:LO:HI with LO < HI")
    if kind == "log" and lo <= 0:
        raise UserError(f"--set {text}: a log range cannot reach {lo:g}; choose LO > 0, or {field}=lin:{rest}")
    return Dimension(field, typing.cast("Literal['log', 'lin', 'int']", kind), lo, hi, levels, whole=whole)


def _element(hint: Any) -> Any:
    """Type of one value of a field: of a tuple's elements, of what is not None, or the field's own."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _element(next(a for a in arguments if a is not type(None)))
    return arguments[0] if origin is tuple else hint


def place(preset: Any, point: Mapping[str, Value]) -> Any:
    """The preset at one point: each field has that value, a list of one where the field is a list.

    Raises UserError for a point that the preset refuses.
    """
    changes = {name: (v,) if isinstance(getattr(preset, name), tuple) else v for name, v in point.items()}
    return dataclasses.replace(preset, **changes)


def spelled(point: Mapping[str, Value]) -> str:
    """`lr=0.001 k=8`"""
    return " ".join(f"{name}={value}" for name, value in point.items())
