"""Instructions that numba does not offer by itself, as intrinsics for the TopK kernels.

The sums take BLOCK columns of many rows at a time: the block of 4,096 tokens is half a megabyte, so that rows gathered
in any order come from a core's second-level cache. They spell their order out in vectors of 16 floats, which LLVM
maps to whatever the processor has and may not reorder: a result depends on its operands alone, not on what the
compiler made of the loop around the call.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from models.cpu import vectors as vectors_module
from models.cpu.vectors import FLOAT, LANES, VECTOR, data, load, splat, store

BLOCK = 32  # columns per block, two cache lines


def _float_of_bits_intrinsic(typingctx: Any, bits: Any) -> Any:
    """float32 whose pattern is the low 32 bits of an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = args[0]
        if word.type.width != 32:
            word = builder.trunc(word, ir.IntType(32))
        return builder.bitcast(word, FLOAT)

    return types.float32(bits), codegen


def _bits_of_float_intrinsic(typingctx: Any, x: Any) -> Any:
    """Pattern of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


def _prefetch_intrinsic(typingctx: Any, array: Any, position: Any) -> Any:
    """Start to load the cache line of element `position` of a contiguous array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors_module.prefetch(builder, builder.gep(data(context, builder, array, args[0]), [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


def _block_dots_intrinsic(
    typingctx: Any, rows: Any, base: Any, token: Any, first: Any, last: Any, weights: Any, weights_at: Any, out: Any
) -> Any:
    """out[e] += Σ weights[weights_at + i] · rows[base + BLOCK·token[e] + i] over i < BLOCK, for first ≤ e < last.

    Contiguous arrays: rows, weights and out float32, token int32. Entries are taken in groups, whose lanes are summed
    by one tree of shuffles; an entry's sum has the same order in a group of any size.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.gep(data(context, builder, rows, args[0]), [args[1]])
        weight = builder.gep(data(context, builder, weights, args[5]), [args[6]])
        tokens, sums = data(context, builder, token, args[2]), data(context, builder, out, args[7])
        first, last = args[3], args[4]
        index = first.type
        factors = [load(builder, weight, index(lane)) for lane in range(0, BLOCK, LANES)]

        def products(entry: Any) -> Any:
            row = _row_of(builder, tokens, entry)
            total = builder.fmul(factors[0], load(builder, start, row))
            for lane, factor in enumerate(factors[1:], 1):
                part = builder.fmul(
                    factor, load(builder, start, builder.add(row, index(lane * LANES))), flags=("contract",)
                )
                total = builder.fadd(total, part, flags=("contract",))
            return total

        begin = first
        for size in (16, 4, 1):
            count = builder.and_(builder.sub(last, begin), index(-size))
            end = builder.add(begin, count)
            with cgutils.for_range_slice(builder, begin, end, index(size)) as (entry, _):
                group = [products(builder.add(entry, index(one))) for one in range(size)]
                place = builder.bitcast(builder.gep(sums, [entry]), ir.VectorType(FLOAT, size).as_pointer())
                builder.store(builder.fadd(builder.load(place, align=4), _lane_sums(builder, group)), place, align=4)
            begin = end
        return context.get_dummy_value()

    kinds = (rows, types.int64, token, types.int64, types.int64, weights, types.int64, out)
    return types.void(*kinds), codegen


def _weighted_sum_intrinsic(
    typingctx: Any, rows: Any, base: Any, token: Any, value: Any, first: Any, last: Any, total: Any
) -> Any:
    """total[:BLOCK] = Σ value[e] · rows[base + BLOCK·token[e] :][:BLOCK] over first ≤ e < last.

    Contiguous arrays: rows, value and total float32, token int32. Even and odd entries are summed apart, so that one
    addition need not wait for the one before.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.gep(data(context, builder, rows, args[0]), [args[1]])
        tokens, values, out = (
            data(context, builder, kind, argument)
            for kind, argument in ((token, args[2]), (value, args[3]), (total, args[6]))
        )
        first, last = args[4], args[5]
        vectors = BLOCK // LANES
        sums = [[cgutils.alloca_once_value(builder, VECTOR(None)) for _ in range(vectors)] for _ in range(2)]

        def add(entry: Any, parts: list[Any]) -> None:
            row = _row_of(builder, tokens, entry)
            weights = splat(builder, builder.load(builder.gep(values, [entry])))
            for lane, part in enumerate(parts):
                at = builder.add(row, row.type(lane * LANES))
                product = builder.fmul(weights, load(builder, start, at), flags=("contract",))
                builder.store(builder.fadd(builder.load(part), product, flags=("contract",)), part)

        odd = builder.and_(builder.sub(last, first), last.type(1))
        even = builder.sub(last, odd)
        with cgutils.for_range_slice(builder, first, even, last.type(2)) as (entry, _):
            add(entry, sums[0])
            add(builder.add(entry, entry.type(1)), sums[1])
        with cgutils.for_range_slice(builder, even, last, last.type(1)) as (entry, _):
            add(entry, sums[0])
        for lane in range(vectors):
            part = builder.fadd(builder.load(sums[0][lane]), builder.load(sums[1][lane]))
            store(builder, part, out, last.type(lane * LANES))
        return context.get_dummy_value()

    kinds = (rows, types.int64, token, value, types.int64, types.int64, total)
    return types.void(*kinds), codegen


def _add_weighted_intrinsic(
    typingctx: Any, rows: Any, base: Any, token: Any, value: Any, first: Any, last: Any, weights: Any
) -> Any:
    """rows[base + BLOCK·token[e] + i] += value[e] · weights[i] over i < BLOCK, for first ≤ e < last in this order.

    Contiguous arrays: rows, value and weights float32, token int32.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.gep(data(context, builder, rows, args[0]), [args[1]])
        tokens, values, weight = (
            data(context, builder, kind, argument)
            for kind, argument in ((token, args[2]), (value, args[3]), (weights, args[6]))
        )
        first, last = args[4], args[5]
        factors = [load(builder, weight, first.type(lane)) for lane in range(0, BLOCK, LANES)]
        with cgutils.for_range_slice(builder, first, last, last.type(1)) as (entry, _):
            row = _row_of(builder, tokens, entry)
            scale = splat(builder, builder.load(builder.gep(values, [entry])))
            for lane, factor in enumerate(factors):
                at = builder.add(row, row.type(lane * LANES))
                product = builder.fmul(scale, factor, flags=("contract",))
                store(builder, builder.fadd(load(builder, start, at), product, flags=("contract",)), start, at)
        return context.get_dummy_value()

    return types.void(rows, types.int64, token, value, types.int64, types.int64, weights), codegen


def _row_of(builder: Any, tokens: Any, entry: Any) -> Any:
    row = builder.sext(builder.load(builder.gep(tokens, [entry])), ir.IntType(64))
    return builder.mul(row, row.type(BLOCK))


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Sums of the lanes of each of 2ⁿ vectors: lane i and i + 8 first, then i + 4, and so on, whatever n."""
    half = LANES
    while half > 1:
        half //= 2
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0],) * 2]
        size = pairs[0][0].type.count * (2 if len(vectors) > 1 else 1)
        low = [lane for lane in range(size) if lane % (2 * half) < half]
        mask = ir.VectorType(ir.IntType(32), len(low))
        vectors = [
            builder.fadd(
                builder.shuffle_vector(a, b, mask(low)), builder.shuffle_vector(a, b, mask([at + half for at in low]))
            )
            for a, b in pairs
        ]
    return vectors[0]


float_of_bits: Any = intrinsic(_float_of_bits_intrinsic)
bits_of_float: Any = intrinsic(_bits_of_float_intrinsic)
prefetch: Any = intrinsic(_prefetch_intrinsic)
block_dots: Any = intrinsic(_block_dots_intrinsic)
add_weighted: Any = intrinsic(_add_weighted_intrinsic)
weighted_sum: Any = intrinsic(_weighted_sum_intrinsic)
