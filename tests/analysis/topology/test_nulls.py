"""Laws of the null samplers, and the published random streams against a plain re-implementation."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from analysis.topology import nulls

SIGNIFICANCE = 1e-4  # of the tests of laws below; the seeds are fixed, so they pass or fail for good


def sparse_bits(seed=0, n=40, d=30):
    rng = np.random.default_rng(seed)
    x = rng.random((n, d)) < rng.beta(0.6, 2, size=d)
    x[0] = False
    x[:, 0] = True
    x[:, 1] = False
    return x


def sparse_counts(seed=0, n=30, d=24):
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.3, 2, size=d), size=(n, d))
    x[2] = 0
    return x


def draws(sampler, x, count, stream="fast"):
    return np.stack([sampler(x, seed, stream) for seed in range(count)])


# --- laws of the fast streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", nulls.STREAMS)
def test_fixed_margin_keeps_both_margins_and_moves(stream):
    x = sparse_bits()
    out = nulls.fixed_margin(x, 1, stream)
    assert out.dtype == np.bool_
    assert_array_equal(out.sum(0), x.sum(0))
    assert_array_equal(out.sum(1), x.sum(1))
    assert (out != x).sum() > 0.2 * x.sum()


def matrices_with_margins(rows, columns):
    """Every 0/1 matrix with these margins."""
    choices = [list(itertools.combinations(range(len(columns)), r)) for r in rows]
    found = []
    for ones in itertools.product(*choices):
        m = np.zeros((len(rows), len(columns)), bool)
        for i, c in enumerate(ones):
            m[i, list(c)] = True
        if (m.sum(0) == columns).all():
            found.append(m.tobytes())
    return found


@pytest.mark.parametrize(
    "x",
    [
        [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]],
    ],
)
def test_curveball_reaches_every_matrix_equally_often(x):
    """Carstens 2015: the stationary law is uniform over all matrices with the margins."""
    x = np.array(x, dtype=bool)
    space = matrices_with_margins(x.sum(1), x.sum(0))
    seen = Counter(nulls.fixed_margin(x, seed).tobytes() for seed in range(25 * len(space)))
    assert set(seen) == set(space)
    assert stats.chisquare([seen[m] for m in space]).pvalue > SIGNIFICANCE


def test_bernoulli_has_the_column_means_independently():
    x = sparse_bits(1)
    out = draws(nulls.bernoulli, x, 400)
    p = x.mean(0)
    assert not out[:, :, p == 0].any()
    assert out[:, :, p == 1].all()
    inner = (p > 0) & (p < 1)
    n = 400 * len(x)
    z = (out.sum((0, 1)) - n * p)[inner] / np.sqrt(n * p * (1 - p))[inner]
    assert stats.chi2(inner.sum()).sf((z**2).sum()) > SIGNIFICANCE
    # every row and every pair of columns too: rows are equally likely, columns uncorrelated
    z = (out.sum((0, 2)) - 400 * p.sum()) / np.sqrt(400 * (p * (1 - p)).sum())
    assert stats.chi2(len(x)).sf((z**2).sum()) > SIGNIFICANCE
    correlation = np.corrcoef(out[:, :, inner].reshape(n, -1), rowvar=False)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5.5 / np.sqrt(n)


def test_bernoulli_column_sums_are_binomial():
    x = np.zeros((12, 40), bool)
    x[:3] = True
    sums = draws(nulls.bernoulli, x, 200).sum(1).ravel()
    expected = stats.binom(12, 0.25).pmf(np.arange(13)) * len(sums)
    seen = np.bincount(sums, minlength=13)
    tail = expected < 8
    seen, expected = np.append(seen[~tail], seen[tail].sum()), np.append(expected[~tail], expected[tail].sum())
    assert stats.chisquare(seen, expected).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("stream", nulls.STREAMS)
def test_multinomial_keeps_row_sums_and_has_the_column_shares(stream):
    x = sparse_counts()
    out = draws(nulls.multinomial, x, 300, stream)
    assert_array_equal(out.sum(2), np.broadcast_to(x.sum(1), out.shape[:2]))
    share = x.sum(0) / x.sum()
    assert not out[:, :, share == 0].any()
    seen = out.sum((0, 1))[share > 0]
    assert stats.chisquare(seen, share[share > 0] * seen.sum()).pvalue > SIGNIFICANCE
    # variance of a multinomial entry: m p (1 - p)
    row = x.sum(1).argmax()
    m = x.sum(1)[row]
    ratio = out[:, row].var(0)[share > 0.02] / (m * share * (1 - share))[share > 0.02]
    assert np.abs(ratio - 1).max() < 5 * np.sqrt(2 / 300)


@pytest.mark.parametrize("stream", nulls.STREAMS)
@pytest.mark.parametrize(
    "x", [sparse_bits(2), sparse_counts(2), sparse_counts(3) + 1, np.random.default_rng(4).normal(size=(25, 6))]
)
def test_permuted_columns_are_permutations_of_the_columns(x, stream):
    out = nulls.permute_columns(x, 5, stream)
    assert out.dtype == x.dtype
    assert_array_equal(np.sort(out, axis=0), np.sort(x, axis=0))
    assert (out != x).any()


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_permuted_columns_reach_every_order_independently(dtype):
    x = np.zeros((4, 12), dtype)
    x[0, :2] = 1
    x[1, :2] = 2
    orders = Counter()
    for seed in range(4800):
        out = nulls.permute_columns(x, seed)
        orders[tuple(out[:, :2].T.ravel())] += 1
    assert len(orders) == 12 * 12
    assert stats.chisquare(list(orders.values())).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("stream", nulls.STREAMS)
@pytest.mark.parametrize(("n", "d"), [(40, 5), (6, 9)])
def test_gaussian_has_the_mean_and_covariance(n, d, stream):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    out = draws(nulls.gaussian, x, 12000 // n, stream).reshape(-1, d)
    covariance = np.cov(x, rowvar=False)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert_allclose(out.mean(0) / np.sqrt(np.diag(covariance)), x.mean(0) / np.sqrt(np.diag(covariance)), atol=0.045)
    assert_allclose(np.cov(out, rowvar=False) / scale, covariance / scale, atol=0.07)
    standard = (out[:, 0] - x[:, 0].mean()) / x[:, 0].std(ddof=1)
    assert stats.kstest(standard, "norm").pvalue > SIGNIFICANCE


def test_gaussian_of_constant_and_huge_columns():
    x = np.random.default_rng(7).normal(size=(50, 3)) * [1e9, 0, 1]
    x[:, 2] = x[:, 0] * 1e-9
    for stream in nulls.STREAMS:
        out = nulls.gaussian(x, 0, stream)
        assert np.isfinite(out).all()
        assert np.abs(out[:, 1]).max() < 1e-3


SAMPLERS = [
    (nulls.fixed_margin, sparse_bits()),
    (nulls.bernoulli, sparse_bits()),
    (nulls.multinomial, sparse_counts()),
    (nulls.permute_columns, sparse_counts()),
    (nulls.gaussian, np.random.default_rng(0).normal(size=(20, 4))),
]


@pytest.mark.parametrize("stream", nulls.STREAMS)
@pytest.mark.parametrize(("sampler", "x"), SAMPLERS)
def test_a_seed_fixes_the_draw_and_the_input_is_left_alone(sampler, x, stream):
    before = x.copy()
    assert_array_equal(sampler(x, 11, stream), sampler(x, 11, stream))
    assert (sampler(x, 11, stream) != sampler(x, 12, stream)).any()
    assert_array_equal(x, before)


@pytest.mark.parametrize("stream", nulls.STREAMS)
@pytest.mark.parametrize(("sampler", "x"), SAMPLERS[:4])
def test_empty_and_one_row_inputs(sampler, x, stream):
    assert sampler(x[:0], 0, stream).shape == x[:0].shape
    assert sampler(x[3:4], 0, stream).sum() == x[3:4].sum()
    assert sampler(np.zeros_like(x), 0, stream).sum() == 0


# --- published streams, call by call ----------------------------------------------------------------------------


def plain_swaps(x, seed):
    rng = np.random.default_rng(seed)
    sets = [set(np.flatnonzero(row)) for row in x]
    target = 5 * int(x.sum())
    done = attempts = 0
    while done < target and attempts < 50 * target:
        attempts += 1
        a, b = rng.choice(len(sets), size=2, replace=False)
        only_a = list(sets[a] - sets[b])
        only_b = list(sets[b] - sets[a])
        if not only_a or not only_b:
            continue
        i = rng.choice(only_a)
        j = rng.choice(only_b)
        sets[a].remove(i)
        sets[a].add(j)
        sets[b].remove(j)
        sets[b].add(i)
        done += 1
    out = np.zeros_like(x)
    for row, s in enumerate(sets):
        for j in s:
            out[row, j] = True
    return out


def plain_bernoulli(x, seed):
    return np.random.default_rng(seed).binomial(1, x.mean(axis=0), size=x.shape).astype(bool)


def plain_multinomial(x, seed):
    rng = np.random.default_rng(seed)
    p = x.sum(axis=0) / x.sum()
    return np.array([rng.multinomial(s, p) if s else np.zeros(len(p), int) for s in x.sum(axis=1)])


def plain_permutation(x, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(column) for column in x.T], axis=1)


def plain_gaussian(x, seed):
    w, v = np.linalg.eigh(np.cov(x, rowvar=False))
    t = v @ np.diag(np.sqrt(np.maximum(w, 0) + 1e-9))
    return np.random.default_rng(seed).normal(size=x.shape) @ t.T + x.mean(axis=0)


@pytest.mark.parametrize("seed", [0, 10003])
@pytest.mark.parametrize(
    ("plain", "case"),
    zip([plain_swaps, plain_bernoulli, plain_multinomial, plain_permutation, plain_gaussian], SAMPLERS, strict=True),
)
def test_published_streams_are_the_plain_calls(plain, case, seed):
    sampler, x = case
    assert_allclose(sampler(x, seed, "published"), plain(x, seed), rtol=1e-12)


def test_published_swaps_give_up_after_the_attempts_allowed():
    nested = np.tril(np.ones((5, 5), bool))  # no swap exists
    assert_array_equal(nulls.fixed_margin(nested, 0, "published"), nested)
    assert_array_equal(nulls.fixed_margin(nested, 0), nested)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "x"), SAMPLERS)
def test_unknown_streams_and_shapes_are_named(sampler, x):
    with pytest.raises(ValueError, match="stream='slow' is unknown; choose one of fast, published"):
        sampler(x, 0, "slow")
    with pytest.raises(ValueError, match=r"x has shape \[4\]; it must be \[rows, columns\]"):
        sampler(np.ones(4), 0)


def test_unsuitable_entries_are_named():
    x = np.ones((3, 3))
    x[1, 2] = 2.5
    for sampler in (nulls.fixed_margin, nulls.bernoulli):
        with pytest.raises(ValueError, match=r"x\[1, 2\] = 2.5; bits must be 0 or 1"):
            sampler(x, 0)
    with pytest.raises(ValueError, match=r"x\[1, 2\] = 2.5; counts must be whole numbers"):
        nulls.multinomial(x, 0)
    x[1, 2] = -1
    with pytest.raises(ValueError, match=r"x\[1, 2\] = -1; counts must be >= 0"):
        nulls.multinomial(x, 0)
    x[1, 2] = np.inf
    with pytest.raises(ValueError, match=r"x\[1, 2\] = inf; entries must be finite"):
        nulls.gaussian(x, 0)
    with pytest.raises(ValueError, match="x has 1 rows; a covariance needs at least 2"):
        nulls.gaussian(np.ones((1, 3)), 0)
