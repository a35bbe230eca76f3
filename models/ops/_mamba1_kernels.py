"""Numba kernels of the selective scan on CPUs, forward and backward, float32.

A block of WIDTH channels goes through the whole sequence while its [N, WIDTH] state stays in a core's first-level
cache; the backward pass makes the states of one chunk of time again, WIDTH channels at once, in its second-level
cache. Work is cut into items, GROUPS groups of channel blocks a batch row. An item sums the gradients of B and C over
its own channels, so that the number of threads changes no bit.

Shapes: B batch, T time, D channels, N states a channel, L chunks, G groups, C chunk length, W = WIDTH.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from models.cpu.float32 import exp32

CHUNK = 16
WIDTH = 64  # channels of a block: four vectors of the widest registers
GROUPS = 4

_FAST = {"contract", "reassoc", "nsz", "arcp"}
_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
# inlined, because a called helper's sums may differ in the last bit between a fresh compilation and the cache's
_inlined = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST, inline="always")


@_inlined
def _advance(h_NW, A_NW, dt_W, u_W, B_N, C_N, y_W):
    """One token: the state in place, y += C . h."""
    for n in range(h_NW.shape[0]):
        b, c = B_N[n], C_N[n]
        for j in range(WIDTH):
            h = exp32(dt_W[j] * A_NW[n, j]) * h_NW[n, j] + u_W[j] * b
            h_NW[n, j] = h
            y_W[j] += c * h


@_inlined
def _record(before_NW, A_NW, dt_W, u_W, B_N, decay_NW, after_NW):
    """One token: its decays and the state after it."""
    for n in range(before_NW.shape[0]):
        b = B_N[n]
        for j in range(WIDTH):
            decay = exp32(dt_W[j] * A_NW[n, j])
            decay_NW[n, j] = decay
            after_NW[n, j] = decay * before_NW[n, j] + u_W[j] * b


@_inlined
def _retreat(dh_NW, before_NW, after_NW, decay_NW, A_NW, dt_W, u_W, dy_W, B_N, C_N, dA_NW, ddt_W, du_W, dB_N, dC_N):
    """One token backwards: the gradient of the state in place, the others added."""
    for n in range(dh_NW.shape[0]):
        b, c = B_N[n], C_N[n]
        sum_b, sum_c = np.float32(0), np.float32(0)
        for j in range(WIDTH):
            g = dh_NW[n, j] + c * dy_W[j]
            sum_c += after_NW[n, j] * dy_W[j]
            sum_b += g * u_W[j]
            du_W[j] += g * b
            g *= decay_NW[n, j]
            dh_NW[n, j] = g
            dexponent = g * before_NW[n, j]
            dA_NW[n, j] += dexponent * dt_W[j]
            ddt_W[j] += dexponent * A_NW[n, j]
        dB_N[n] += sum_b
        dC_N[n] += sum_c


@_kernel
def scan_forward(x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, initial_BND, y_BTD, entering_BLND, final_BND, start, stop):
    """Outputs, the state that enters each chunk, and the final state, of items start:stop (B * GROUPS in all)."""
    _, T, D = x_BTD.shape
    N = A_ND.shape[0]
    # channels beyond D stay zero
    h, A = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
    dt, u, y = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    for item in range(start, stop):
        r = item // GROUPS
        for first in range(item % GROUPS * WIDTH, D, GROUPS * WIDTH):
            last = min(first + WIDTH, D)
            w = last - first
            A[:, w:], h[:, w:], dt[w:], u[w:] = 0, 0, 0, 0
            A[:, :w], h[:, :w] = A_ND[:, first:last], initial_BND[r, :, first:last]
            for t in range(T):
                if t % CHUNK == 0:
                    entering_BLND[r, t // CHUNK, :, first:last] = h[:, :w]
                for j in range(w):
                    dt[j] = dt_BTD[r, t, first + j]
                    u[j] = dt[j] * x_BTD[r, t, first + j]
                y[:] = 0
                _advance(h, A, dt, u, B_BTN[r, t], C_BTN[r, t], y)
                y_BTD[r, t, first:last] = y[:w]
            final_BND[r, :, first:last] = h[:, :w]


@_kernel
def scan_backward(
    x_BTD, dt_BTD, A_ND, B_BTN, C_BTN, entering_BLND, dy_BTD, dfinal_BND,
    dx_BTD, ddt_BTD, dA_BND, dB_GBTN, dC_GBTN, dinitial_BND, start, stop,
):  # fmt: skip
    """Gradients of items start:stop; dB and dC, zero at first, are summed over the channels of each group."""
    _, T, D = x_BTD.shape
    N = A_ND.shape[0]
    states, decay = np.zeros((CHUNK + 1, N, WIDTH), np.float32), np.zeros((CHUNK, N, WIDTH), np.float32)
    dh, A, dA = np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32), np.zeros((N, WIDTH), np.float32)
    dt, u = np.zeros((CHUNK, WIDTH), np.float32), np.zeros((CHUNK, WIDTH), np.float32)
    dy, du, ddt = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    for item in range(start, stop):
        r, g = item // GROUPS, item % GROUPS
        for first in range(g * WIDTH, D, GROUPS * WIDTH):
            last = min(first + WIDTH, D)
            w = last - first
            A[:, w:], dh[:, w:], states[0, :, w:], dt[:, w:], u[:, w:], dy[w:] = 0, 0, 0, 0, 0, 0
            A[:, :w], dh[:, :w] = A_ND[:, first:last], dfinal_BND[r, :, first:last]
            dA[:] = 0
            for chunk in range((T - 1) // CHUNK, -1, -1):
                begin, length = chunk * CHUNK, min(CHUNK, T - chunk * CHUNK)
                states[0, :, :w] = entering_BLND[r, chunk, :, first:last]
                for i in range(length):
                    for j in range(w):
                        dt[i, j] = dt_BTD[r, begin + i, first + j]
                        u[i, j] = dt[i, j] * x_BTD[r, begin + i, first + j]
                    _record(states[i], A, dt[i], u[i], B_BTN[r, begin + i], decay[i], states[i + 1])
                for i in range(length - 1, -1, -1):
                    t = begin + i
                    dy[:w] = dy_BTD[r, t, first:last]
                    du[:], ddt[:] = 0, 0
                    _retreat(
                        dh, states[i], states[i + 1], decay[i], A, dt[i], u[i], dy, B_BTN[r, t], C_BTN[r, t],
                        dA, ddt, du, dB_GBTN[g, r, t], dC_GBTN[g, r, t],
                    )  # fmt: skip
                    for j in range(w):
                        dx_BTD[r, t, first + j] = du[j] * dt[i, j]
                        ddt_BTD[r, t, first + j] = ddt[j] + du[j] * x_BTD[r, t, first + j]
            dA_BND[r, :, first:last] = dA[:, :w]
            dinitial_BND[r, :, first:last] = dh[:, :w]
