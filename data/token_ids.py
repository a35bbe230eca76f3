"""Token ids as a file holds them: whole numbers in range, or refused with place and value, never cast."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

LARGEST_ID = 2**31 - 1
"""The largest int32; a vocabulary's own limit is checked where the vocabulary is known."""


def is_list(kind: pa.DataType) -> bool:
    """Whether a column type holds one list per row: of any length, of one length, or as views."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def bad_id(ids: pa.Array, largest: int = LARGEST_ID) -> tuple[int, str] | None:
    """(place, description) of the first of ``ids`` that is no integer of 0 … ``largest``; None when all are.

    Integers stored as another type (3.0, "3") are refused too, at place 0: what wrote them may have rounded others.
    """
    kind = ids.type
    if not len(ids):
        return None
    if ids.null_count:
        return int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0]), "an empty token"
    if pa.types.is_integer(kind):
        values_N = ids.to_numpy()
        wrong = np.flatnonzero((values_N < 0) | (values_N > largest))
        return (int(wrong[0]), f"token {values_N[wrong[0]]}") if len(wrong) else None
    place = 0
    if pa.types.is_floating(kind):
        values_N = ids.to_numpy(zero_copy_only=False).astype(np.float64)
        wrong = np.flatnonzero(~((values_N == np.floor(values_N)) & (values_N >= 0) & (values_N <= largest)))
        place = int(wrong[0]) if len(wrong) else 0
    return place, f"token {ids[place].as_py()!r} of type {kind}"
