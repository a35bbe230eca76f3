"""Many comparisons at once: adjusted p-values that every study uses."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

ALPHA = 0.05  # family-wise error that an adjusted p is compared with
_K = TypeVar("_K", bound=Hashable)


def holm(p_values: Mapping[_K, float]) -> dict[_K, float]:
    """Adjusted p-values that control the family-wise error of all tests together (Holm 1979), by the tests' names.

    A p that is NaN was not tested: it stays NaN and does not count in the family.
    """
    names = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    adjusted, running = {name: math.nan for name in p_values}, 0.0
    for rank, name in enumerate(names):
        running = max(running, min(1.0, (len(names) - rank) * p_values[name]))
        adjusted[name] = running
    return adjusted


def holm_list(p_values: Sequence[float]) -> list[float]:
    """`holm` of p-values in a row, in their order."""
    return list(holm(dict(enumerate(p_values))).values())
