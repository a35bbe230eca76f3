"""Numbers as people read them: times, amounts, floating-point work."""

from __future__ import annotations

import math

_PREFIXES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPANS = ((365.25 * 86400, "years"), (86400.0, "days"), (3600.0, "hours"), (60.0, "min"))
UNKNOWN = "?"


def duration(seconds: float) -> str:
    """As a clock shows it, `1:02:03` or `2:03`; `?` for a time that is not known."""
    if not math.isfinite(seconds):
        return UNKNOWN
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def span(seconds: float) -> str:
    """In the largest unit of which there are two or more, to two digits: `65 days`, `2.5 hours`, `90 s`."""
    if not math.isfinite(seconds):
        return UNKNOWN
    for unit, name in _SPANS:
        if seconds >= 2 * unit:
            count = seconds / unit
            return f"{count:.2g} {name}" if count < 99.5 else f"{count:,.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 1 or not seconds else "under 1 s"


def quantity(x: float, unit: str = "") -> str:
    """A number with three digits and a metric prefix, `196k`; with a unit, `1.35 EFLOP`."""
    if not math.isfinite(x):
        return UNKNOWN
    limit, prefix = next(((at, name) for at, name in _PREFIXES if abs(x) >= at), (1.0, ""))
    return f"{x / limit:.3g} {prefix}{unit}" if unit else f"{x / limit:.3g}{prefix}"
