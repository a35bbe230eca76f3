"""Matched nulls: random matrices that keep chosen statistics of a data matrix and nothing else.

Every sampler takes ``(x, seed, stream)``.  ``stream="published"`` consumes ``default_rng(seed)`` call by call as the
study "Robust but Not Unique" (2026-04-07) did, so its numbers can be reproduced; ``stream="fast"`` draws from the same
law with other random numbers (for ``fixed_margin``, from the uniform law that the published chain approaches).

Shapes: N rows, D columns.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from analysis.topology.matrix_checks import bits, counts, finite, matrix

Stream = Literal["fast", "published"]
STREAMS: tuple[Stream, ...] = ("fast", "published")

SWAPS_PER_ONE = 5
ATTEMPTS_PER_SWAP = 50
TRADES_PER_ROW = 10
JITTER = 1e-9
_SPARSE = 0.25


def fixed_margin(x: ArrayLike, seed: int, stream: Stream = "fast") -> NDArray:
    """Bits with the row sums and column sums of x.

    published: checkerboard swaps between two random rows (Connor & Simberloff 1979) until SWAPS_PER_ONE swaps a one
    have succeeded or ATTEMPTS_PER_SWAP times as many were tried. fast: curveball trades (Strona et al. 2014), whose
    stationary law is uniform over all matrices with these margins (Carstens 2015), TRADES_PER_ROW times N of them.

    Args:
        x: [N, D], bool or 0/1.
        seed: seed of the draw.
        stream: "fast" or "published".

    Returns:
        bool [N, D].

    Raises:
        ValueError: x holds other values than 0 and 1, or the stream is unknown.
    """
    _check_stream(stream)
    x_ND = bits(x)
    n, d = x_ND.shape
    if n < 2:
        return x_ND.copy()
    rng = np.random.default_rng(seed)
    out_ND = np.zeros((n, d), np.bool_)
    if stream == "published":
        for row, ones in enumerate(_swap_rows([set(np.flatnonzero(r).tolist()) for r in x_ND], rng)):
            out_ND[row, list(ones)] = True
        return out_ND
    rows, columns = _nonzero(x_ND)
    starts = np.searchsorted(rows, np.arange(n + 1))
    _curveball(columns, starts, TRADES_PER_ROW * n, d, rng)
    out_ND[rows, columns] = True
    return out_ND


def bernoulli(x: ArrayLike, seed: int, stream: Stream = "fast") -> NDArray:
    """Independent bits with the column means of x.

    fast: geometric gaps between ones, so the cost follows the ones. Arguments, result and errors as `fixed_margin`.
    """
    _check_stream(stream)
    x_ND = bits(x)
    if len(x_ND) == 0:
        return x_ND.copy()
    rng = np.random.default_rng(seed)
    mean_D = x_ND.mean(axis=0)
    if stream == "published":
        return rng.binomial(1, mean_D, size=x_ND.shape).astype(np.bool_)
    return _bernoulli_gaps(len(x_ND), mean_D, rng)


def multinomial(x: ArrayLike, seed: int, stream: Stream = "fast") -> NDArray:
    """Counts with the row sums of x, each row a multinomial draw with the column sums' shares.

    fast: one draw by alias table (Walker 1977, Vose 1991) for each unit of count.

    Args:
        x: [N, D], non-negative whole numbers.
        seed: seed of the draw.
        stream: "fast" or "published".

    Returns:
        int64 [N, D].

    Raises:
        ValueError: x holds a negative or fractional value, or the stream is unknown.
    """
    _check_stream(stream)
    x_ND = counts(x)
    rng = np.random.default_rng(seed)
    total_N = x_ND.sum(axis=1, dtype=np.int64)
    total_D = x_ND.sum(axis=0, dtype=np.int64)
    out_ND = np.zeros(x_ND.shape, np.int64)
    if total_N.sum() == 0:
        return out_ND
    share_D = total_D / total_D.sum()
    if stream == "published":
        for row, total in enumerate(total_N):
            if total > 0:
                out_ND[row] = rng.multinomial(total, share_D)
        return out_ND
    keep_D, alias_D = _alias_table(share_D)
    _multinomial_alias(out_ND, total_N, keep_D, alias_D, rng)
    return out_ND


def permute_columns(x: ArrayLike, seed: int, stream: Stream = "fast") -> NDArray:
    """Each column of x in an independent random order: marginals kept, dependence between columns gone.

    fast: a sparse integer matrix has only its non-zero entries placed anew, on distinct random rows.

    Args:
        x: [N, D], any numeric type.
        seed: seed of the draw.
        stream: "fast" or "published".

    Returns:
        [N, D] of the type of x.

    Raises:
        ValueError: x is not two-dimensional, or the stream is unknown.
    """
    _check_stream(stream)
    x_ND = matrix(x)
    rng = np.random.default_rng(seed)
    if stream == "published":
        out_ND = np.empty_like(x_ND)
        for j in range(x_ND.shape[1]):
            out_ND[:, j] = rng.permutation(x_ND[:, j])
        return out_ND
    if not np.issubdtype(x_ND.dtype, np.inexact):
        rows, columns = _nonzero(x_ND)
        if len(rows) < _SPARSE * x_ND.size:
            order = np.argsort(columns, kind="stable")
            starts = np.searchsorted(columns[order], np.arange(x_ND.shape[1] + 1))
            out_ND = np.zeros(x_ND.shape, x_ND.dtype)
            _place_columns(out_ND, starts, x_ND[rows, columns][order], rng)
            return out_ND
    return np.ascontiguousarray(rng.permuted(x_ND.T, axis=1).T)


def gaussian(x: ArrayLike, seed: int, stream: Stream = "fast") -> NDArray:
    """Gaussian rows with the mean of x and its covariance plus JITTER on the diagonal.

    published: factor V diag(sqrt(max(w, 0) + JITTER)) of the eigendecomposition V diag(w) Vᵀ. fast: Cholesky factor of
    the same matrix, or, with no more rows than columns, random combinations of the centred rows plus jitter noise;
    all have the same law.

    Args:
        x: [N, D], finite reals, N >= 2.
        seed: seed of the draw.
        stream: "fast" or "published".

    Returns:
        float64 [N, D].

    Raises:
        ValueError: x is not finite or has fewer than two rows, or the stream is unknown.
    """
    _check_stream(stream)
    x_ND = finite(x)
    n, d = x_ND.shape
    if n < 2:
        raise ValueError(f"x has {n} rows; a covariance needs at least 2; pass more rows")
    rng = np.random.default_rng(seed)
    mean_D = x_ND.mean(axis=0)
    if stream == "fast" and n <= d:
        centred_ND = (x_ND - mean_D) / np.sqrt(n - 1)
        return rng.standard_normal((n, n)) @ centred_ND + np.sqrt(JITTER) * rng.standard_normal((n, d)) + mean_D
    covariance_DD = np.atleast_2d(np.cov(x_ND, rowvar=False))
    if stream == "fast":
        try:
            factor_DD = np.linalg.cholesky(covariance_DD + JITTER * np.eye(d))
        except np.linalg.LinAlgError:  # rounding outweighs the jitter when variances are huge; eigh never fails
            factor_DD = _eigen_factor(covariance_DD)
        return rng.standard_normal((n, d)) @ factor_DD.T + mean_D
    return rng.normal(size=(n, d)) @ _eigen_factor(covariance_DD).T + mean_D


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ValueError(f"stream={stream!r} is unknown; choose one of {', '.join(STREAMS)}")


def _nonzero(x_ND: NDArray) -> tuple[NDArray, NDArray]:
    """np.nonzero, by the flat bool search that NumPy vectorises."""
    return np.divmod(np.flatnonzero(x_ND != 0 if x_ND.dtype != np.bool_ else x_ND), x_ND.shape[1])


def _eigen_factor(covariance_DD: NDArray) -> NDArray:
    w_D, v_DD = np.linalg.eigh(covariance_DD)
    return v_DD @ np.diag(np.sqrt(np.maximum(w_D, 0) + JITTER))


def _swap_rows(rows: list[set[int]], rng: np.random.Generator) -> list[set[int]]:
    """The published chain. Which element a draw picks depends on CPython's set order, so the sets must stay sets."""
    target = SWAPS_PER_ONE * sum(map(len, rows))
    done = 0
    for _ in range(ATTEMPTS_PER_SWAP * target):
        if done == target:
            break
        a, b = rng.choice(len(rows), size=2, replace=False)
        only_a = list(rows[a] - rows[b])
        only_b = list(rows[b] - rows[a])
        if not only_a or not only_b:
            continue
        # Generator.choice of a list draws integers(len); drawing them directly saves making arrays
        out = only_a[rng.integers(len(only_a))]
        into = only_b[rng.integers(len(only_b))]
        rows[a].remove(out)
        rows[a].add(into)
        rows[b].remove(into)
        rows[b].add(out)
        done += 1
    return rows


