"""LLVM vectors of 16 floats, the words in which the CPU kernels' intrinsics are written.

LLVM maps them to the processor's own instructions and may not reorder the operations spelled out in them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)


def data(context: Any, builder: Any, kind: Any, argument: Any) -> Any:
    """Pointer to the first element of an array argument of numba type `kind`."""
    return context.make_array(kind)(context, builder, argument).data


def load(builder: Any, pointer: Any, at: Any) -> Any:
    """The vector at element `at`."""
    return builder.load(builder.bitcast(builder.gep(pointer, [at]), VECTOR.as_pointer()), align=4)


def store(builder: Any, vector: Any, pointer: Any, at: Any) -> None:
    """Write a vector to element `at`."""
    builder.store(vector, builder.bitcast(builder.gep(pointer, [at]), VECTOR.as_pointer()), align=4)


def splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    alone = builder.insert_element(VECTOR(ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
    return builder.shuffle_vector(alone, VECTOR(ir.Undefined), zeros)


def prefetch(builder: Any, place: Any) -> None:
    """Start to load the cache line at a pointer, which may lie outside any array."""
    flag = ir.IntType(32)
    hint = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(place, cgutils.voidptr_t), flag(0), flag(3), flag(1)])
