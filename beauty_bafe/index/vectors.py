"""Vector instructions for compiled loops that Numba does not generate by itself: products of int8 codes, and comparisons.

Products use AVX512-VNNI. An instruction multiplies 4 numbers of each of 16 rows by 4 numbers of a query, so rows are packed: 4
numbers of the first row, of the second, and so on to the 16th, then their next 4. It takes numbers without a sign on one side,
so packed codes are c + SHIFT.

Numba's cache of survivors.py does not notice a change here: change that file as well, or delete its *.nbi in __pycache__.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ARG001 (intrinsics get their arguments in `generate`)
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from ..compiled import compiled, load, prefetch, repeat, store

LANES, STEP = 16, 4  # rows of a vector, and numbers of each row that an instruction multiplies
GROUPS, TOGETHER = 4, 4  # vectors of rows, and queries, that are multiplied at a time, so that their sums stay in registers
SHIFT = 128
LINE, TALL = LANES * STEP, LANES * GROUPS  # bytes of a vector, as of a cache line; rows that are multiplied at a time
BYTE, HALF, WORD, PLACE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, REALS, MASK = (ir.VectorType(kind, LANES) for kind in (WORD, ir.FloatType(), ir.IntType(1)))
_, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_HAS_VNNI = {"+avx512bw", "+avx512vnni"} <= set(_FEATURES.split(","))


def has_vnni() -> bool:
    """Whether Numba compiles for a processor with these instructions."""
    return _HAS_VNNI


@compiled
def pack(codes, begin, packed):
    """Pack int8 (R, W) into packed, uint32, from `begin` on: ceil(R / LANES) groups of LANES * ceil(W / STEP) numbers."""
    height, width = codes.shape
    steps = -(-width // STEP)
    for row in range(0, height, LANES):
        place, done = begin + row * steps, 0
        if row + LANES <= height:
            for ahead in range(row + LANES, min(row + 2 * LANES, height)):
                for line in range(0, width, LINE):
                    prefetch(codes, ahead, line)
            done = width // LINE * LINE
            for column in range(0, done, LINE):
                _transpose(codes, row, column, packed, place + LANES // STEP * column)
        for own in range(row, min(row + LANES, height)):
            for column in range(done, width, STEP):
                word = np.uint32(0)
                for number in range(column, min(column + STEP, width)):
                    word |= np.uint32(np.int64(codes[own, number]) + SHIFT) << np.uint32(8 * (number - column))
                packed[place + LANES // STEP * column + own - row] = word


@intrinsic
def _transpose(_typing, codes, row, column, packed, place):
    """In a compiled loop: pack LINE numbers of LANES rows of int8 (R, W)."""

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 3))
        stride, _ = cgutils.unpack_tuple(builder, source.strides)
        data, out = builder.bitcast(source.data, BYTE.as_pointer()), builder.bitcast(target.data, WORD.as_pointer())
        rows = []
        for lane in range(LANES):
            offset = builder.mul(builder.add(arguments[1], PLACE(lane)), stride)
            rows.append(load(builder, data, builder.add(offset, arguments[2]), VECTOR))
        for size in (1, 2, 4, 8):  # exchange the corners of squares of this size
            low = [lane if lane & size == 0 else LANES + lane - size for lane in range(LANES)]
            high = [lane + size if lane & size == 0 else LANES + lane for lane in range(LANES)]
            for first in (lane for lane in range(LANES) if lane & size == 0):
                pair = rows[first], rows[first + size]
                rows[first], rows[first + size] = (
                    builder.shuffle_vector(*pair, ir.Constant(VECTOR, mask)) for mask in (low, high)
                )
        shift = ir.Constant(VECTOR, [SHIFT * 0x01010101] * LANES)
        for lane, some in enumerate(rows):
            store(builder, builder.xor(some, shift), out, builder.add(arguments[4], PLACE(LANES * lane)))
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.intp, packed, types.intp), generate


@intrinsic
def add_products(_typing, packed, start, steps, codes, queries, shifts, sums, places, add):
    """In a compiled loop: compute the products of TOGETHER queries with GROUPS groups of rows.

    packed: uint32, the groups from `start` on, of `steps` * LANES numbers each. codes: int8; queries: where those of each
    query start; shifts: what to subtract from its products. sums: int32; places: where the products of each query are written,
    one per row, added to what is there if `add`. Does nothing where `has_vnni` is false.
    """

    def generate(context, builder, signature, arguments):
        if not _HAS_VNNI:
            return context.get_dummy_value()
        data = [context.make_array(signature.args[place])(context, builder, arguments[place]).data for place in (0, 3, 6)]
        queries, shifts, places = (cgutils.unpack_tuple(builder, arguments[place]) for place in (4, 5, 7))
        packed, codes, sums = (
            builder.bitcast(one, kind.as_pointer()) for one, kind in zip(data, (WORD, BYTE, WORD), strict=True)
        )
        kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")

        group = builder.mul(arguments[2], PLACE(LANES))
        groups = [builder.add(arguments[1], builder.mul(group, PLACE(count))) for count in range(GROUPS)]
        totals = [
            [cgutils.alloca_once_value(builder, repeat(builder, builder.neg(shift), LANES)) for _ in groups] for shift in shifts
        ]
        with cgutils.for_range(builder, arguments[2]) as loop:
            step, column = (builder.mul(loop.index, PLACE(size)) for size in (LANES, STEP))
            rows = [load(builder, packed, builder.add(one, step), VECTOR) for one in groups]
            for query, own in zip(queries, totals, strict=True):
                four = repeat(builder, load(builder, codes, builder.add(query, column), WORD), LANES)
                for total, some in zip(own, rows, strict=True):
                    builder.store(builder.call(multiply, [builder.load(total), some, four]), total)

        outs = [builder.add(place, PLACE(LANES * count)) for place in places for count in range(GROUPS)]
        found = [builder.load(total) for own in totals for total in own]
        with builder.if_else(builder.trunc(arguments[8], ir.IntType(1))) as (adding, writing):
            with adding:
                before = [load(builder, sums, out, VECTOR) for out in outs]  # all first, as places can be repeated
                for out, total, old in zip(outs, found, before, strict=True):
                    store(builder, builder.add(total, old), sums, out)
            with writing:
                for out, total in zip(outs, found, strict=True):
                    store(builder, total, sums, out)
        return context.get_dummy_value()

    each, numbers = types.UniTuple(types.intp, TOGETHER), types.UniTuple(types.int32, TOGETHER)
    return types.void(packed, types.intp, types.intp, codes, each, numbers, sums, each, types.boolean), generate


@intrinsic
def dot(_typing, values, place, codes, row, start, lines):
    """In a compiled loop: the product of LINE * lines numbers from `start` on of a row of int16 (B, W) and one of int8 (N, W).

    0 where `has_vnni` is false.
    """

    def generate(context, builder, signature, arguments):
        if not _HAS_VNNI:
            return WORD(0)
        ends = []
        for at, own, kind in ((0, arguments[1], HALF), (2, arguments[3], BYTE)):
            array = context.make_array(signature.args[at])(context, builder, arguments[at])
            width = cgutils.unpack_tuple(builder, array.shape)[1]
            data = builder.bitcast(array.data, kind.as_pointer())
            ends.append((data, builder.add(builder.mul(own, width), arguments[4])))
        (left, left_at), (right, right_at) = ends
        kind = ir.FunctionType(VECTOR, [VECTOR, VECTOR, VECTOR])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpwssd.512")
        zero = ir.Constant(VECTOR, [0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2)]
        with cgutils.for_range(builder, arguments[5]) as loop:
            at = builder.mul(loop.index, PLACE(LINE))
            for half, total in enumerate(totals):
                own = builder.add(at, PLACE(half * LINE // 2))
                narrow = load(builder, right, builder.add(right_at, own), ir.VectorType(BYTE, LINE // 2))
                wide = builder.bitcast(builder.sext(narrow, ir.VectorType(HALF, LINE // 2)), VECTOR)
                some = load(builder, left, builder.add(left_at, own), VECTOR)
                builder.store(builder.call(multiply, [builder.load(total), some, wide]), total)
        both = builder.add(*(builder.load(total) for total in totals))
        kind = ir.FunctionType(WORD, [VECTOR])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.add.v16i32"), [both])

    return types.int32(values, types.intp, codes, types.intp, types.intp, types.intp), generate


@intrinsic
def keep(_typing, products, query, factors, floor, own, size, base, pairs, count):
    """In a compiled loop: find the rows whose upper bound reaches the floor; returns the new `count` of pairs.

    products: int32 (Q, R), of which the row `query` is read. factors: float32, the query's step, change, moved and tail (see
    survivors). floor: float32. own: float32 (R,), the rows' scales, lengths, tails and offsets. Of the first `size` rows,
    `base` plus their places are written into pairs, uint32, from `count` on. Rows are read up to a multiple of LANES, and up to
    LANES numbers are written beyond the new count. A bound that is not a number reaches the floor.
    """

    def generate(context, builder, signature, arguments):
        source, target = (context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 7))
        high = cgutils.unpack_tuple(builder, source.strides)[0]
        row = builder.gep(builder.bitcast(source.data, BYTE.as_pointer()), [builder.mul(high, arguments[1])])
        rows = [
            context.make_array(signature.args[4].dtype)(context, builder, one).data
            for one in cgutils.unpack_tuple(builder, arguments[4])
        ]
        step, change, moved, tail = (repeat(builder, one, LANES) for one in cgutils.unpack_tuple(builder, arguments[2]))
        least, lanes = repeat(builder, arguments[3], LANES), ir.Constant(VECTOR, list(range(LANES)))
        size, base = (repeat(builder, builder.trunc(arguments[at], WORD), LANES) for at in (5, 6))
        found = cgutils.alloca_once_value(builder, arguments[8])
        kind = ir.FunctionType(VECTOR, [VECTOR, MASK, VECTOR])
        compress = cgutils.get_or_insert_function(builder.module, kind, f"llvm.experimental.vector.compress.v{LANES}i32")
        kind = ir.FunctionType(ir.IntType(LANES), [ir.IntType(LANES)])
        number = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.i{LANES}")
        fast = ("contract",)
        groups = builder.udiv(builder.add(arguments[5], PLACE(LANES - 1)), PLACE(LANES))
        with cgutils.for_range(builder, groups) as loop:
            first = builder.mul(loop.index, PLACE(LANES))
            scales, lengths, tails, offsets = (load(builder, one, first, REALS) for one in rows)
            whole = load(builder, builder.bitcast(row, WORD.as_pointer()), first, VECTOR)
            known = builder.fadd(builder.fmul(step, builder.sitofp(whole, REALS), flags=fast), change, flags=fast)
            bound = builder.fsub(builder.fmul(known, scales, flags=fast), offsets, flags=fast)
            for left, right in ((moved, lengths), (tail, tails)):
                bound = builder.fadd(bound, builder.fmul(left, right, flags=fast), flags=fast)
            places = builder.add(repeat(builder, builder.trunc(first, WORD), LANES), lanes)
            reaches = builder.and_(builder.fcmp_unordered(">=", bound, least), builder.icmp_signed("<", places, size))
            chosen = builder.call(compress, [builder.add(places, base), reaches, ir.Constant(VECTOR, ir.Undefined)])
            so_far = builder.load(found)
            store(builder, chosen, builder.bitcast(target.data, WORD.as_pointer()), so_far)
            more = builder.call(number, [builder.bitcast(reaches, ir.IntType(LANES))])
            builder.store(builder.add(so_far, builder.zext(more, PLACE)), found)
        return builder.load(found)

    arrays = types.UniTuple(types.Array(types.float32, 1, "C"), 4)
    reals = types.UniTuple(types.float32, 4)
    return types.intp(products, types.intp, reals, types.float32, arrays, types.intp, types.intp, pairs, types.intp), generate