@njit(cache=True, nogil=True)
def _below(k, rng):
    """A random integer in [0, k) for small k: one double, whose 53 bits leave a bias below k / 2**53."""
    return int(rng.random() * k)


@njit(cache=True, nogil=True)
def _curveball(columns, starts, trades, n_columns, rng):
    """Trades in place; columns[starts[i]:starts[i + 1]] are the columns of the ones of row i, in any order.

    A trade pools the columns that only one of two random rows has and deals them out again, each row as many as it
    brought.  Choosing the share of the smaller party alone is enough.
    """
    n = len(starts) - 1
    held = np.zeros(n_columns, np.bool_)
    pool = np.empty(2 * n_columns, np.int64)  # entry numbers: first those only row a has, then those only row b has
    for _ in range(trades):
        a = _below(n, rng)
        b = _below(n - 1, rng)
        b += b >= a
        if starts[a + 1] - starts[a] > starts[b + 1] - starts[b]:
            a, b = b, a
        for k in range(starts[b], starts[b + 1]):
            held[columns[k]] = True
        few = 0
        for k in range(starts[a], starts[a + 1]):
            if held[columns[k]]:
                held[columns[k]] = False
            else:
                pool[few] = k
                few += 1
        size = few
        for k in range(starts[b], starts[b + 1]):
            if held[columns[k]]:
                held[columns[k]] = False
                pool[size] = k
                size += 1
        if size == few:
            continue
        for i in range(few):
            j = i + _below(size - i, rng)
            x = columns[pool[i]]
            columns[pool[i]] = columns[pool[j]]
            columns[pool[j]] = x


