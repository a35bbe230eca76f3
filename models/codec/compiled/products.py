"""Products of a weight matrix with a few vectors at once, each weight read from memory exactly once.

One token a sample is all that a decoding step has, so a matrix product is bound by the reading of its weights. They
lie in panels of 16 outputs, in the order in which they are used; a panel's outputs are the lanes of one vector, and
eight samples are multiplied while a panel's weights are in registers. Every output is the sum of its even inputs plus
the sum of its odd inputs, each in order and in float32: a sample's result depends neither on its neighbours nor on
the processor's vector width.

Shapes: N outputs and D inputs, both rounded up to multiples of 16; P = N / 16 panels; B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from models.cpu.vectors import LANES, VECTOR, data, load, prefetch, splat, store

_AHEAD = 2048  # elements: the processor asks for a page's lines itself, but not for the next page's
_WORDS = ir.VectorType(ir.IntType(32), LANES)


def padded(width: int) -> int:
    """The next multiple of 16: rows of every array that a kernel multiplies have such a length, zeros at the end."""
    return -(-width // LANES) * LANES


def panels_of(matrix_ND: Tensor) -> Tensor:
    """[..., N, D] with N a multiple of 16 -> panels [..., N / 16, D, 16]."""
    return matrix_ND.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def pack(parts: Sequence[Tensor], dtype: torch.dtype) -> npt.NDArray[Any]:
    """Matrices [N_i, D] of one input, each padded to whole panels, below each other in panels.

    dtype float32: float32 [P, D, 16]. dtype bfloat16: rounded to it, int32 [P, D / 2, 16], inputs 2i and 2i + 1 in
    the lower and upper half of a word. Raises ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype} cannot be packed; choose float32 or bfloat16")
    d_in = parts[0].shape[1]
    rows = sum(padded(len(part)) for part in parts)
    matrix_ND = torch.zeros(rows, padded(d_in), dtype=dtype)
    start = 0
    for part in parts:
        matrix_ND[start : start + len(part), :d_in] = part.detach()
        start += padded(len(part))
    return panels_of(matrix_ND if dtype == torch.float32 else matrix_ND.view(torch.int32)).numpy()


def _panel_intrinsic(samples: int) -> Any:
    """out[out_at + s·out_row : ][:16] = panel · x[x_at + s·x_row : ][: 2·pairs] for `samples` samples s.

    Contiguous arrays: x and out float32; weights as `pack` gives them, the panel begins at element weights_at.
    """

    def function(
        typingctx: Any, weights: Any, weights_at: Any, pairs: Any, x: Any, x_at: Any, x_row: Any,
        out: Any, out_at: Any, out_row: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            panel, xs, outs = (data(context, builder, kind, args[i]) for kind, i in ((weights, 0), (x, 3), (out, 6)))
            panel = builder.gep(panel, [args[1]])
            rows = [
                builder.gep(xs, [builder.add(args[4], builder.mul(args[5], args[5].type(s)))]) for s in range(samples)
            ]
            sums = [[cgutils.alloca_once_value(builder, VECTOR(None)) for _ in range(2)] for _ in range(samples)]
            index = args[2].type
            words = weights.dtype == types.int32
            lines, pair = (1, _pair_of_words) if words else (2, _pair_of_floats)
            with cgutils.for_range(builder, args[2], intp=index) as loop:
                for line in range(lines):
                    at = builder.add(builder.mul(loop.index, index(lines * LANES)), index(_AHEAD + line * LANES))
                    prefetch(builder, builder.gep(panel, [at]))
                for parity, weight in enumerate(pair(builder, panel, loop.index)):
                    at = builder.add(builder.mul(loop.index, index(2)), index(parity))
                    for row, parts in zip(rows, sums, strict=True):
                        factor = splat(builder, builder.load(builder.gep(row, [at])))
                        product = builder.fmul(weight, factor, flags=("contract",))
                        total = builder.fadd(builder.load(parts[parity]), product, flags=("contract",))
                        builder.store(total, parts[parity])
            for s, parts in enumerate(sums):
                total = builder.fadd(builder.load(parts[0]), builder.load(parts[1]))
                store(builder, total, outs, builder.add(args[7], builder.mul(args[8], args[8].type(s))))
            return context.get_dummy_value()

        size = types.int64
        return types.void(weights, size, size, x, size, size, out, size, size), codegen

    return function


def _pair_of_floats(builder: Any, panel: Any, pair: Any) -> list[Any]:
    first = builder.mul(pair, pair.type(2 * LANES))
    return [load(builder, panel, first), load(builder, panel, builder.add(first, first.type(LANES)))]


def _pair_of_words(builder: Any, panel: Any, pair: Any) -> list[Any]:
    place = builder.gep(panel, [builder.mul(pair, pair.type(LANES))])
    words = builder.load(builder.bitcast(place, _WORDS.as_pointer()), align=4)
    even = builder.shl(words, _WORDS([16] * LANES))
    odd = builder.and_(words, _WORDS([0xFFFF0000] * LANES))
    return [builder.bitcast(half, VECTOR) for half in (even, odd)]


_panel_1: Any = intrinsic(_panel_intrinsic(1))
_panel_2: Any = intrinsic(_panel_intrinsic(2))
_panel_4: Any = intrinsic(_panel_intrinsic(4))
_panel_8: Any = intrinsic(_panel_intrinsic(8))


@njit(nogil=True, cache=True, error_model="numpy")
def partial_product(weights, panels, pairs, x_BD, out_BN):
    """The first `panels` panels of out = x Wᵀ, summed over the first 2·`pairs` inputs."""
    size = weights.shape[1] * weights.shape[2]
    rows, x_row, out_row = x_BD.shape[0], x_BD.shape[1], out_BN.shape[1]
    for panel in range(panels):
        at, out_at, b = panel * size, panel * LANES, 0
        while b + 8 <= rows:
            _panel_8(weights, at, pairs, x_BD, b * x_row, x_row, out_BN, b * out_row + out_at, out_row)
            b += 8
        if b + 4 <= rows:
            _panel_4(weights, at, pairs, x_BD, b * x_row, x_row, out_BN, b * out_row + out_at, out_row)
            b += 4
        if b + 2 <= rows:
            _panel_2(weights, at, pairs, x_BD, b * x_row, x_row, out_BN, b * out_row + out_at, out_row)
            b += 2
        if b < rows:
            _panel_1(weights, at, pairs, x_BD, b * x_row, x_row, out_BN, b * out_row + out_at, out_row)


@njit(nogil=True, cache=True, error_model="numpy")
def product(weights, x_BD, out_BN):
    """out = x Wᵀ for packed weights; out has at least P · 16 columns."""
    partial_product(weights, weights.shape[0], x_BD.shape[1] // 2, x_BD, out_BN)
