"""Exact int8 products on processors without an instruction for them: 16-bit pairs by AVX2's `vpmaddwd`.

torch's own int8 product needs AVX512-VNNI or AMX; on an AVX2 processor it takes twenty times as long as a float32 one.
`vpmaddwd` multiplies 16 numbers of 16 bits and adds neighbours to 8 sums of 32 bits, at the rate at which a float32
instruction multiplies 8. The sums are exact, so that they are those of `torch._int_mm`.

Shapes: R rows, D width, M features; P panels, Q pairs of columns, V numbers of a panel's pairs. Rows of x are packed in
panels of ROWS, those of W in panels of FEATURES: for each pair of columns the pairs of the panel's rows, one after
another, so that the inner loop reads both in order. A panel of each gives a tile of sums that fills the registers.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from models.cpu.threads import even_split, run_kernel
from models.cpu.vectors import data

ROWS, FEATURES = 6, 16  # 12 vectors of 8 sums, and 4 registers for what they are made of
_INT, _LONG = ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(_INT, 8)
_PAIRS = ir.VectorType(ir.IntType(16), 16)
_kernel = njit(nogil=True, cache=True, error_model="numpy")


def pairs_int8() -> bool:
    """Whether this processor has the instruction."""
    return platform.machine() in ("x86_64", "AMD64") and bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _tile_intrinsic(
    typingctx: Any, x: Any, x_at: Any, w: Any, w_at: Any, pairs: Any, out: Any, out_at: Any, stride: Any
) -> Any:
    """out[out_at + r · stride + f] = Σ over pairs of x's row r and W's row f, of the panels at x_at and w_at."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_at, w_at, pairs, out_at, stride = args[1], args[3], args[4], args[6], args[7]
        lefts = builder.bitcast(builder.gep(data(context, builder, x, args[0]), [x_at]), _INT.as_pointer())
        rights = builder.bitcast(builder.gep(data(context, builder, w, args[2]), [w_at]), _PAIRS.as_pointer())
        sums = [[cgutils.alloca_once(builder, _SUMS) for _ in range(FEATURES // 8)] for _ in range(ROWS)]
        for line in sums:
            for total in line:
                builder.store(_SUMS([0] * 8), total)
        with cgutils.for_range_slice(builder, _LONG(0), pairs, _LONG(1)) as (pair, _):
            right = builder.gep(rights, [builder.mul(pair, _LONG(FEATURES // 8))])
            weights = [builder.load(builder.gep(right, [_LONG(half)]), align=2) for half in range(FEATURES // 8)]
            left = builder.gep(lefts, [builder.mul(pair, _LONG(ROWS))])
            for r, line in enumerate(sums):
                both = _everywhere(builder, builder.load(builder.gep(left, [_LONG(r)]), align=2))
                for weight, total in zip(weights, line, strict=True):
                    builder.store(builder.add(builder.load(total), _multiply_add(builder, weight, both)), total)
        first = builder.gep(data(context, builder, out, args[5]), [out_at])
        for r, line in enumerate(sums):
            place = builder.bitcast(builder.gep(first, [builder.mul(stride, _LONG(r))]), _SUMS.as_pointer())
            for half, total in enumerate(line):
                builder.store(builder.load(total), builder.gep(place, [_LONG(half)]), align=4)
        return context.get_dummy_value()

    at = types.int64
    return types.void(x, at, w, at, at, out, at, at), codegen


def _everywhere(builder: Any, pair: Any) -> Any:
    """A pair of 16-bit numbers in every place of a vector."""
    alone = builder.insert_element(_SUMS(ir.Undefined), pair, _INT(0))
    return builder.bitcast(builder.shuffle_vector(alone, _SUMS(ir.Undefined), _SUMS([0] * 8)), _PAIRS)


def _multiply_add(builder: Any, a: Any, b: Any) -> Any:
    """a[2i] · b[2i] + a[2i + 1] · b[2i + 1]."""
    kind = ir.FunctionType(_SUMS, [_PAIRS, _PAIRS])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd"), [a, b])


_tile: Any = intrinsic(_tile_intrinsic)


@_kernel
def _pack(rows_ND, panels_PQV, start, stop):
    """Panels start:stop of int8 rows: panels[p, q, 2n : 2n + 2] = rows[size·p + n, 2q : 2q + 2], zero beyond."""
    rows, width = rows_ND.shape
    pairs, size = panels_PQV.shape[1], panels_PQV.shape[2] // 2
    for p in range(start, stop):
        for n in range(size):
            row = size * p + n
            for q in range(pairs):
                there = row < rows
                panels_PQV[p, q, 2 * n] = rows_ND[row, 2 * q] if there else 0
                panels_PQV[p, q, 2 * n + 1] = rows_ND[row, 2 * q + 1] if there and 2 * q + 1 < width else 0


@_kernel
def _multiply(x_PQV, w_PQV, out_RM, start, stop):
    """Features FEATURES·start : FEATURES·stop of out = x · Wᵀ."""
    rows, features = out_RM.shape
    pairs = w_PQV.shape[1]
    edge = np.empty((ROWS, FEATURES), np.int32)
    for p in range(start, stop):
        column = FEATURES * p
        across = min(FEATURES, features - column)
        for t in range(x_PQV.shape[0]):
            row = ROWS * t
            down = min(ROWS, rows - row)
            x_at, w_at = t * pairs * 2 * ROWS, p * pairs * 2 * FEATURES
            if down == ROWS and across == FEATURES:
                _tile(x_PQV, x_at, w_PQV, w_at, pairs, out_RM, row * features + column, features)
            else:
                _tile(x_PQV, x_at, w_PQV, w_at, pairs, edge, 0, FEATURES)
                out_RM[row : row + down, column : column + across] = edge[:down, :across]


def packed_shape(features: int, width: int) -> tuple[int, int, int]:
    """Shape [P, Q, V] of the panels of W [features, width]."""
    return -(-features // FEATURES), -(-width // 2), 2 * FEATURES


def pack(W_MD: torch.Tensor, panels_PQV: torch.Tensor, n_threads: int = 1) -> torch.Tensor:
    """Write int8 W as panels, int16 of `packed_shape`."""
    run_kernel(_pack, even_split(len(panels_PQV), n_threads), W_MD, panels_PQV)
    return panels_PQV


def multiply(x_RD: torch.Tensor, panels_PQV: torch.Tensor, out_RM: torch.Tensor, n_threads: int = 1) -> torch.Tensor:
    """out = x · Wᵀ of int8 x [R, D] and the panels of W [M, D], as int32; exact for D up to 131,072."""
    x_PQV = torch.empty(-(-len(x_RD) // ROWS), panels_PQV.shape[1], 2 * ROWS, dtype=torch.int16)
    run_kernel(_pack, [0, len(x_PQV)], x_RD, x_PQV)
    run_kernel(_multiply, even_split(len(panels_PQV), n_threads), x_PQV, panels_PQV, out_RM)
    return out_RM