@njit(cache=True, nogil=True)
def _bernoulli_gaps(n, mean_D, rng):
    out_ND = np.zeros((n, len(mean_D)), np.bool_)
    for j in range(len(mean_D)):
        p = mean_D[j]
        if p >= 1:
            out_ND[:, j] = True
        elif p > 0:
            log_q = np.log1p(-p)
            i = np.log1p(-rng.random()) / log_q
            while i < n:
                out_ND[int(i), j] = True
                i = np.floor(i) + 1 + np.log1p(-rng.random()) / log_q
    return out_ND


@njit(cache=True, nogil=True)
def _alias_table(share_D):
    """Column j of a uniformly drawn pair (j, u) is kept when u < keep[j], else replaced by alias[j]."""
    d = len(share_D)
    keep = share_D * d
    alias = np.arange(d)
    stack = np.empty(d, np.int64)  # poor columns from the left, rich ones from the right
    poor = 0
    rich = d
    for j in range(d):
        if keep[j] < 1:
            stack[poor] = j
            poor += 1
        else:
            rich -= 1
            stack[rich] = j
    while poor > 0 and rich < d:
        poor -= 1
        receiver = stack[poor]
        donor = stack[rich]
        alias[receiver] = donor
        keep[donor] -= 1 - keep[receiver]
        if keep[donor] < 1:
            rich += 1
            stack[poor] = donor
            poor += 1
    for k in range(poor):  # rounding leaves these a hair below 1, with nobody to borrow from
        keep[stack[k]] = 1
    return keep, alias


@njit(cache=True, nogil=True)
def _multinomial_alias(out_ND, total_N, keep_D, alias_D, rng):
    d = len(keep_D)
    for i in range(len(total_N)):
        for _ in range(total_N[i]):
            u = rng.random() * d
            j = min(int(u), d - 1)
            if u - j >= keep_D[j]:
                j = alias_D[j]
            out_ND[i, j] += 1


@njit(cache=True, nogil=True)
def _place_columns(out_ND, starts, values, rng):
    """values[starts[j]:starts[j + 1]] on distinct random rows of column j, by partial Fisher–Yates shuffles.

    The order left by one column is as good a start as any for the next.
    """
    n = len(out_ND)
    order = np.arange(n)
    for j in range(len(starts) - 1):
        for k in range(starts[j], starts[j + 1]):
            i = k - starts[j]
            other = i + _below(n - i, rng)
            row = order[other]
            order[other] = order[i]
            order[i] = row
            out_ND[row, j] = values[k]
