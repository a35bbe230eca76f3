"""Numba kernel of the codebook loss on CPUs: softmax, losses and gradient of a row while it is in the first cache.

Shapes: N rows, K codebooks, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from models.cpu.float32 import exp32, read_row, write_row

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
_LANES = 64


@_kernel
def _largest(z_V):
    """Maximum of the numbers that are not NaN."""
    best = np.full(_LANES, np.float32(-np.inf))
    whole = len(z_V) // _LANES
    lanes = z_V[: whole * _LANES].reshape(whole, _LANES)
    for block in range(whole):
        for j in range(_LANES):
            best[j] = lanes[block, j] if lanes[block, j] > best[j] else best[j]
    top = np.float32(-np.inf)
    for j in range(_LANES):
        top = best[j] if best[j] > top else top
    for i in range(whole * _LANES, len(z_V)):
        top = z_V[i] if z_V[i] > top else top
    return top


@_kernel
def losses_and_gradient(logits_NKV, target_NK, weight_NK, smoothing, nll_NK, uniform_NK, start, stop):
    """-log p(target) and its mean over the vocabulary, of rows start:stop; logits become weight * gradient.

    logits: float32, or patterns of bfloat16 (int16). The gradient is of (1 - smoothing) nll + smoothing uniform.
    """
    _, K, V = logits_NKV.shape
    z = np.empty(V, np.float32)
    for r in range(start, stop):
        for k in range(K):
            row, target = logits_NKV[r, k], target_NK[r, k]
            read_row(row, z)
            top = _largest(z)
            total, picked, sum_exp = np.float32(0), z[target], np.float32(0)
            for i in range(V):
                total += z[i]
                e = exp32(z[i] - top)
                sum_exp += e
                z[i] = e
            log_z = top + np.float32(math.log(sum_exp))
            nll_NK[r, k] = log_z - picked
            uniform_NK[r, k] = log_z - total / np.float32(V)
            weight = weight_NK[r, k]
            scale, shift = weight / sum_exp, weight * np.float32(smoothing) / np.float32(V)
            for i in range(V):
                z[i] = z[i] * scale - shift
            z[target] -= weight * np.float32(1 - smoothing)
            write_row(z, row)
