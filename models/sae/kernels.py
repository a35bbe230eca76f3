"""Numba kernels of the sparse TopK step on CPUs: everything but the screening product itself.

Shape suffixes: B tokens, R rows of one screening chunk, D = d_in, M = d_sae, k active features, K candidates,
E entries (token, active feature), Cb blocks of b = BLOCK columns (`CBb`: block c of all tokens is contiguous).

Each kernel works on rows or features `start:stop` of numpy arrays, allocates a few rows at most, and releases the
GIL, so that a thread pool runs several at once. Sums run over one token or one feature, never over a thread's
share: the number of threads changes no bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from models.sae.intrinsics import BLOCK, add_weighted, bits_of_float, block_dots, float_of_bits, prefetch, weighted_sum

# neither nnan nor ninf: minus infinity marks features that must not be chosen
FAST = {"contract", "reassoc", "nsz", "arcp"}
kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
# Helpers with float sums must be inlined: called, a freshly compiled process and one that loads the cache may bind
# two differently optimised copies, whose sums differ in the last bit, and a resumed run would drift.
_inlined = njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST, inline="always")

# without fastmath: every compiled copy gives the same results, bit for bit
_strict = njit(nogil=True, cache=True, error_model="numpy")

_SIGN_SHIFT, _MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
SPAN_LIMIT, SPAN = 12, 8  # entries per feature; blocks
_ZERO, _ONE = np.float32(0), np.float32(1)
_AHEAD = 32  # features whose weights are prefetched


# ------------------------------------------------------------------------------------ order statistics


@kernel
def _order_keys(values, n, keys):
    """keys[:n]: integers in the order of the floats values[:n]."""
    for i in range(n):
        bits = bits_of_float(values[i])
        keys[i] = bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE)


@kernel
def _float_of_key(key):
    return float_of_bits(key ^ ((key >> _SIGN_SHIFT) & _MAGNITUDE))


@kernel
def _threshold(keys, n, k):
    """A t with at least k of keys[:n] ≥ t, and exactly k unless keys tie at t.

    Halves the interval of integers, one vector sweep of counting a time, until the count is k.
    """
    low, high = np.int64(keys[0]), np.int64(keys[0])
    for i in range(n):
        low = min(low, np.int64(keys[i]))
        high = max(high, np.int64(keys[i]))
    high += 1
    while high - low > 1:
        middle = np.int32((low + high) >> 1)
        count = np.int32(0)
        for i in range(n):
            count = np.int32(count + np.int32(keys[i] >= middle))
        if count == k:
            return middle
        if count > k:
            low = np.int64(middle)
        else:
            high = np.int64(middle)
    return np.int32(low)


@kernel
def _positions_of_largest(keys, n, k, positions):
    """positions[:k] of the k largest of keys[:n], ascending; of equal keys the first. Returns the threshold."""
    t = _threshold(keys, n, k)
    above = np.int64(0)
    for i in range(n):
        above += keys[i] > t
    ties = k - above
    found = np.int64(0)
    for i in range(n):
        if keys[i] > t:
            positions[found] = i
            found += 1
        elif keys[i] == t and ties > 0:
            positions[found] = i
            found += 1
            ties -= 1
    return t


# ------------------------------------------------------------------------------------ selection


def screened_score(value, row_scale, scale, bias):
    """Screened score of one feature; compiled for the two kinds of product by `_score_of_kind`."""
    raise NotImplementedError("for compiled code only")


@overload(screened_score, inline="always", jit_options={"fastmath": FAST})
def _score_of_kind(value, row_scale, scale, bias):
    if value == types.int16:

        def score(value, row_scale, scale, bias):
            # a bfloat16 is the upper half of a float32
            return float_of_bits(np.int32(value) << np.int32(16)) + bias
    else:

        def score(value, row_scale, scale, bias):
            return np.float32(value) * scale * row_scale + bias

    return score


def group_size(features: int, K: int) -> int:
    """Features whose maximum stands for them in `screen`: large, but with several groups a candidate."""
    return next(size for size in (16, 8, 4, 1) if size == 1 or features // size >= 4 * K)


@kernel
def screen(product_RM, row_scale_R, scale_M, bias_M, group, cand_RK, screened_RK, floor_R, start, stop):
    """The K features with the largest screened score of each row, their scores, and a bound on all others.

    product_RM: the screening product of x and W_enc · norm without bias, either bfloat16 patterns (int16; both scales
    are ignored) or int32 sums of int8 products with one scale per row and per feature (float32: scales of one). The
    K-th largest of the groups' maxima bounds the K-th largest score from below, so that only groups whose maximum
    reaches it are opened. Group i holds features i, i + M/group, …; the features beyond a multiple of `group` are
    groups of one.
    """
    features, K = product_RM.shape[1], cand_RK.shape[1]
    groups = features // group
    grouped = groups * group
    heads = groups + features - grouped
    best = np.empty(heads, np.float32)
    keys = np.empty(features, np.int32)
    opened = np.empty(heads + 1, np.int32)
    index = np.empty(features + 1, np.int32)
    value = np.empty(features + 1, np.float32)
    positions = np.empty(K, np.int32)
    offsets = bias_M[:grouped].reshape(group, groups)
    scales = scale_M[:grouped].reshape(group, groups)
    for row in range(start, stop):
        product, r = product_RM[row], row_scale_R[row]
        # two-dimensional views: only plain loop variables as indices let LLVM drop the sign checks and vectorise
        members = product[:grouped].reshape(group, groups)
        if group >= 4:
            best[:groups] = -np.inf
            for g in range(0, group - 3, 4):
                for i in range(groups):
                    s0 = screened_score(members[g, i], r, scales[g, i], offsets[g, i])
                    s1 = screened_score(members[g + 1, i], r, scales[g + 1, i], offsets[g + 1, i])
                    s2 = screened_score(members[g + 2, i], r, scales[g + 2, i], offsets[g + 2, i])
                    s3 = screened_score(members[g + 3, i], r, scales[g + 3, i], offsets[g + 3, i])
                    s0 = s0 if s0 > s1 else s1
                    s2 = s2 if s2 > s3 else s3
                    s0 = s0 if s0 > s2 else s2
                    best[i] = s0 if s0 > best[i] else best[i]
        else:
            for i in range(groups):
                best[i] = screened_score(members[0, i], r, scales[0, i], offsets[0, i])
        for j in range(grouped, features):
            best[groups + j - grouped] = screened_score(product[j], r, scale_M[j], bias_M[j])
        _order_keys(best, heads, keys)
        t = _threshold(keys, heads, K)
        bound = _float_of_key(t)
        n_open = np.int64(0)
        for i in range(heads):
            opened[n_open] = i
            n_open += keys[i] >= t
        n = np.int64(0)
        for o in range(n_open):
            head = np.int64(opened[o])
            if head < groups:
                for j in range(head, grouped, groups):
                    score = screened_score(product[j], r, scale_M[j], bias_M[j])
                    index[n] = j
                    value[n] = score
                    n += score >= bound
            else:
                j = grouped + head - groups
                index[n] = j
                value[n] = screened_score(product[j], r, scale_M[j], bias_M[j])
                n += 1
        if n > K:
            _order_keys(value, n, keys)
            bound = _float_of_key(_positions_of_largest(keys, n, K, positions))
            for q in range(K):
                cand_RK[row, q] = index[positions[q]]
                screened_RK[row, q] = value[positions[q]]
        else:
            for q in range(K):
                cand_RK[row, q] = index[q]
                screened_RK[row, q] = value[q]
        floor_R[row] = bound


@kernel
def rescore(
    a_E, slot_BK, b_enc, norm_M, cand_BK, screened_BK, floor_B, certificate, relu, idx_Bk, h_Bk, close_B, start, stop
):
    """The k largest a·n of the candidates give idx and h = a (relu(a) with `relu`).

    a_E[slot_BK]: float32 dot products of x − b_dec and the candidates' rows. close_B marks rows where the k-th score
    lies within `certificate` root-mean-square screening errors of the row above floor_B, the bound on the features
    left out: there the screen may have missed one.
    """
    K, k = cand_BK.shape[1], idx_Bk.shape[1]
    a = np.empty(K, np.float32)
    scores = np.empty(K, np.float32)
    keys = np.empty(K, np.int32)
    positions = np.empty(k, np.int32)
    for row in range(start, stop):
        error = _ZERO
        for q in range(K):
            j = cand_BK[row, q]
            a[q] = a_E[slot_BK[row, q]] + b_enc[j]
            scores[q] = a[q] * norm_M[j]
            miss = scores[q] - screened_BK[row, q]
            error += miss * miss
        _order_keys(scores, K, keys)
        _positions_of_largest(keys, K, k, positions)
        least = np.float32(np.inf)
        for q in range(k):
            p = positions[q]
            idx_Bk[row, q] = cand_BK[row, p]
            h_Bk[row, q] = a[p] if a[p] > _ZERO or not relu else _ZERO
            least = scores[p] if scores[p] < least else least
        close_B[row] = least - floor_B[row] < certificate * np.sqrt(error / np.float32(K))


# ------------------------------------------------------------------------------------ entries, feature by feature


def block_span(entries: int, features: int) -> int:
    """Blocks of columns that a kernel takes at once, without any effect on the result.

    With many entries a feature, one: its rows stay in the second-level cache. With few, the weights are the larger
    traffic, and they are read in longer pieces.
    """
    return 1 if entries >= SPAN_LIMIT * features else SPAN


@kernel
def write_blocks(rows_ND, blocks_CNb, start, stop):
    """Columns of rows start:stop in blocks: blocks[c, n, i] = rows[n, BLOCK·c + i], and zero beyond D."""
    width = rows_ND.shape[1]
    for n in range(start, stop):
        for c in range(blocks_CNb.shape[0]):
            _copy_columns(rows_ND, n, c, width, blocks_CNb[c, n])


@kernel
def _copy_columns(rows_ND, n, c, width, block_b):
    first = c * BLOCK
    if first + BLOCK <= width:
        for i in range(BLOCK):
            block_b[i] = rows_ND[n, first + i]
    else:
        for i in range(BLOCK):
            block_b[i] = rows_ND[n, first + i] if first + i < width else _ZERO


@kernel
def _fetch_columns(rows_MD, j, c):
    first = j * rows_MD.shape[1] + c * BLOCK
    prefetch(rows_MD, first)
    prefetch(rows_MD, min(first + 16, rows_MD.size - 1))


@kernel
def sort_entries(idx_Bk, starts_M1, token_E, slot_Bk):
    """Counting sort of the entries by feature: feature j owns starts[j]:starts[j + 1], its tokens ascending.

    slot_Bk says where each entry went.
    """
    rows, k = idx_Bk.shape
    features = starts_M1.shape[0] - 1
    starts_M1[:] = 0
    for row in range(rows):
        for q in range(k):
            starts_M1[idx_Bk[row, q] + 1] += 1
    for j in range(features):
        starts_M1[j + 1] += starts_M1[j]
    place = starts_M1[:features].copy()
    for row in range(rows):
        for q in range(k):
            j = idx_Bk[row, q]
            token_E[place[j]] = row
            slot_Bk[row, q] = place[j]
            place[j] += 1


@kernel
def sort_values(value_Bk, slot_Bk, value_E):
    """value_E[slot] = value."""
    rows, k = value_Bk.shape
    for row in range(rows):
        for q in range(k):
            value_E[slot_Bk[row, q]] = value_Bk[row, q]


@kernel
def feature_dots(rows_CBb, W_MD, starts_M1, token_E, dot_E, span, start, stop):
    """dot_E[e] = W[j] · rows[token_E[e]] for the entries of features j in start:stop (`span`: see `block_span`)."""
    blocks, rows, _ = rows_CBb.shape
    features, width = W_MD.shape
    w_b = np.empty(BLOCK, np.float32)
    dot_E[starts_M1[start] : starts_M1[stop]] = _ZERO
    for left in range(0, blocks, span):
        for j in range(start, stop):
            first, last = starts_M1[j], starts_M1[j + 1]
            for c in range(left, min(left + span, blocks)):
                _fetch_columns(W_MD, min(j + _AHEAD, features - 1), c)
                if last > first:
                    _copy_columns(W_MD, j, c, width, w_b)
                    block_dots(rows_CBb, c * rows * BLOCK, token_E, first, last, w_b, 0, dot_E)


@kernel
def decode(W_MD, starts_M1, token_E, value_E, out_CBb, low, high, span, start, stop):
    """out[token] = Σ value · W[j] over the entries of features low:high, ascending in j, for the blocks start:stop of
    columns; added to what is there when low > 0."""
    rows = out_CBb.shape[1]
    features, width = W_MD.shape
    w_b = np.empty(BLOCK, np.float32)
    if low == 0:
        out_CBb[start:stop] = _ZERO
    for left in range(start, stop, span):
        for j in range(low, high):
            first, last = starts_M1[j], starts_M1[j + 1]
            for c in range(left, min(left + span, stop)):
                _fetch_columns(W_MD, min(j + _AHEAD, features - 1), c)
                if last > first:
                    _copy_columns(W_MD, j, c, width, w_b)
                    add_weighted(out_CBb, c * rows * BLOCK, token_E, value_E, first, last, w_b)


@kernel
def residual(target_CBb, base_CIb, scale, g_CBb, error_B, start, stop):
    """g = scale · (base + g − target), where g holds what was decoded, and the unscaled squared error of each row."""
    blocks = g_CBb.shape[0]
    error_B[start:stop] = _ZERO
    for c in range(blocks):
        base_b = base_CIb[c, 0]
        for row in range(start, stop):
            error = _ZERO
            for i in range(BLOCK):
                miss = g_CBb[c, row, i] + (base_b[i] - target_CBb[c, row, i])
                error += miss * miss
                g_CBb[c, row, i] = miss * scale
            error_B[row] += error


@kernel
def feature_sums(
    rows_CBb, starts_M1, token_E, value_E, aux_rows_CBb, aux_starts_M1, aux_token_E, aux_value_E,
    sum_MD, square_M, span, start, stop,
):  # fmt: skip
    """sum[j] = Σ value · rows[token] over the entries and the auxiliary ones (none: empty starts) of features
    start:stop; its squared length is added to square_M. Features without any entry are left as they are.
    """
    blocks, rows, _ = rows_CBb.shape
    width = sum_MD.shape[1]
    has_aux = aux_starts_M1.shape[0] > 0
    total_b = np.empty(BLOCK, np.float32)
    aux_b = np.zeros(BLOCK, np.float32)
    for left in range(0, blocks, span):
        for j in range(start, stop):
            first, last = starts_M1[j], starts_M1[j + 1]
            aux_first = aux_starts_M1[j] if has_aux else 0
            aux_last = aux_starts_M1[j + 1] if has_aux else 0
            for c in range(left, min(left + span, blocks)):
                _fetch_columns(sum_MD, min(j + _AHEAD, stop - 1), c)
                if last == first and aux_last == aux_first:
                    continue
                weighted_sum(rows_CBb, c * rows * BLOCK, token_E, value_E, first, last, total_b)
                if aux_last > aux_first:
                    weighted_sum(aux_rows_CBb, c * rows * BLOCK, aux_token_E, aux_value_E, aux_first, aux_last, aux_b)
                    for i in range(BLOCK):
                        total_b[i] += aux_b[i]
                square = _ZERO
                for i in range(BLOCK):
                    square += total_b[i] * total_b[i]
                square_M[j] += square
                for i in range(min(BLOCK, width - c * BLOCK)):
                    sum_MD[j, c * BLOCK + i] = total_b[i]


@kernel
def settle_entries(
    starts_M1, value_E, slope_E, aux_starts_M1, aux_slope_E, grad_b, touched_M, fired_M, square_M, start, stop
):
    """Relu's derivative into slope_E = ∂L/∂a, its sums into grad_b, and which features of start:stop fired.

    The auxiliary entries (none: empty starts) have no relu. A feature without entries is marked untouched: Adam reads
    its gradient, which nobody writes, as zero. square_M starts as grad_b².
    """
    has_aux = aux_starts_M1.shape[0] > 0
    for j in range(start, stop):
        first, last = starts_M1[j], starts_M1[j + 1]
        aux_first = aux_starts_M1[j] if has_aux else 0
        aux_last = aux_starts_M1[j + 1] if has_aux else 0
        total = _ZERO
        fired = False
        for e in range(first, last):
            if value_E[e] > _ZERO:
                fired = True
            else:
                slope_E[e] = _ZERO
            total += slope_E[e]
        for e in range(aux_first, aux_last):
            total += aux_slope_E[e]
        touched_M[j] = last > first or aux_last > aux_first
        fired_M[j] = fired
        grad_b[j] = total
        square_M[j] = total * total


# ------------------------------------------------------------------------------------ Adam


@_inlined
def _adam(w, m, v, grad, beta1, beta2, rate, correction, eps):
    m = beta1 * m + (_ONE - beta1) * grad
    v = beta2 * v + (_ONE - beta2) * grad * grad
    return w - rate * m / (np.sqrt(v) * correction + eps), m, v


@kernel
def adam_vector(w, m, v, grad, clip, beta1, beta2, rate, correction, eps):
    """Adam of one vector in place: gradient clip·grad, rate = lr / (1 − β1ᵗ), correction = 1 / √(1 − β2ᵗ)."""
    for i in range(w.shape[0]):
        w[i], m[i], v[i] = _adam(w[i], m[i], v[i], clip * grad[i], beta1, beta2, rate, correction, eps)


@kernel
def adam_features(
    W_enc, m_enc, v_enc, grad_enc, W_dec, m_dec, v_dec, grad_dec, touched_M, rescale, norm_M, screen_MD, scale_M,
    clip, beta1, beta2, rate, correction, eps, start, stop,
):  # fmt: skip
    """Adam of features start:stop of W_enc and W_dec, then what the next screen needs while they are in cache.

    norm = ‖W_dec[j]‖ (1 unless `rescale`); screen and scale as in `write_screen`.
    """
    width = W_enc.shape[1]
    for j in range(start, stop):
        w, m, v, grad = W_dec[j], m_dec[j], v_dec[j], grad_dec[j]
        square = _ZERO
        if touched_M[j]:
            for d in range(width):
                p, m[d], v[d] = _adam(w[d], m[d], v[d], clip * grad[d], beta1, beta2, rate, correction, eps)
                w[d] = p
                square += p * p
        else:
            for d in range(width):
                p, m[d], v[d] = _adam(w[d], m[d], v[d], _ZERO, beta1, beta2, rate, correction, eps)
                w[d] = p
                square += p * p
        norm_M[j] = np.sqrt(square) if rescale else _ONE
        w, m, v, grad = W_enc[j], m_enc[j], v_enc[j], grad_enc[j]
        if touched_M[j]:
            for d in range(width):
                w[d], m[d], v[d] = _adam(w[d], m[d], v[d], clip * grad[d], beta1, beta2, rate, correction, eps)
        else:
            for d in range(width):
                w[d], m[d], v[d] = _adam(w[d], m[d], v[d], _ZERO, beta1, beta2, rate, correction, eps)
        scale_M[j] = _lower(w, norm_M[j], screen_MD[j])


# ------------------------------------------------------------------------------------ low precision


def _lower(row, factor, low):
    """Write row · factor to `low` in its precision and return the scale; compiled by `_lower_of_kind`."""
    raise NotImplementedError("for compiled code only")


@_strict
def _to_bfloat16(row, factor, low):
    for d in range(row.shape[0]):
        bits = bits_of_float(row[d] * factor)
        odd = (bits >> np.int32(16)) & np.int32(1)
        low[d] = np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))
    return _ONE


@_strict
def _to_float32(row, factor, low):
    for d in range(row.shape[0]):
        low[d] = row[d] * factor
    return _ONE


@_strict
def _to_int8(row, factor, low):
    # magnitudes of floats are ordered like their patterns, and an integer maximum vectorises without fastmath
    largest = np.int32(0)
    for d in range(row.shape[0]):
        largest = max(largest, np.int32(bits_of_float(row[d]) & _MAGNITUDE))
    top = float_of_bits(largest)
    if top == _ZERO:
        low[:] = np.int8(0)
        return _ZERO
    step = np.float32(127) / top
    for d in range(row.shape[0]):
        low[d] = np.int8(np.rint(row[d] * step))
    return top * factor / np.float32(127)


@overload(_lower)
def _lower_of_kind(row, factor, low):
    if low.dtype == types.int16:
        return lambda row, factor, low: _to_bfloat16(row, factor, low)
    if low.dtype == types.float32:
        return lambda row, factor, low: _to_float32(row, factor, low)
    return lambda row, factor, low: _to_int8(row, factor, low)


@kernel
def write_screen(rows_ND, factor_N, low_ND, scale_N, start, stop):
    """Rows start:stop of rows · factor in low precision: bfloat16 patterns rounded to even, or int8 with a scale (or
    as they are, in float32)."""
    for n in range(start, stop):
        scale_N[n] = _lower(rows_ND[n], factor_N[n], low_ND[n])
