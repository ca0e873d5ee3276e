"""How loops are compiled (Numba). The import takes a second, so functions that need compiled loops import them themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be reordered and fused, which every bound of the exact search allows for. NaN and infinities keep their meaning: a
# comparison with them must not rule out a row. Loops run over slices, as an index that could be negative keeps them from
# being vectorised. Numba's cache does not notice a change of these flags: change the files with the loops as well.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def load(builder, data, place, kind):  # type: ignore[no-untyped-def]
    """In `generate` of an intrinsic: a value of an LLVM type, such as a vector, read from a place that need not be aligned."""
    value = builder.load(builder.bitcast(builder.gep(data, [place]), kind.as_pointer()))
    value.align = 1
    return value


def store(builder, value, data, place):  # type: ignore[no-untyped-def]
    """In `generate` of an intrinsic: write a value to a place that need not be aligned."""
    builder.store(value, builder.bitcast(builder.gep(data, [place]), value.type.as_pointer())).align = 1


def repeat(builder, value, lanes):  # type: ignore[no-untyped-def]
    """In `generate` of an intrinsic: a vector of the same number in all lanes."""
    alone = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(alone, alone, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that releases the GIL; callers split the work among threads."""
    try:
        return njit(nogil=True, fastmath=FAST, cache=True)(function)
    except RuntimeError:  # no folder that Numba could write to: compiled again in every process
        return njit(nogil=True, fastmath=FAST)(function)


@intrinsic
def prefetch(_typing, array, row, column):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """In a compiled loop: request an element of an array, (N, W), from memory before it is needed.

    Processors guess such requests themselves, but not across pages, nor for places that depend on data. Never fails, even
    beyond the end of the array.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        layout = context.make_array(signature.args[0])(context, builder, arguments[0])
        steps = cgutils.unpack_tuple(builder, layout.strides)
        offset = builder.add(*(builder.mul(step, place) for step, place in zip(steps, arguments[1:], strict=True)))
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        request = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        element = builder.gep(builder.bitcast(layout.data, address), [offset])
        builder.call(request, [element, number(0), number(3), number(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate
