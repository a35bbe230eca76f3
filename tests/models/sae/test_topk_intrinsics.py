"""The block sums of the TopK kernels against NumPy, and that an entry's sum does not depend on its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from models.sae.intrinsics import BLOCK, add_weighted, block_dots, weighted_sum

ROWS, BASE_ROWS = 23, 3  # the sums start at row BASE_ROWS of the array


@njit
def dots(rows, token, first, last, weights, out):
    block_dots(rows, BASE_ROWS * BLOCK, token, first, last, weights, 0, out)


@njit
def total(rows, token, value, first, last, out):
    weighted_sum(rows, BASE_ROWS * BLOCK, token, value, first, last, out)


@njit
def spread(rows, token, value, first, last, weights):
    add_weighted(rows, BASE_ROWS * BLOCK, token, value, first, last, weights)


def problem(entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, the tokens and values of some entries, and one row of weights."""
    rng = np.random.default_rng(entries)
    rows = rng.standard_normal((BASE_ROWS + ROWS, BLOCK)).astype(np.float32)
    token = rng.integers(0, ROWS, entries).astype(np.int32)
    return rows, token, rng.standard_normal(entries).astype(np.float32), rng.standard_normal(BLOCK).astype(np.float32)


@pytest.mark.parametrize("entries", [1, 2, 5, 16, 21, 55])
def test_sums_are_those_of_numpy(entries: int) -> None:
    rows, token, value, weights = problem(entries)
    first, last = entries // 4, entries
    picked = rows[BASE_ROWS + token[first:]].astype(np.float64)
    out = np.ones(entries, np.float32)
    dots(rows, token, first, last, weights, out)
    np.testing.assert_allclose(out[first:], 1 + picked @ weights, rtol=1e-5, atol=1e-5)
    assert (out[:first] == 1).all()
    summed = np.empty(BLOCK, np.float32)
    total(rows, token, value, first, last, summed)
    np.testing.assert_allclose(summed, value[first:] @ picked, rtol=1e-5, atol=1e-5)
    wanted = rows.astype(np.float64)
    np.add.at(wanted, BASE_ROWS + token[first:], value[first:, None] * weights.astype(np.float64))
    spread(rows, token, value, first, last, weights)
    np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-5)


def test_a_dot_has_the_same_bits_in_any_group() -> None:
    """Taken sixteen, four or one at a time: threads and packs may split the entries anywhere."""
    rows, token, _, weights = problem(53)
    whole, single = np.zeros(53, np.float32), np.zeros(53, np.float32)
    dots(rows, token, 0, 53, weights, whole)
    for entry in range(53):
        dots(rows, token, entry, entry + 1, weights, single)
    assert np.array_equal(whole, single)


def test_no_entry_gives_zero() -> None:
    rows, token, value, _ = problem(4)
    summed = np.ones(BLOCK, np.float32)
    total(rows, token, value, 2, 2, summed)
    assert (summed == 0).all()
