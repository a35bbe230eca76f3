"""Entry checks shared by distances and nulls: the array a function needs, or one line that names the offence."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def matrix(x: ArrayLike) -> NDArray:
    """x as [rows, columns]."""
    x_ND = np.asarray(x)
    if x_ND.ndim != 2:
        raise ValueError(f"x has shape {list(x_ND.shape)}; it must be [rows, columns]; reshape it")
    return x_ND


def finite(x: ArrayLike) -> NDArray:
    """x as float64 [rows, columns] without NaN and infinities."""
    x_ND = matrix(x).astype(np.float64)
    if not np.isfinite(x_ND).all():
        i, j = np.argwhere(~np.isfinite(x_ND))[0]
        raise ValueError(f"x[{i}, {j}] = {x_ND[i, j]}; entries must be finite; drop or impute row {i}")
    return x_ND


def bits(x: ArrayLike) -> NDArray:
    """x as bool [rows, columns]; other types must hold 0 and 1 alone."""
    x_ND = matrix(x)
    if x_ND.dtype == np.bool_:
        return x_ND
    bad = (x_ND != 0) & (x_ND != 1)
    if bad.any():
        i, j = np.argwhere(bad)[0]
        raise ValueError(f"x[{i}, {j}] = {x_ND[i, j]}; bits must be 0 or 1; pass x > 0, or treat x as counts")
    return x_ND.astype(np.bool_)


def counts(x: ArrayLike) -> NDArray:
    """x as an integer (or bool) matrix of non-negative counts; floats must hold whole numbers."""
    x_ND = matrix(x)
    if not np.issubdtype(x_ND.dtype, np.integer) and x_ND.dtype != np.bool_:
        bad = ~(np.isfinite(x_ND) & (x_ND == np.round(x_ND)))
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise ValueError(f"x[{i}, {j}] = {x_ND[i, j]}; counts must be whole numbers; treat x as reals")
        x_ND = x_ND.astype(np.int64)
    if x_ND.size and x_ND.min() < 0:
        i, j = np.argwhere(x_ND < 0)[0]
        raise ValueError(f"x[{i}, {j}] = {x_ND[i, j]}; counts must be >= 0; check the fingerprint")
    return x_ND
