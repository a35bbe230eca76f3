"""The elementwise half of the chunked delta rule on CPUs in float32: four passes instead of a hundred operations.

Shapes: R rows, T time, h query/key heads, H value heads, K, V head widths, X = V + K, N chunks, C chunk length,
M = R*H*N chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from models.cpu.float32 import exp32, read_row, write_row
from models.cpu.threads import run_kernel, thread_shares
from models.ops._delta_rule_torch import Backward, Rows

_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})
_ZERO = np.float32(0)
_LEAST = np.float32(-87)  # decays below e^-87 are 0: what they multiply would only make slow denormal numbers


@_kernel
def _gather(
    q_RThK, k_RThK, v_RTHV, g_RTH, beta_RTH, scale, q_MCK, k_MCK, v_MCV, beta_MC1, in_MC1, out_MC1, all_M, D_MCC,
    k_out_MCK, writes_MCX, start, stop,
):  # fmt: skip
    """Rows of chunks start:stop by chunk, padded with zeros, and their decays."""
    _, T, h, K = k_RThK.shape
    H, V = v_RTHV.shape[2:]
    C = q_MCK.shape[1]
    N = -(-T // C)
    gamma = np.empty(C, np.float64)
    for m in range(start, stop):
        r, head, first = m // N // H, m // N % H, m % N * C
        source = head // (H // h)
        total = 0.0
        for c in range(C):
            q, k, v, t = q_MCK[m, c], k_MCK[m, c], v_MCV[m, c], first + c
            beta_MC1[m, c, 0] = _ZERO
            if t < T:
                read_row(q_RThK[r, t, source], q)
                read_row(k_RThK[r, t, source], k)
                read_row(v_RTHV[r, t, head], v)
                for i in range(K):
                    q[i] *= scale
                beta_MC1[m, c, 0] = beta_RTH[r, t, head]
                total += g_RTH[r, t, head]
            else:
                q[:] = _ZERO
                k[:] = _ZERO
                v[:] = _ZERO
            gamma[c] = total
        all_M[m] = _decay(total)
        for c in range(C):
            D, writes = D_MCC[m, c], writes_MCX[m, c]
            D[:] = _ZERO
            for i in range(c + 1):
                D[i] = _decay(gamma[c] - gamma[i])
            in_MC1[m, c, 0], out_MC1[m, c, 0] = _decay(gamma[c]), _decay(total - gamma[c])
            beta, fresh, out = beta_MC1[m, c, 0], beta_MC1[m, c, 0] * in_MC1[m, c, 0], out_MC1[m, c, 0]
            k, v, k_out, of_v, of_k = k_MCK[m, c], v_MCV[m, c], k_out_MCK[m, c], writes[:V], writes[V:]
            for i in range(V):
                of_v[i] = v[i] * beta
            for i in range(K):
                of_k[i] = k[i] * fresh
                k_out[i] = k[i] * out


@_kernel
def _decay(exponent):
    """e^exponent of a float64 <= 0, as float32."""
    x = np.float32(exponent)
    return _ZERO if x < _LEAST else exp32(x)  # NaN stays NaN


@_kernel
def _invert(kk_MCC, qk_MCC, D_MCC, beta_MC1, inverse_MCC, start, stop):
    """Decays into the products of keys and queries; (I + A)^-1 by forward substitution.

    In float64: correlated keys at beta near 2 lose two digits in float32.
    """
    C = kk_MCC.shape[1]
    X = np.empty((C, C), np.float64)
    for m in range(start, stop):
        for i in range(C):
            kk, qk, D, row, out = kk_MCC[m, i], qk_MCC[m, i], D_MCC[m, i], X[i], inverse_MCC[m, i]
            beta = beta_MC1[m, i, 0]
            row[:] = 0.0
            row[i] = 1.0
            for j in range(C):
                kk[j] *= D[j]
                qk[j] *= D[j]
            for j in range(i):
                a, above = np.float64(np.float32(beta * kk[j])), X[j]
                for n in range(j + 1):
                    row[n] -= a * above[n]
            for j in range(C):
                out[j] = row[j]


@_kernel
def _through_products(dA_MCC, dqk_MCC, kk_MCC, qk_MCC, D_MCC, beta_MC1, dbeta_MC, dgamma_MC, start, stop):
    """From -dL/dA and dL/d(D Q K^T): those of K K^T (symmetric) and Q K^T in their place, of beta and gamma.

    Every product that D enters also feeds gamma: +1 to its row, -1 to its column. On the diagonal the two cancel.
    """
    C = dA_MCC.shape[1]
    for m in range(start, stop):
        dbeta, dgamma = dbeta_MC[m], dgamma_MC[m]
        dgamma[:] = _ZERO
        for i in range(C):
            dA, dqk, kk, qk, D = dA_MCC[m, i], dqk_MCC[m, i], kk_MCC[m, i], qk_MCC[m, i], D_MCC[m, i]
            beta, of_beta, of_gamma = beta_MC1[m, i, 0], _ZERO, _ZERO
            for j in range(i):
                through_A = -dA[j] * kk[j]
                through_D = through_A * beta + dqk[j] * qk[j]
                of_beta += through_A
                of_gamma += through_D
                dgamma[j] -= through_D
            for j in range(i):
                dA[j] *= -beta * D[j]
                dqk[j] *= D[j]
            dA[i] = _ZERO
            dqk[i] *= D[i]
            dqk[i + 1 :] = _ZERO
            dbeta[i] = of_beta
            dgamma[i] += of_gamma
        for i in range(C):
            for j in range(i):
                dA_MCC[m, j, i] = dA_MCC[m, i, j]


@_kernel
def _finish(
    q_MCK, k_MCK, v_MCV, beta_MC1, in_MC1, out_MC1, all_M, S_MKV, dnext_MKV, dwrites_MCX, dq_in_MCK, dk_out_MCK,
    dq_MCK, dk_MCK, dbeta_MC, dgamma_MC, scale, dq_RTHK, dk_RTHK, dv_RTHV, dg_RTH, dbeta_RTH, start, stop,
):  # fmt: skip
    """What reaches the inputs of chunks start:stop, written where it belongs."""
    _, T, H, V = dv_RTHV.shape
    C, K = q_MCK.shape[1:]
    N = -(-T // C)
    row_K, row_V = np.empty(K, np.float32), np.empty(V, np.float32)
    for m in range(start, stop):
        r, head, first = m // N // H, m // N % H, m % N * C
        to_last = _ZERO
        for i in range(K):
            to_last += _dot(S_MKV[m, i], dnext_MKV[m, i])
        to_last *= all_M[m]
        dgamma = dgamma_MC[m]
        for c in range(C):
            beta, fresh, out = beta_MC1[m, c, 0], in_MC1[m, c, 0], out_MC1[m, c, 0]
            dv_beta, dk_beta = dwrites_MCX[m, c, :V], dwrites_MCX[m, c, V:]
            k, dk, dk_out, dq_in = k_MCK[m, c], dk_MCK[m, c], dk_out_MCK[m, c], dq_in_MCK[m, c]
            from_k_beta = _dot(dk_beta, k) * fresh
            from_k_out = _dot(dk_out, k) * out
            dgamma[c] += from_k_beta * beta + _dot(dq_in, q_MCK[m, c]) * fresh
            if c < C - 1:
                dgamma[c] -= from_k_out
                to_last += from_k_out
            if first + c < T:
                t = first + c
                dbeta_RTH[r, t, head] = dbeta_MC[m, c] + from_k_beta + _dot(dv_beta, v_MCV[m, c])
                dq = dq_MCK[m, c]
                for i in range(K):
                    row_K[i] = (dq[i] + dq_in[i] * fresh) * scale
                write_row(row_K, dq_RTHK[r, t, head])
                for i in range(K):
                    row_K[i] = dk[i] + dk_beta[i] * (beta * fresh) + dk_out[i] * out
                write_row(row_K, dk_RTHK[r, t, head])
                for i in range(V):
                    row_V[i] = dv_beta[i] * beta
                write_row(row_V, dv_RTHV[r, t, head])
        total = to_last
        for c in range(C - 1, -1, -1):
            total += dgamma[c]
            if first + c < T:
                dg_RTH[r, first + c, head] = total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
def _dot(x, y):
    total = _ZERO
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


def gather(
    q_RThK: Tensor, k_RThK: Tensor, v_RTHV: Tensor, g_RTH: Tensor, beta_RTH: Tensor, scale: float, chunk: int
) -> tuple[Rows, Tensor]:
    """See `_delta_rule_torch.gather`."""
    R, T, H, V = v_RTHV.shape
    K = k_RThK.shape[3]
    M = R * H * -(-T // chunk)
    q, k, v, beta, decay_in, decay_out, D, writes, k_out = (
        torch.empty(M, chunk, width) for width in (K, K, V, 1, 1, 1, chunk, V + K, K)
    )
    rows = Rows(q, k, v, beta, decay_in, decay_out, torch.empty(M), D, k_out)
    inputs = (x.contiguous() for x in (q_RThK, k_RThK, v_RTHV, g_RTH.float(), beta_RTH.float()))
    run_kernel(_gather, thread_shares(M), *inputs, np.float32(scale), *rows, writes)
    return rows, writes


def decay_and_invert(kk_MCC: Tensor, qk_MCC: Tensor, rows: Rows) -> Tensor:
    """See `_delta_rule_torch.decay_and_invert`."""
    inverse = torch.empty_like(kk_MCC)
    run_kernel(_invert, thread_shares(len(kk_MCC)), kk_MCC, qk_MCC, rows.D_MCC, rows.beta_MC1, inverse)
    return inverse


def through_products(
    minus_dA_MCC: Tensor, dqk_MCC: Tensor, kk_MCC: Tensor, qk_MCC: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """See `_delta_rule_torch.through_products`."""
    dbeta, dgamma = (kk_MCC.new_empty(kk_MCC.shape[:2]) for _ in range(2))
    factors = (kk_MCC, qk_MCC, rows.D_MCC, rows.beta_MC1)
    run_kernel(_through_products, thread_shares(len(kk_MCC)), minus_dA_MCC, dqk_MCC, *factors, dbeta, dgamma)
    return dbeta, dgamma


def finish(
    rows: Rows, back: Backward, dbeta_MC: Tensor, dgamma_MC: Tensor, scale: float, grads: Sequence[Tensor]
) -> None:
    """See `_delta_rule_torch.finish`."""
    h, H = grads[0].shape[2], grads[2].shape[2]
    results = list(grads)
    if h < H:
        results[:2] = [torch.empty(*x.shape[:2], H, x.shape[3]) for x in grads[:2]]
    results[3:] = [x if x.dtype == torch.float32 else x.float() for x in grads[3:]]
    factors = (rows.q_MCK, rows.k_MCK, rows.v_MCV, rows.beta_MC1, rows.decay_in_MC1, rows.decay_out_MC1)
    arguments = (*factors, rows.decay_all_M, *back, dbeta_MC, dgamma_MC, np.float32(scale), *results)
    run_kernel(_finish, thread_shares(len(rows.q_MCK)), *arguments)
    for result, out in zip(results, grads, strict=True):
        if result is not out:
            out.copy_(result if result.shape == out.shape else result.unflatten(2, (h, H // h)).sum(3))
