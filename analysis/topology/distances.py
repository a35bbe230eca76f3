"""Distance matrices of fingerprints and embeddings, exact where the data are integers.

Each function returns float32 [N, N], symmetric with a zero diagonal, ready for ``analysis.topology.persistence.h1``.

Shapes: N rows, D columns, W = ceil(D / 64) machine words.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import ArrayLike, NDArray

from analysis.topology.matrix_checks import bits, counts, finite

# Below this share of |x|^2 + |y|^2 the GEMM form of |x - y|^2 loses float32 digits to cancellation.
_CANCELLATION = 0.25


def distance_matrix(x_ND: ArrayLike, metric: str) -> NDArray:
    """The distance matrix of the rows of x_ND by the name of a metric in ``METRICS``.

    Raises:
        ValueError: the metric is unknown or the data do not suit it.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; choose one of {', '.join(METRICS)}")
    return METRICS[metric](x_ND)


def jaccard(x_ND: ArrayLike) -> NDArray:
    """Jaccard distance of bit vectors, 1 - |a & b| / |a | b|, and 0 between two empty rows.

    x_ND: [N, D], bool or 0/1. Every entry is the float32 nearest to the float64 quotient |a ^ b| / |a | b|, which
    is what SciPy's boolean Jaccard gives after rounding to float32.

    Raises:
        ValueError: x_ND is not two-dimensional or holds values other than 0 and 1.
    """
    x_ND = bits(x_ND)
    n, d = x_ND.shape
    words = -(-d // 64)
    bytes_NB = np.zeros((n, 8 * words), np.uint8)
    bytes_NB[:, : -(-d // 8)] = np.packbits(x_ND, axis=1)
    return _jaccard_packed(bytes_NB.view(np.uint64), x_ND.sum(axis=1, dtype=np.int64))


def tanimoto(x_ND: ArrayLike) -> NDArray:
    """Generalised Tanimoto distance of count vectors, 1 - a·b / (|a|^2 + |b|^2 - a·b), 0 between two empty rows.

    x_ND: [N, D] of non-negative integers. Inner products are exact (int64), the quotient float64, the result its
    nearest float32. The cost follows the non-zero entries that rows share, not D.

    Raises:
        ValueError: x_ND is not two-dimensional or holds a negative or fractional value.
    """
    x_ND = counts(x_ND)
    rows, columns = np.nonzero(x_ND)
    values = x_ND[rows, columns].astype(np.int64)
    by_column = np.argsort(columns, kind="stable")
    return _tanimoto_sparse(
        np.searchsorted(rows, np.arange(len(x_ND) + 1)),
        columns,
        values,
        np.searchsorted(columns[by_column], np.arange(x_ND.shape[1] + 1)),
        rows[by_column],
        values[by_column],
    )


def euclidean(x_ND: ArrayLike) -> NDArray:
    """Euclidean distance |x - y|.

    x_ND: [N, D] of finite reals. A float32 matrix product on centred data, with every pair that would lose digits to
    cancellation computed again from differences in float64, so close pairs are accurate and duplicates are at 0.

    Raises:
        ValueError: x_ND is not two-dimensional or not finite.
    """
    return np.sqrt(_squared_euclidean(finite(x_ND)))


def cosine(x_ND: ArrayLike) -> NDArray:
    """Cosine distance 1 - x·y / (|x| |y|), computed as |x/|x| - y/|y||^2 / 2, which is accurate for close pairs.

    Raises:
        ValueError: x_ND is not two-dimensional, not finite, or has a row of zeros.
    """
    x_ND = finite(x_ND)
    norm_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    if (norm_N1 == 0).any():
        i = int(np.argmin(norm_N1))
        raise ValueError(f"row {i} is all zeros; cosine distance needs a direction; drop the row or use euclidean")
    return _squared_euclidean(x_ND / norm_N1) * np.float32(0.5)


METRICS: dict[str, Callable[[ArrayLike], NDArray]] = {
    "jaccard": jaccard,
    "tanimoto": tanimoto,
    "euclidean": euclidean,
    "cosine": cosine,
}


def _squared_euclidean(x_ND: NDArray) -> NDArray:
    x_ND = x_ND - x_ND.mean(axis=0) if len(x_ND) else x_ND
    gram_NN = x_ND.astype(np.float32)
    gram_NN = gram_NN @ gram_NN.T
    _finish_squared(gram_NN, x_ND, np.einsum("nd,nd->n", x_ND, x_ND), np.float32(_CANCELLATION))
    return gram_NN


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _finish_squared(gram_NN, x_ND, norm_N, cancellation):
    """Turn inner products into squared distances in place."""
    for i in range(len(gram_NN)):
        gram_NN[i, i] = 0
        for j in range(i):
            total = norm_N[i] + norm_N[j]
            squared = total - 2 * np.float64(gram_NN[i, j])
            if squared < cancellation * total:
                squared = 0.0
                for k in range(x_ND.shape[1]):
                    difference = x_ND[i, k] - x_ND[j, k]
                    squared += difference * difference
            gram_NN[i, j] = squared
            gram_NN[j, i] = squared


@intrinsic
def _popcount(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@njit(cache=True, nogil=True)
def _jaccard_packed(packed_NW, ones_N):
    n, words = packed_NW.shape
    out_NN = np.zeros((n, n), np.float32)
    for i in range(n):
        row = packed_NW[i]
        for j in range(i):
            other = packed_NW[j]
            both = np.uint64(0)
            for w in range(words):
                both += _popcount(row[w] & other[w])  # type: ignore[call-arg]
            union = ones_N[i] + ones_N[j] - np.int64(both)
            if union > 0:
                distance = np.float32((union - np.int64(both)) / union)
                out_NN[i, j] = distance
                out_NN[j, i] = distance
    return out_NN


@njit(cache=True, nogil=True)
def _tanimoto_sparse(row_start, column, value, column_start, row, row_value):
    """Row by row against an inverted index: entries of x_ND by row (column, value) and by column (row, row_value)."""
    n = len(row_start) - 1
    out_NN = np.zeros((n, n), np.float32)
    norm_N = np.zeros(n, np.int64)
    inner_N = np.empty(n, np.int64)
    for i in range(n):
        inner_N[: i + 1] = 0
        for k in range(row_start[i], row_start[i + 1]):
            x = value[k]
            for t in range(column_start[column[k]], column_start[column[k] + 1]):
                if row[t] > i:
                    break
                inner_N[row[t]] += x * row_value[t]
        norm_N[i] = inner_N[i]
        for j in range(i):
            denominator = norm_N[i] + norm_N[j] - inner_N[j]
            if denominator > 0:
                distance = np.float32(1.0 - inner_N[j] / denominator)
                out_NN[i, j] = distance
                out_NN[j, i] = distance
    return out_NN
