"""One token of a block in one compiled call: what would be a dozen small tensor operations runs in a core's cache.

The kernels compute what the layers' `step` methods compute, in float32; weights come packed (`products`). Rows
of activations are padded to multiples of 16, and the padding stays zero. `x_BD` is the residual stream, which a block
adds to. Every sum runs over one sample in a fixed order.

Shapes: B batch, D model width, F hidden width of the MLP, N outputs of a projection, H heads, h key/value heads,
K key width, V value width, E width of an attention head, P positions, C convolved channels, W taps.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from models.codec.compiled.products import partial_product, product
from models.cpu.float32 import exp32

# The same seed must give the same sample in any process. Sums are not reordered, and helpers with floats are inlined:
# of a function that is called, a process that compiles and one that loads the cache may bind different copies, which
# need not fuse the same multiplications and additions.
_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
_inlined = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"}, inline="always")
_exp = njit(nogil=True, error_model="numpy", fastmath={"contract"}, inline="always")(exp32.py_func)

_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST = np.float32(1e-12)  # torch's floor of a norm to divide by
_SOFTPLUS_LINEAR = np.float32(20)


@_inlined
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@_inlined
def _softplus(x):
    return x if x > _SOFTPLUS_LINEAR else np.log1p(np.exp(x))


@_inlined
def _square_sum(row):
    total = _ZERO
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    return total


@_inlined
def _scaled(row, factor, out):
    for i in range(row.shape[0]):
        out[i] = row[i] * factor


@_inlined
def _rms_norm(x_BD, weight_D, eps, out_BD):
    width = weight_D.shape[0]
    for b in range(x_BD.shape[0]):
        row, out = x_BD[b, :width], out_BD[b, :width]
        factor = _ONE / np.sqrt(_square_sum(row) / np.float32(width) + eps)
        for i in range(width):
            out[i] = row[i] * factor * weight_D[i]


@_inlined
def _add_rows(x_BD, y_BN, width):
    for b in range(x_BD.shape[0]):
        row, y = x_BD[b], y_BN[b]
        for i in range(width):
            row[i] += y[i]


@_kernel
def embed(table_KVD, tokens_BK, x_BD):
    """x = sum over codebooks of the tokens' embeddings."""
    width = table_KVD.shape[2]
    for b in range(tokens_BK.shape[0]):
        row = x_BD[b, :width]
        row[:] = _ZERO
        for k in range(tokens_BK.shape[1]):
            entry = table_KVD[k, tokens_BK[b, k]]
            for i in range(width):
                row[i] += entry[i]


@_kernel
def head_logits(x_BD, norm_D, eps, w_heads, normed_BD, out_BN):
    """out = W_heads norm(x)."""
    _rms_norm(x_BD, norm_D, eps, normed_BD)
    product(w_heads, normed_BD, out_BN)


@_kernel
def swiglu_block(x_BD, norm_D, eps, w_gate_up, w_down, normed_BD, hidden_BN, gated_BF):
    """x += W_down (silu(W_gate norm(x)) * W_up norm(x)); the gate is the first half of hidden's columns."""
    width = gated_BF.shape[1]
    _rms_norm(x_BD, norm_D, eps, normed_BD)
    product(w_gate_up, normed_BD, hidden_BN)
    for b in range(x_BD.shape[0]):
        gate, up, out = hidden_BN[b, :width], hidden_BN[b, width:], gated_BF[b]
        for i in range(width):
            out[i] = gate[i] * _sigmoid(gate[i]) * up[i]
    product(w_down, gated_BF, hidden_BN)
    _add_rows(x_BD, hidden_BN, norm_D.shape[0])


@_inlined
def _convolve(row_C, taps_WC, past_WC, out_C):
    """out = silu of the causal depthwise convolution; the past moves on by one token."""
    channels, last = taps_WC.shape[1], taps_WC.shape[0] - 1
    taps = taps_WC[last]
    for c in range(channels):
        out_C[c] = row_C[c] * taps[c]
    for w in range(last):
        taps, past = taps_WC[w], past_WC[w]
        for c in range(channels):
            out_C[c] += past[c] * taps[c]
    for w in range(last):
        past = past_WC[w]
        newer = past_WC[w + 1] if w + 1 < last else row_C
        for c in range(channels):
            past[c] = newer[c]
    for c in range(channels):
        out_C[c] *= _sigmoid(out_C[c])


@_inlined
def _delta_rule(q_K, k_K, v_V, decay, beta, memory_KV, out_V, error_V):
    """S <- decay S + k (beta (v - decay k S)), out = q S, in two passes over the memory."""
    keys, values = q_K.shape[0], v_V.shape[0]
    for j in range(values):
        error_V[j] = _ZERO
        out_V[j] = _ZERO
    overlap = _ZERO
    for i in range(keys):
        row, k, q = memory_KV[i], k_K[i], q_K[i]
        overlap += k * q
        for j in range(values):
            error_V[j] += k * row[j]
            out_V[j] += q * row[j]
    for j in range(values):
        error_V[j] = beta * (v_V[j] - decay * error_V[j])
        out_V[j] = decay * out_V[j] + overlap * error_V[j]
    for i in range(keys):
        row, k = memory_KV[i], k_K[i]
        for j in range(values):
            row[j] = decay * row[j] + k * error_V[j]


