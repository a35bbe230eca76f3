"""Numba kernels of the sparse TopK step on CPUs: everything but the screening product itself.

Shape suffixes: B tokens, R rows of one screening chunk, D = d_in, M = d_sae, k active features, K candidates,
E entries (token, active feature).

Each kernel works on rows or features `start:stop` of numpy arrays, allocates a few rows at most, and releases the
GIL, so that a thread pool runs several at once. Sums run over one token or one feature, never over a thread's
share: the number of threads changes no bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# neither nnan nor ninf: minus infinity marks the features that may not be chosen
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
# Helpers with float sums must be inlined: called, a freshly compiled process and one that loads the cache may bind
# two differently optimised copies, whose sums differ in the last bit, and a resumed run would drift.
_inlined = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST, inline="always")

# without fastmath: results that any compiled copy gives alike, bit for bit
_strict = njit(nogil=True, cache=True, error_model="numpy")

_SIGN_SHIFT, _MAGNITUDE = np.int32(31), np.int32(0x7FFFFFFF)
_ZERO, _ONE = np.float32(0), np.float32(1)


def _float_of_bits_intrinsic(typingctx: Any, bits: Any) -> Any:
    """float32 whose pattern is the low 32 bits of an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = args[0]
        if word.type.width != 32:
            word = builder.trunc(word, ir.IntType(32))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(bits), codegen


_float_of_bits: Any = intrinsic(_float_of_bits_intrinsic)


def _bits_of_float_intrinsic(typingctx: Any, x: Any) -> Any:
    """Pattern of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


_bits_of_float: Any = intrinsic(_bits_of_float_intrinsic)


def _prefetch_intrinsic(typingctx: Any, array: Any, position: Any) -> Any:
    """Start to load the cache line of element `position` of a contiguous array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        flag = ir.IntType(32)
        hint = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")
        builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


_prefetch: Any = intrinsic(_prefetch_intrinsic)


@_kernel
def _fetch_row(W_MD, row):
    # every fourth cache line: the hardware's own prefetcher completes the stream
    width = W_MD.shape[1]
    for d in range(0, width, 64):
        _prefetch(W_MD, np.int64(row) * width + d)


# ------------------------------------------------------------------------------------ order statistics


@_kernel
def _order_keys(values, n, keys):
    """keys[:n]: integers in the order of the floats values[:n]."""
    for i in range(n):
        bits = _bits_of_float(values[i])
        keys[i] = bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE)


@_kernel
def _float_of_key(key):
    return _float_of_bits(key ^ ((key >> _SIGN_SHIFT) & _MAGNITUDE))


@_kernel
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


@_kernel
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


def _score(value, row_scale, scale, bias):
    """Screened score of one feature; compiled for the two kinds of product by `_score_of_kind`."""
    raise NotImplementedError("for compiled code only")


@overload(_score, inline="always", jit_options={"fastmath": _FAST})
def _score_of_kind(value, row_scale, scale, bias):
    if value == types.int16:

        def score(value, row_scale, scale, bias):
            # a bfloat16 is the upper half of a float32
            return _float_of_bits(np.int32(value) << np.int32(16)) + bias
    else:

        def score(value, row_scale, scale, bias):
            return np.float32(value) * scale * row_scale + bias

    return score


