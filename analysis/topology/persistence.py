"""First persistent homology of a distance matrix, and greedy landmarks.

Shapes: N rows of the distance matrix, K loops, L landmarks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import psutil
from numba import njit
from numpy.typing import ArrayLike, NDArray

from analysis.topology.rips_h1 import MAX_VERTICES, h1_pairs

Backend = Literal["exact", "ripser"]
BACKENDS: tuple[Backend, ...] = ("exact", "ripser")

_INFINITY_BITS = np.uint32(0x7F800000)


def h1(distance_matrix: ArrayLike, backend: Backend = "exact", *, max_bytes: int | None = None) -> NDArray:
    """Loops of the Vietoris–Rips filtration of a distance matrix: H1 over Z/2.

    Distances are rounded to float32 first, as ripser does. Loops of zero length are left out; every loop dies,
    since the complex is a cone beyond the enclosing radius.

    Args:
        distance_matrix: [N, N], finite, non-negative, symmetric, zero diagonal; N = 0, 1, 2 have no loops.
        backend: "exact", the engine of ``analysis.topology.rips_h1``, or "ripser", the oracle it is tested against
            (Bauer, "Ripser: efficient computation of Vietoris–Rips persistence barcodes", 2021).
        max_bytes: memory the computation may take; None means what the machine has free now.

    Returns:
        float32 [K, 2] of (birth, death), in the distances' own unit, sorted by birth, then death.

    Raises:
        ValueError: the matrix breaks one of the rules above, or the backend is unknown.
        MemoryError: ``predicted_bytes`` exceeds ``max_bytes``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    shape = np.shape(distance_matrix)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"distance_matrix has shape {list(shape)}; it must be square [N, N]; pass all pairs")
    n = shape[0]
    if n > MAX_VERTICES:
        raise ValueError(f"distance_matrix has {n} rows; the engine takes at most {MAX_VERTICES}; pass landmarks")
    _refuse_if_too_large(n, backend, max_bytes)
    d_NN = _checked(distance_matrix)
    if n < 4:
        return np.empty((0, 2), np.float32)
    if backend == "ripser":
        from ripser import ripser

        pairs = ripser(d_NN, distance_matrix=True, maxdim=1)["dgms"][1].astype(np.float32).reshape(-1, 2)
    else:
        pairs = h1_pairs(d_NN.view(np.uint32)).view(np.float32)
    pairs = pairs[pairs[:, 1] > pairs[:, 0]]
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def landmarks(D: ArrayLike, n: int, seed: int) -> NDArray:
    """Greedy farthest-point (maxmin) landmarks.

    The first is ``default_rng(seed).integers(N)``; each next one is farthest from those chosen, the lowest index on
    a tie. With fewer than n distinct points the remaining landmarks repeat points at distance 0.

    Args:
        D: distance matrix [N, N].
        n: number of landmarks, 1 <= n <= N.
        seed: seed of the first landmark.

    Returns:
        int64 [n], row numbers in the order chosen.

    Raises:
        ValueError: D is not square, or n is out of range.
    """
    d_NN = np.asarray(D)
    if d_NN.ndim != 2 or d_NN.shape[0] != d_NN.shape[1]:
        raise ValueError(f"D has shape {list(d_NN.shape)}; it must be square [N, N]; pass all pairs")
    rows = len(d_NN)
    if not 1 <= n <= rows:
        raise ValueError(f"n={n} landmarks of {rows} rows; n must lie in 1..{rows}; choose another n or add rows")
    chosen = np.empty(n, np.int64)
    chosen[0] = np.random.default_rng(seed).integers(rows)
    nearest_N = d_NN[chosen[0]].copy()
    for i in range(1, n):
        chosen[i] = nearest_N.argmax()
        np.minimum(nearest_N, d_NN[chosen[i]], out=nearest_N)
    return chosen


def predicted_bytes(n: int, backend: Backend = "exact") -> int:
    """Upper bound on the memory that ``h1`` takes for n rows, the caller's own matrix not counted.

    exact: a float32 copy, the edges with scratch to sort them, ranks, neighbour lists; measured at 17 n² bytes.
    ripser: measured at 92 to 106 n² bytes.
    """
    return (20 if backend == "exact" else 120) * n * n


def _refuse_if_too_large(n: int, backend: Backend, max_bytes: int | None) -> None:
    available = psutil.virtual_memory().available if max_bytes is None else max_bytes
    need = predicted_bytes(n, backend)
    if need <= available:
        return
    fits = int(n * (available / need) ** 0.5)
    raise MemoryError(
        f"H1 of {n} rows needs up to {need / 2**20:.1f} MiB and {available / 2**20:.1f} MiB may be used; "
        f"subsample or take landmarks to about {fits} rows, or raise max_bytes"
    )


def _checked(distance_matrix: ArrayLike) -> NDArray:
    """The matrix as C-ordered float32 without negative zeros, or a ValueError that names the first offence."""
    with np.errstate(over="ignore"):
        d_NN = np.ascontiguousarray(distance_matrix, dtype=np.float32)
    i, j = _first_offence(d_NN.view(np.uint32))
    if i >= 0 and (d_NN == 0).any():
        d_NN = d_NN + np.float32(0)  # turns -0.0, whose bit pattern is not that of zero, into 0.0
        i, j = _first_offence(d_NN.view(np.uint32))
    if i < 0:
        return d_NN
    if not np.isfinite(d_NN[i, j]):
        value = float(np.asarray(distance_matrix)[i, j])
        raise ValueError(
            f"distance_matrix[{i}, {j}] = {value}; distances must be finite in float32; drop or impute row {i} or {j}"
        )
    value = d_NN[i, j]
    if i == j:
        raise ValueError(
            f"distance_matrix[{i}, {j}] = {value}; the diagonal must be 0; set it to 0 if it is rounding error"
        )
    if value < 0:
        raise ValueError(f"distance_matrix[{i}, {j}] = {value}; distances must be >= 0; check the metric")
    raise ValueError(
        f"distance_matrix[{i}, {j}] = {value} but distance_matrix[{j}, {i}] = {d_NN[j, i]}; distances must be "
        f"symmetric; pass (D + D.T) / 2 if the difference is rounding error"
    )


@njit(cache=True, nogil=True)
def _first_offence(bits_NN):
    """(i, j) of an entry that breaks a rule, (-1, -1) when none does; in tiles, since rows meet columns."""
    n = len(bits_NN)
    tile = 32
    for i in range(n):
        if bits_NN[i, i] != 0:
            return i, i
    for top in range(0, n, tile):
        for left in range(0, top + 1, tile):
            for i in range(top, min(top + tile, n)):
                for j in range(left, min(left + tile, i)):
                    x = bits_NN[i, j]
                    y = bits_NN[j, i]
                    if y >= _INFINITY_BITS:
                        return j, i
                    if x != y or x >= _INFINITY_BITS:
                        return i, j
    return -1, -1