@_kernel
def gated_delta_block(
    x_BD, norm_D, eps, w_in, taps_WC, decay_rate_H, dt_bias_H, head_norm_V, w_out, past_BWC, memory_BHKV,
    normed_BD, projected_BN, convolved_C, gated_BN, error_V,
):  # fmt: skip
    """x += GatedDeltaNet(norm(x)). The projection's columns: q, k, v | gate | a, b, each part padded.

    decay_rate = exp(A_log). past and memory move on by one token; the other arrays are scratch.
    """
    heads, key_width, value_width = memory_BHKV.shape[1:]
    keys, values, channels = heads * key_width, heads * value_width, taps_WC.shape[1]
    gate_at = (channels + 15) // 16 * 16
    a_at = gate_at + (values + 15) // 16 * 16
    scale = _ONE / np.sqrt(np.float32(key_width))
    _rms_norm(x_BD, norm_D, eps, normed_BD)
    product(w_in, normed_BD, projected_BN)
    for b in range(x_BD.shape[0]):
        projected = projected_BN[b]
        _convolve(projected, taps_WC, past_BWC[b], convolved_C)
        for h in range(heads):
            q = convolved_C[h * key_width : (h + 1) * key_width]
            k = convolved_C[keys + h * key_width : keys + (h + 1) * key_width]
            v = convolved_C[2 * keys + h * value_width : 2 * keys + (h + 1) * value_width]
            out = gated_BN[b, h * value_width : (h + 1) * value_width]
            _scaled(q, scale / max(np.sqrt(_square_sum(q)), _SMALLEST), q)
            _scaled(k, _ONE / max(np.sqrt(_square_sum(k)), _SMALLEST), k)
            decay = np.exp(-decay_rate_H[h] * _softplus(projected[a_at + h] + dt_bias_H[h]))
            beta = np.float32(2) * _sigmoid(projected[a_at + heads + h])
            _delta_rule(q, k, v, decay, beta, memory_BHKV[b, h], out, error_V)
            gate = projected[gate_at + h * value_width : gate_at + (h + 1) * value_width]
            factor = _ONE / np.sqrt(_square_sum(out) / np.float32(value_width) + eps)
            for j in range(value_width):
                out[j] = out[j] * factor * head_norm_V[j] * (gate[j] * _sigmoid(gate[j]))
    product(w_out, gated_BN, projected_BN)
    _add_rows(x_BD, projected_BN, norm_D.shape[0])


@_inlined
def _normed_and_rotated(x_E, weight_E, eps, cos, sin, scale, out_E):
    """out = scale · rotate(norm(x)), pairs (i, i + E/2)."""
    half = cos.shape[0]
    factor = scale / np.sqrt(_square_sum(x_E) / np.float32(2 * half) + eps)
    for i in range(half):
        first, second = x_E[i] * factor * weight_E[i], x_E[half + i] * factor * weight_E[half + i]
        out_E[i] = first * cos[i] - second * sin[i]
        out_E[half + i] = second * cos[i] + first * sin[i]


@_inlined
def _softmax(score_GP, length):
    """Rows of scores -> shares of the first `length` positions; one position after them is zeroed."""
    for g in range(score_GP.shape[0]):
        row = score_GP[g]
        top = row[0]
        for p in range(1, length):
            top = max(top, row[p])
        for p in range(length):
            row[p] = _exp(row[p] - top)
        total = _ZERO
        for p in range(length):
            total += row[p]
        share = _ONE / total
        for p in range(length):
            row[p] *= share
        if length < row.shape[0]:
            row[length] = _ZERO


@_kernel
def attention_block(
    x_BD, norm_D, eps, w_qkv, q_norm_E, k_norm_E, w_out, cos_PE, sin_PE, keys_BhPEp, values_BhEPe, position,
    normed_BD, projected_BN, query_GE, key_E, score_GP, read_GE, attended_BN,
):  # fmt: skip
    """x += Attention(norm(x)) at `position`, whose key and value join the cache.

    keys [B, h, P/16, E, 16] and values [B, h, E/16, P, 16] lie in panels, of positions and of widths: scoring and
    reading are products like any other. normed ... attended are scratch.
    """
    groups, width, shared = keys_BhPEp.shape[1], q_norm_E.shape[0], query_GE.shape[0]
    heads, length = groups * shared, position + 1
    scale = _ONE / np.sqrt(np.float32(width))
    cos, sin = cos_PE[position], sin_PE[position]
    _rms_norm(x_BD, norm_D, eps, normed_BD)
    product(w_qkv, normed_BD, projected_BN)
    for b in range(x_BD.shape[0]):
        projected, attended = projected_BN[b], attended_BN[b]
        for g in range(groups):
            keys, values = keys_BhPEp[b, g], values_BhEPe[b, g]
            k_at = (heads + g) * width
            v_at = k_at + groups * width
            _normed_and_rotated(projected[k_at : k_at + width], k_norm_E, eps, cos, sin, _ONE, key_E)
            for e in range(width):
                keys[position // 16, e, position % 16] = key_E[e]
                values[e // 16, position, e % 16] = projected[v_at + e]
            for s in range(shared):
                q_at = (g * shared + s) * width
                _normed_and_rotated(projected[q_at : q_at + width], q_norm_E, eps, cos, sin, scale, query_GE[s])
            partial_product(keys, (length + 15) // 16, query_GE.shape[1] // 2, query_GE, score_GP)
            _softmax(score_GP, length)
            partial_product(values, values.shape[0], (length + 1) // 2, score_GP, read_GE)
            for s in range(shared):
                at = (g * shared + s) * width
                for e in range(width):
                    attended[at + e] = read_GE[s, e]
    product(w_out, attended_BN, projected_BN)
    _add_rows(x_BD, projected_BN, norm_D.shape[0])
