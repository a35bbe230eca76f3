"""Numba kernels that find the largest scores of a batch: see `batch_screen`, and `kernels` for the conventions."""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from models.sae.intrinsics import float_of_bits
from models.sae.kernels import FAST, kernel, screened_score

_ZERO = np.float32(0)


def _raised(value, scale):
    """The float32 that `kernels.write_screen` stored; compiled by `_raised_of_kind`."""
    raise NotImplementedError("for compiled code only")


@overload(_raised, inline="always", jit_options={"fastmath": FAST})
def _raised_of_kind(value, scale):
    if value == types.int16:
        return lambda value, scale: float_of_bits(np.int32(value) << np.int32(16))
    return lambda value, scale: np.float32(value) * scale


@kernel
def mark(
    product_RM, row_scale_R, scale_M, bias_M, length_M, miss_M, row_miss_R, row_length_R, least, mark_RM, count_R,
    start, stop,
):  # fmt: skip
    """Mark the features of each row whose score may reach `least`, and count them.

    The screened score (see `screen`) is off by no more than row_miss · length[j] + row_length · miss[j]: by Cauchy and
    Schwarz, with the lengths of what the low precision lost of a row and of a feature's weights, and those of what it
    kept.
    """
    features = product_RM.shape[1]
    for row in range(start, stop):
        product, marked, r = product_RM[row], mark_RM[row], row_scale_R[row]
        row_miss, row_length = row_miss_R[row], row_length_R[row]
        for j in range(features):
            score = screened_score(product[j], r, scale_M[j], bias_M[j])
            marked[j] = score + (row_miss * length_M[j] + row_length * miss_M[j]) >= least
        count = np.int64(0)
        for j in range(features):
            count += marked[j]
        count_R[row] = count


@kernel
def collect(mark_RM, first_R1, index_E, start, stop):
    """The marked features of rows start:stop, ascending: those of row r go to index[first[r]:first[r + 1]]."""
    features = mark_RM.shape[1]
    for row in range(start, stop):
        marked = mark_RM[row]
        n = np.int64(first_R1[row])
        for left in range(0, features, 64):
            right = min(left + 64, features)
            found = np.int32(0)
            for j in range(left, right):
                found += marked[j]
            if found == 0:
                continue
            for j in range(left, right):
                if marked[j]:
                    index_E[n] = j
                    n += 1


@kernel
def score_entries(starts_M1, b_enc, norm_M, a_E, score_E, start, stop):
    """a += b_enc[j] and score = a · norm[j] for the entries of features start:stop."""
    for j in range(start, stop):
        for e in range(starts_M1[j], starts_M1[j + 1]):
            a_E[e] += b_enc[j]
            score_E[e] = a_E[e] * norm_M[j]


@kernel
def screen_error(rows_ND, factor_N, low_ND, scale_N, length_N, miss_N, start, stop):
    """Lengths of rows · factor in low precision (see `write_screen`), and of what the low precision lost."""
    for n in range(start, stop):
        row, low, factor, scale = rows_ND[n], low_ND[n], factor_N[n], scale_N[n]
        length, miss = _ZERO, _ZERO
        for d in range(row.shape[0]):
            kept = _raised(low[d], scale)
            lost = row[d] * factor - kept
            length += kept * kept
            miss += lost * lost
        length_N[n] = np.sqrt(length)
        miss_N[n] = np.sqrt(miss)


@kernel
def sort_ragged(index_E, first_B1, starts_M1, token_E):
    """`kernels.sort_entries` for rows of any length: the features of row b are index[first[b]:first[b + 1]]."""
    features = starts_M1.shape[0] - 1
    starts_M1[:] = 0
    for e in range(index_E.shape[0]):
        starts_M1[index_E[e] + 1] += 1
    for j in range(features):
        starts_M1[j + 1] += starts_M1[j]
    place = starts_M1[:features].copy()
    for row in range(first_B1.shape[0] - 1):
        for e in range(first_B1[row], first_B1[row + 1]):
            j = index_E[e]
            token_E[place[j]] = row
            place[j] += 1
