"""The gradients of depthwise convolutions in bfloat16, compiled by Numba: oneDNN takes more than twice as long.

All three are computed together, block by block of a picture's channels, so that each block is read from memory once.
"""

# mypy: allow-untyped-defs
# ruff: noqa: ARG001 (intrinsics get their arguments in `generate`)
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..compiled import compiled, load, repeat, store

LANES = 16  # channels of a block, one in each lane of a vector
TOGETHER = 4  # places of the inputs' gradient that are computed at a time, so that their sums stay in registers
LINE = 32  # bfloat16 numbers in a cache line
HALF, WORD, PLACE, REAL = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
HALVES, WORDS, REALS = (ir.VectorType(kind, LANES) for kind in (HALF, WORD, REAL))


def gradients(
    gradient: Tensor,
    output: Tensor | None,
    limit: float | None,
    inputs: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    back: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of the inputs, bfloat16 (B, C, H, W), None unless `back`; of the weights and of the biases, float32.

    `gradient`: of the outputs, bfloat16 (B, C, P, Q). `output`: the outputs, if they were clamped to 0..`limit`; otherwise
    both are None. `inputs`: bfloat16 (B, C, H, W). `weight`: (C, 1, K, L). `padding`: zeros above and to the left of the
    inputs, at least 0; there are as many below and to the right as the outputs need.
    """
    channels, _, height, width = weight.shape
    if channels < LANES:
        more = LANES - channels
        wide = [None if one is None else F.pad(one, (0, 0, 0, 0, 0, more)) for one in (gradient, output, inputs)]
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, more))
        first, *rest = gradients(wide[0], wide[1], limit, wide[2], weight, stride, padding, back)  # type: ignore[arg-type]
        return (None if first is None else first[:, :channels], *(one[:channels] for one in rest))  # type: ignore[return-value]
    starts = np.minimum(np.arange(0, channels, LANES), channels - LANES)  # the last two blocks can overlap
    lanes = starts[:, None] + np.arange(LANES)
    weights = np.ascontiguousarray(weight.detach().float().numpy()[lanes, 0].transpose(0, 2, 3, 1))
    shapes = [(one.shape[2], one.shape[3]) for one in (inputs, gradient)]
    found = torch.empty_like(inputs, memory_format=torch.channels_last) if back else None
    arrays = [_bits(one) for one in (inputs, gradient, gradient if output is None else output, found)]
    threads = max(1, min(torch.get_num_threads(), len(inputs)))
    sums = np.zeros((threads, *weights.shape), np.float32)
    shifts = np.zeros((threads, len(starts), LANES), np.float32)

    def work(number: int) -> None:
        part = slice(number * len(inputs) // threads, (number + 1) * len(inputs) // threads)
        own = *(one[part] for one in arrays), starts, weights, sums[number], shifts[number]
        _add_gradients(*own, -1.0 if limit is None else limit, *shapes, tuple(stride), tuple(padding), (0,) * width)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    change, shift = np.empty((channels, height, width), np.float32), np.empty(channels, np.float32)
    change[lanes], shift[lanes] = sums.sum(axis=0).transpose(0, 3, 1, 2), shifts.sum(axis=0)
    return found, torch.from_numpy(change)[:, None], torch.from_numpy(shift)


def _bits(tensor: Tensor | None) -> np.ndarray:
    """Of bfloat16 (B, C, H, W) in any layout: uint16 (B, H * W * C); empty for None."""
    if tensor is None:
        return np.empty((0, 0), np.uint16)
    return tensor.permute(0, 2, 3, 1).contiguous().view(torch.uint16).flatten(1).numpy()


@compiled
def _add_gradients(inputs, gradient, output, back, starts, weights, sums, shifts, limit, size, made, stride, padding, taps):
    """Write the gradient of the inputs into back, and add to sums, float32 (blocks, K, L, LANES), and shifts, (blocks, LANES).

    The first four: uint16 (B, H * W * C) and (B, P * Q * C). weights: like sums. limit: negative if outputs were not clamped.
    size: H, W; made: P, Q. taps: a tuple of L numbers, as the compiled code depends on how many there are.
    """
    (height, width), (rows, columns), (down, right), (top, left) = size, made, stride, padding
    channels, kernel = inputs.shape[1] // (height * width), weights.shape[1]
    # A block of one picture's inputs, and of its gradient, in float32 with zeros at both ends of each row.
    own_width = max(left + width, (columns - 1) * right + len(taps))
    own = np.zeros(height * own_width * LANES, np.float32)
    border = len(taps)
    rest_width = border + max(columns, (width - 1 + left) // right + 1)
    rest = np.zeros((rows * rest_width + TOGETHER) * LANES, np.float32)
    seen = 0
    for picture in range(inputs.shape[0]):
        for array in (inputs, gradient, output, back):
            seen += _read(array, picture)
        for block in range(starts.size):
            start, first_weight = starts[block], block * kernel * len(taps) * LANES
            for y in range(height):
                widen(inputs[picture], y * width * channels + start, channels, width, own, (y * own_width + left) * LANES)
            for row in range(rows):
                at, place = row * columns * channels + start, (row * rest_width + border) * LANES
                widen_clamped(gradient[picture], output[picture], limit, at, channels, columns, rest, place, shifts[block])

            for i in range(kernel):  # input y = row * down + i - top
                first, last = max(0, -((i - top) // down)), min(rows, (height - 1 + top - i) // down + 1)
                at, place = (first * down + i - top) * own_width * LANES, (first * rest_width + border) * LANES
                steps = (own_width * down * LANES, right * LANES, rest_width * LANES)
                counts = (max(0, last - first), columns)
                correlate(own, at, rest, place, steps, counts, taps, sums.reshape(-1), first_weight + i * len(taps) * LANES)

            for y in range(height if back.size else 0):  # y = row * down + i - top, so every down-th row i of the kernel
                row, i = (y + top) // down, (y + top) % down
                first, last = max(0, row - rows + 1), min((kernel - 1 - i) // down, row)
                for x in range(min(right, width)):  # likewise, for every right-th column of the inputs together
                    column, j = (x + left) // right, (x + left) % right
                    at = ((row - first) * rest_width + border + column) * LANES
                    place = first_weight + ((i + first * down) * len(taps) + j) * LANES
                    steps = (rest_width * LANES, down * len(taps) * LANES, right * LANES)
                    counts = (max(0, last - first + 1), (len(taps) - 1 - j) // right + 1)
                    out, many = (y * width + x) * channels + start, (width - 1 - x) // right + 1
                    convolve(rest, at, weights.reshape(-1), place, steps, counts, back[picture], out, right * channels, many)
    return seen


@compiled
def _read(array, row):
    """Read a row in order, which brings it into the caches several times as fast as reading some channels of every place.

    Returns a sum, as the compiler would otherwise leave it out. `prefetch` is no substitute: processors drop many of its
    requests.
    """
    total = 0
    for column in range(0, array.shape[1], LINE):
        total += array[row, column]
    return total


@intrinsic
def widen(_typing, halves, start, step, count, reals, place):
    """In a compiled loop: widen `count` times LANES bfloat16 numbers, from `start` on and `step` apart, to float32 numbers.

    They are written into reals, from `place` on.
    """

    def generate(context, builder, signature, arguments):
        source, target = _data(context, builder, signature, arguments, 0, 4)
        with cgutils.for_range(builder, arguments[3]) as loop:
            some = load(builder, source, _further(builder, arguments[1], loop.index, arguments[2]), HALVES)
            store(builder, _widened(builder, some), target, _further(builder, arguments[5], loop.index))
        return context.get_dummy_value()

    return types.void(halves, types.intp, types.intp, types.intp, reals, types.intp), generate


@intrinsic
def widen_clamped(_typing, halves, outputs, limit, start, step, count, reals, place, sums):
    """In a compiled loop: `widen` where outputs are between 0 and `limit`, else 0, or everywhere if it is negative.

    Adds what it writes to sums, float32 (LANES,).
    """

    def generate(context, builder, signature, arguments):
        source, made, target, sums = _data(context, builder, signature, arguments, 0, 1, 6, 8)
        zero, most = ir.Constant(REALS, [0.0] * LANES), repeat(builder, arguments[2], LANES)
        free = builder.fcmp_ordered("<", most, zero)
        total = cgutils.alloca_once_value(builder, load(builder, sums, PLACE(0), REALS))
        with cgutils.for_range(builder, arguments[5]) as loop:
            at = _further(builder, arguments[3], loop.index, arguments[4])
            some, output = (_widened(builder, load(builder, one, at, HALVES)) for one in (source, made))
            inside = builder.and_(builder.fcmp_ordered(">", output, zero), builder.fcmp_ordered("<", output, most))
            kept = builder.select(builder.or_(free, inside), some, zero)
            store(builder, kept, target, _further(builder, arguments[7], loop.index))
            builder.store(builder.fadd(builder.load(total), kept), total)
        store(builder, builder.load(total), sums, PLACE(0))
        return context.get_dummy_value()

    kinds = halves, outputs, types.float32, types.intp, types.intp, types.intp, reals, types.intp, sums
    return types.void(*kinds), generate


@intrinsic
def correlate(_typing, own, start, rest, at, steps, counts, taps, sums, place):
    """In a compiled loop: add to sums, from `place` on, the sums of products of `own` and `rest`, for each of the taps.

    They are read from `start` and `at` on, `own` LANES numbers later for each further tap. counts: of rows and columns. steps:
    from one row of `own`, one column of it, and one row of `rest` to the next; columns of that are LANES apart.
    """

    def generate(context, builder, signature, arguments):
        own, rest, sums = _data(context, builder, signature, arguments, 0, 2, 7)
        (down, right, below), (rows, columns) = (cgutils.unpack_tuple(builder, arguments[place]) for place in (4, 5))
        outs = [_further(builder, arguments[8], PLACE(tap)) for tap in range(len(signature.args[6]))]
        totals = [cgutils.alloca_once_value(builder, load(builder, sums, out, REALS)) for out in outs]
        with cgutils.for_range(builder, rows) as row:
            first, other = _further(builder, arguments[1], row.index, down), _further(builder, arguments[3], row.index, below)
            with cgutils.for_range(builder, columns) as column:
                factor = load(builder, rest, _further(builder, other, column.index), REALS)
                here = _further(builder, first, column.index, right)
                for tap, total in enumerate(totals):
                    _add_product(builder, total, load(builder, own, _further(builder, here, PLACE(tap)), REALS), factor)
        for total, out in zip(totals, outs, strict=True):
            store(builder, builder.load(total), sums, out)
        return context.get_dummy_value()

    places = types.UniTuple(types.intp, 3), types.UniTuple(types.intp, 2)
    return types.void(own, types.intp, rest, types.intp, *places, taps, sums, types.intp), generate


@intrinsic
def convolve(_typing, rest, start, weights, at, steps, counts, halves, place, step, many):
    """In a compiled loop: write `many` vectors of sums of products as bfloat16 numbers, from `place` on and `step` apart.

    The products are of weights, from `at` on, and of `rest`, from `start` on and backwards, both LANES numbers later for each
    further vector. counts: of rows and columns. steps: from one row of `rest`, one row of weights, and one column of these to
    the next; columns of `rest` are LANES apart.
    """

    def generate(context, builder, signature, arguments):
        rest, weights, halves = _data(context, builder, signature, arguments, 0, 2, 6)
        (above, down, right), (rows, columns) = (cgutils.unpack_tuple(builder, arguments[place]) for place in (4, 5))
        zero = ir.Constant(REALS, [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(TOGETHER)]
        turns = builder.sdiv(builder.add(arguments[9], PLACE(TOGETHER - 1)), PLACE(TOGETHER))
        with cgutils.for_range(builder, turns) as turn:
            begin = builder.mul(turn.index, PLACE(TOGETHER))
            for total in totals:
                builder.store(zero, total)
            with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, columns) as column:
                tap = _further(builder, _further(builder, arguments[3], row.index, down), column.index, right)
                factor = load(builder, weights, tap, REALS)
                here = builder.sub(_further(builder, arguments[1], begin), builder.mul(row.index, above))
                here = _further(builder, here, builder.neg(column.index))
                for number, total in enumerate(totals):
                    _add_product(builder, total, load(builder, rest, _further(builder, here, PLACE(number)), REALS), factor)
            for number, total in enumerate(totals):
                own = builder.add(begin, PLACE(number))
                with builder.if_then(builder.icmp_signed("<", own, arguments[9])):
                    some = _narrowed(builder, builder.load(total))
                    store(builder, some, halves, _further(builder, arguments[7], own, arguments[8]))
        return context.get_dummy_value()

    places = types.UniTuple(types.intp, 3), types.UniTuple(types.intp, 2)
    return types.void(rest, types.intp, weights, types.intp, *places, halves, types.intp, types.intp, types.intp), generate


def _data(context, builder, signature, arguments, *places):
    """Pointers to the first numbers of the arrays at these places of the arguments."""
    kinds = {types.uint16: HALF, types.float32: REAL}
    arrays = {place: context.make_array(signature.args[place])(context, builder, arguments[place]) for place in places}
    return [builder.bitcast(array.data, kinds[signature.args[place].dtype].as_pointer()) for place, array in arrays.items()]


def _further(builder, place, count, step=PLACE(LANES)):  # noqa: B008 (a constant)
    return builder.add(place, builder.mul(count, step))


def _add_product(builder, total, one, other):
    fast = ("contract",)  # one instruction
    builder.store(builder.fadd(builder.load(total), builder.fmul(one, other, flags=fast), flags=fast), total)


def _widened(builder, halves):
    """From bits of bfloat16 numbers to float32."""
    return builder.bitcast(builder.shl(builder.zext(halves, WORDS), ir.Constant(WORDS, [16] * LANES)), REALS)


def _narrowed(builder, reals):
    """From float32 to bits of the nearest bfloat16 numbers; of two equally near ones, the even one."""
    sixteen, one, below_half = (ir.Constant(WORDS, [number] * LANES) for number in (16, 1, 0x7FFF))
    bits = builder.bitcast(reals, WORDS)
    odd = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.lshr(builder.add(bits, builder.add(odd, below_half)), sixteen)
    invalid = builder.fcmp_unordered("uno", reals, reals)
    return builder.trunc(builder.select(invalid, ir.Constant(WORDS, [0x7FC0] * LANES), rounded), HALVES)