def group_size(features: int, K: int) -> int:
    """Features whose maximum stands for them in `screen`: large, but with several groups a candidate."""
    return next(size for size in (16, 8, 4, 1) if size == 1 or features // size >= 4 * K)


@_kernel
def screen(product_RM, row_scale_R, scale_M, bias_M, group, cand_RK, screened_RK, floor_R, start, stop):
    """The K features with the largest screened score of each row, their scores, and a bound on all others.

    product_RM: the screening product of x and W_enc · norm without bias, either bfloat16 patterns (int16; both scales
    are ignored) or int32 sums of int8 products with one scale a row and one a feature. The K-th largest of the groups'
    maxima bounds the K-th largest score from below, so that only groups whose maximum reaches it are opened. Group i
    holds features i, i + M/group, …; the features beyond a multiple of `group` are groups of one.
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
                    s0 = _score(members[g, i], r, scales[g, i], offsets[g, i])
                    s1 = _score(members[g + 1, i], r, scales[g + 1, i], offsets[g + 1, i])
                    s2 = _score(members[g + 2, i], r, scales[g + 2, i], offsets[g + 2, i])
                    s3 = _score(members[g + 3, i], r, scales[g + 3, i], offsets[g + 3, i])
                    s0 = s0 if s0 > s1 else s1
                    s2 = s2 if s2 > s3 else s3
                    s0 = s0 if s0 > s2 else s2
                    best[i] = s0 if s0 > best[i] else best[i]
        else:
            for i in range(groups):
                best[i] = _score(members[0, i], r, scales[0, i], offsets[0, i])
        for j in range(grouped, features):
            best[groups + j - grouped] = _score(product[j], r, scale_M[j], bias_M[j])
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
                    score = _score(product[j], r, scale_M[j], bias_M[j])
                    index[n] = j
                    value[n] = score
                    n += score >= bound
            else:
                j = grouped + head - groups
                index[n] = j
                value[n] = _score(product[j], r, scale_M[j], bias_M[j])
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


@_kernel
def rescore(
    xc_BD, W_enc, b_enc, norm_M, cand_BK, screened_BK, floor_B, certificate, relu, idx_Bk, h_Bk, close_B, start, stop
):
    """Float32 scores of the candidates; the k largest a·n give idx and h = a (relu(a) with `relu`).

    close_B marks rows where the k-th score lies within `certificate` root-mean-square screening errors of the row
    above floor_B, the bound on the features left out: there the screen may have missed one.
    """
    width, K, k = xc_BD.shape[1], cand_BK.shape[1], idx_Bk.shape[1]
    a = np.empty(K, np.float32)
    scores = np.empty(K, np.float32)
    keys = np.empty(K, np.int32)
    positions = np.empty(k, np.int32)
    fours = K - K % 4
    for row in range(start, stop):
        for q in range(0, fours, 4):
            for z in range(q + 4, min(q + 8, K)):
                _fetch_row(W_enc, cand_BK[row, z])
            j0, j1, j2, j3 = cand_BK[row, q], cand_BK[row, q + 1], cand_BK[row, q + 2], cand_BK[row, q + 3]
            d0 = d1 = d2 = d3 = _ZERO
            for d in range(width):
                x = xc_BD[row, d]
                d0 += x * W_enc[j0, d]
                d1 += x * W_enc[j1, d]
                d2 += x * W_enc[j2, d]
                d3 += x * W_enc[j3, d]
            a[q], a[q + 1], a[q + 2], a[q + 3] = d0, d1, d2, d3
        for q in range(fours, K):
            j0 = cand_BK[row, q]
            d0 = _ZERO
            for d in range(width):
                d0 += xc_BD[row, d] * W_enc[j0, d]
            a[q] = d0
        error = _ZERO
        for q in range(K):
            j = cand_BK[row, q]
            a[q] += b_enc[j]
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


# ------------------------------------------------------------------------------------ gradients


@_kernel
def residual(target_BD, base_D, W_dec, idx_Bk, h_Bk, scale, g_BD, error_B, start, stop):
    """g = scale · (base + Σ_q h_q W_dec[idx_q] − target) and the unscaled squared error of each row."""
    width, k = target_BD.shape[1], idx_Bk.shape[1]
    fours = k - k % 4
    for row in range(start, stop):
        for d in range(width):
            g_BD[row, d] = base_D[d] - target_BD[row, d]
        for q in range(0, fours, 4):
            for z in range(q + 4, min(q + 8, k)):
                _fetch_row(W_dec, idx_Bk[row, z])
            j0, j1, j2, j3 = idx_Bk[row, q], idx_Bk[row, q + 1], idx_Bk[row, q + 2], idx_Bk[row, q + 3]
            h0, h1, h2, h3 = h_Bk[row, q], h_Bk[row, q + 1], h_Bk[row, q + 2], h_Bk[row, q + 3]
            for d in range(width):
                g_BD[row, d] += h0 * W_dec[j0, d] + h1 * W_dec[j1, d] + h2 * W_dec[j2, d] + h3 * W_dec[j3, d]
        for q in range(fours, k):
            j0, h0 = idx_Bk[row, q], h_Bk[row, q]
            for d in range(width):
                g_BD[row, d] += h0 * W_dec[j0, d]
        error = _ZERO
        for d in range(width):
            error += g_BD[row, d] * g_BD[row, d]
            g_BD[row, d] *= scale
        error_B[row] = error


@_kernel
def sort_entries(idx_Bk, h_Bk, starts_M1, token_E, value_E):
    """Counting sort of the entries by feature: feature j owns starts[j]:starts[j + 1], its tokens ascending."""
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
            value_E[place[j]] = h_Bk[row, q]
            place[j] += 1


@_inlined
def _add_feature(w_D, start, stop, token_E, value_E, relu, g_BD, xc_BD, dec_D, enc_D):
    """Add the entries of one feature to its gradients: dec += Σ h g, enc += Σ dh xc; returns Σ dh.

    dh = g · w, and zero where relu cut h off.
    """
    width = w_D.shape[0]
    total = _ZERO
    fours = stop - (stop - start) % 4
    for e in range(start, fours, 4):
        for z in range(e + 4, min(e + 8, stop)):
            _fetch_row(g_BD, token_E[z])
            _fetch_row(xc_BD, token_E[z])
        t0, t1, t2, t3 = token_E[e], token_E[e + 1], token_E[e + 2], token_E[e + 3]
        h0, h1, h2, h3 = value_E[e], value_E[e + 1], value_E[e + 2], value_E[e + 3]
        d0 = d1 = d2 = d3 = _ZERO
        for d in range(width):
            w = w_D[d]
            d0 += w * g_BD[t0, d]
            d1 += w * g_BD[t1, d]
            d2 += w * g_BD[t2, d]
            d3 += w * g_BD[t3, d]
        if relu:
            d0 = d0 if h0 > _ZERO else _ZERO
            d1 = d1 if h1 > _ZERO else _ZERO
            d2 = d2 if h2 > _ZERO else _ZERO
            d3 = d3 if h3 > _ZERO else _ZERO
        total += (d0 + d1) + (d2 + d3)
        for d in range(width):
            dec_D[d] += h0 * g_BD[t0, d] + h1 * g_BD[t1, d] + h2 * g_BD[t2, d] + h3 * g_BD[t3, d]
        for d in range(width):
            enc_D[d] += d0 * xc_BD[t0, d] + d1 * xc_BD[t1, d] + d2 * xc_BD[t2, d] + d3 * xc_BD[t3, d]
    for e in range(fours, stop):
        t0, h0 = token_E[e], value_E[e]
        d0 = _ZERO
        for d in range(width):
            d0 += w_D[d] * g_BD[t0, d]
        if relu and not h0 > _ZERO:
            d0 = _ZERO
        total += d0
        for d in range(width):
            dec_D[d] += h0 * g_BD[t0, d]
        for d in range(width):
            enc_D[d] += d0 * xc_BD[t0, d]
    return total


@_kernel
def feature_gradients(
    W_dec, xc_BD, g_BD, starts_M1, token_E, value_E, g_aux_BD, aux_starts_M1, aux_token_E, aux_value_E,
    grad_dec, grad_enc, grad_b, touched_M, fired_M, square_M, start, stop,
):  # fmt: skip
    """Gradients of W_dec, W_enc and b_enc for features start:stop, their squared length, and which fired.

    The main entries come with relu, the auxiliary ones (none: empty starts) without. Features without entries are
    marked untouched and their gradient rows are left as they are: Adam reads them as zero.
    """
    has_aux = aux_starts_M1.shape[0] > 0
    for j in range(start, stop):
        first, last = starts_M1[j], starts_M1[j + 1]
        aux_first = aux_starts_M1[j] if has_aux else 0
        aux_last = aux_starts_M1[j + 1] if has_aux else 0
        touched = last > first or aux_last > aux_first
        touched_M[j] = touched
        fired = False
        for e in range(first, last):
            fired = fired or value_E[e] > _ZERO
        fired_M[j] = fired
        grad_b[j] = _ZERO
        square_M[j] = 0.0
        if not touched:
            continue
        dec, enc = grad_dec[j], grad_enc[j]
        dec[:] = _ZERO
        enc[:] = _ZERO
        bias = _add_feature(W_dec[j], first, last, token_E, value_E, True, g_BD, xc_BD, dec, enc)
        if aux_last > aux_first:
            bias += _add_feature(
                W_dec[j], aux_first, aux_last, aux_token_E, aux_value_E, False, g_aux_BD, xc_BD, dec, enc
            )
        grad_b[j] = bias
        square = bias * bias
        for d in range(dec.shape[0]):
            square += dec[d] * dec[d] + enc[d] * enc[d]
        square_M[j] = square


# ------------------------------------------------------------------------------------ Adam


@_inlined
def _adam(w, m, v, grad, beta1, beta2, rate, correction, eps):
    m = beta1 * m + (_ONE - beta1) * grad
    v = beta2 * v + (_ONE - beta2) * grad * grad
    return w - rate * m / (np.sqrt(v) * correction + eps), m, v


@_kernel
def adam_vector(w, m, v, grad, clip, beta1, beta2, rate, correction, eps):
    """Adam of one vector in place: gradient clip·grad, rate = lr / (1 − β1ᵗ), correction = 1 / √(1 − β2ᵗ)."""
    for i in range(w.shape[0]):
        w[i], m[i], v[i] = _adam(w[i], m[i], v[i], clip * grad[i], beta1, beta2, rate, correction, eps)


@_kernel
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
        bits = _bits_of_float(row[d] * factor)
        odd = (bits >> np.int32(16)) & np.int32(1)
        low[d] = np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))
    return _ONE


@_strict
def _to_int8(row, factor, low):
    # magnitudes of floats are ordered like their patterns, and an integer maximum vectorises without fastmath
    largest = np.int32(0)
    for d in range(row.shape[0]):
        largest = max(largest, np.int32(_bits_of_float(row[d]) & _MAGNITUDE))
    top = _float_of_bits(largest)
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
    return lambda row, factor, low: _to_int8(row, factor, low)


@_kernel
def write_screen(rows_ND, factor_N, low_ND, scale_N, start, stop):
    """Rows start:stop of rows · factor in low precision: bfloat16 patterns rounded to even, or int8 with a scale."""
    for n in range(start, stop):
        scale_N[n] = _lower(rows_ND[n], factor_N[n], low_ND[n])
