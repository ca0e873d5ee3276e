"""Compiled loops that compare queries with the int8 codes of rows (see leading.py), tile by tile.

A tile is ROWS rows and QUERIES queries, whose products stay in a core's caches. Where the processor has VNNI and there are many
queries, the tile's codes are packed and multiplied with all of them; and if many of its rows are left for a query, so are its
next codes.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, prefetch
from .vectors import LANES, LINE, STEP, TALL, TOGETHER, add_products, dot, keep, pack

ROWS, QUERIES = 512, 64
MANY = 1 / 8  # share of a tile's rows that must be left for a query to multiply the next block with all of them
AHEAD = 8  # how many rows ahead codes are requested from memory


@compiled
def _dot(values, codes):  # type: ignore[no-untyped-def]
    """The product of whole numbers, int8 or int16 (W,) and int8 (W,)."""
    total = np.int32(0)
    for column in range(values.shape[0]):
        total = np.int32(total + np.int32(np.int32(values[column]) * np.int32(codes[column])))
    return total


@compiled
def _copy(source, target):  # type: ignore[no-untyped-def]
    """As target[:] = source[: len(target)], for which Numba compiles the texts of errors, which takes seconds."""
    for place in range(target.shape[0]):
        target[place] = source[place]


@compiled
def _multiply(queries, rows, block, tile, asked, count, sums, packed, ready):  # type: ignore[no-untyped-def]
    """Add the products of codes in a block of dimensions to sums, int32 (QUERIES, ROWS); those in the first block are written.

    tile: its first query, and its range of rows. asked: int64, `count` of its queries, counted from the first one, and room for
    TOGETHER more. packed: room for a tile's packed codes, of length 0 if they are not to be packed. ready: uint8 (blocks,),
    which blocks are packed already.
    """
    query, first, end = tile
    start, stop = rows.edges[block], rows.edges[block + 1]
    width, size, add = stop - start, end - first, block > 0
    codes, left = (rows.codes, start) if add else (rows.lead, 0)
    if packed.shape[0] == 0:
        for place in asked[:count]:
            values, out = queries.wide[query + place, start:stop], sums[place]
            for row in range(size):
                for line in range(left, left + width, LINE):
                    prefetch(codes, first + row + AHEAD, line)
                product = _dot(values, codes[first + row, left : left + width])
                out[row] = np.int32(out[row] + product) if add else product
        return
    begin, steps = ROWS * (start // STEP + block), -(-width // STEP)
    if not ready[block]:
        pack(codes[first:end, left : left + width], begin, packed)
        ready[block] = 1
    asked[count : count + TOGETHER] = asked[count - 1]  # multiplied again, but what is stored is the same
    numbers, totals, wide = queries.codes.reshape(-1), sums.reshape(-1), queries.codes.shape[1]
    shifts, at = queries.shifts[query:, block], query * wide + start
    for row in range(0, size, TALL):
        for number in range(0, count, TOGETHER):
            a, b, c, d = asked[number], asked[number + 1], asked[number + 2], asked[number + 3]
            add_products(
                packed, begin + row * steps, steps,
                numbers, (at + a * wide, at + b * wide, at + c * wide, at + d * wide),
                (shifts[a], shifts[b], shifts[c], shifts[d]),
                totals, (a * ROWS + row, b * ROWS + row, c * ROWS + row, d * ROWS + row), add,
            )  # fmt: skip


@compiled
def products(queries, rows, some, found, packed):  # type: ignore[no-untyped-def]
    """Write the products of codes in the first block, of all queries and a range of rows, into found, int32 (B, R).

    some: the range of rows, and the row of the first column of `found`. packed: see _multiply.
    """
    start, end, origin = some
    asked, ready = np.empty(QUERIES + TOGETHER, np.int64), np.zeros(rows.tails.shape[0], np.uint8)
    sums = np.empty((QUERIES, ROWS), np.int32)
    for first in range(start, end, ROWS):
        last = min(first + ROWS, end)
        ready[:] = 0
        for query in range(0, queries.codes.shape[0], QUERIES):
            count = min(QUERIES, queries.codes.shape[0] - query)
            for place in range(count):
                asked[place] = place
            _multiply(queries, rows, 0, (query, first, last), asked, count, sums, packed, ready)
            for place in range(count):
                _copy(sums[place], found[query + place, first - origin : last - origin])


@compiled
def _finish(queries, rows, done, known, corner, floor, pairs, count, sums, vnni):  # type: ignore[no-untyped-def]
    """Of pairs whose products are known in `done` blocks, keep those whose bounds reach the floor after each of the others.

    known: these products, int32 (QUERIES, ROWS). corner: the tile's first query and row. pairs: uint32, `count` numbers ROWS *
    query + row, both counted from the corner, and AHEAD more. The pairs that remain are written over them, and their number is
    returned. sums: int32, room for `count`.
    """
    query, first = corner
    codes, fine, blocks = rows.codes, queries.fine, rows.tails.shape[0]
    here, there = slice(query, query + QUERIES), slice(first, first + ROWS)
    scales, lengths, offsets, least = rows.scales[there], rows.tails[0, there], rows.offsets[there], floor[here]
    steps, fine_steps = queries.steps[here], queries.fine_steps[here]
    change, moved, tail = np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32), np.empty(QUERIES, np.float32)
    sums[:count] = 0
    # First the blocks that are not known yet, then the known ones again; both with the finer codes of queries.
    for block in range(done, blocks + 1):
        # The bound covers the blocks before `through`, the known ones with coarse codes of the query if `coarse`.
        if block < blocks:
            start, end, through, coarse = rows.edges[block], rows.edges[block + 1], block + 1, np.float32(1)
        else:
            start, end, through, coarse = 0, rows.edges[done], blocks, np.float32(0)
        tails = rows.tails[through % blocks, there]
        for place in range(least.shape[0]):
            one = query + place
            change[place] = queries.reach[one, through] * rows.errors[through]
            moved[place] = coarse * queries.moved[one, done] + queries.missed[one]
            tail[place] = queries.tails[one, through]
        lines = (end - start) // LINE if vnni else 0
        whole = start + lines * LINE
        for number in range(count):
            ahead = first + pairs[number + AHEAD] % ROWS
            for column in range(start, end, LINE):
                prefetch(codes, ahead, column)
            one, row = query + pairs[number] // ROWS, first + pairs[number] % ROWS
            sums[number] += dot(fine, one, codes, row, start, lines)
            if whole < end:
                sums[number] += _dot(fine[one, whole:end], codes[row, whole:end])
        last, count = count, 0
        for number in range(last):
            pair = pairs[number]
            who, row = pair // ROWS, pair % ROWS
            total = fine_steps[who] * np.float32(sums[number]) + coarse * steps[who] * np.float32(known[who, row])
            bound = scales[row] * (total + change[who]) + moved[who] * lengths[row] + tail[who] * tails[row] - offsets[row]
            pairs[count], sums[count] = pair, sums[number]
            count += not bound < least[who]
    return count


@compiled
def survivors(queries, rows, floor, some, known, packed, vnni, found):  # type: ignore[no-untyped-def]
    """The pairs of query and row whose upper bounds reach the floor, however many blocks of dimensions are known.

    queries, rows: see comparison.QueryCodes and RowCodes; floor: float32 (B,). some: the range of rows, and the row of the
    first column of `known`, which holds what `products` wrote, or has no column. packed: see _multiply. vnni: whether to use it
    for single rows. Writes query and row of each pair into found, int64 (2, P), tile by tile, each query's rows in order;
    returns their number, or -1 if found is too small.
    """
    start, end, origin = some
    number, blocks, ready = 0, rows.tails.shape[0], np.zeros(rows.tails.shape[0], np.uint8)
    pairs, sums = np.zeros(QUERIES * ROWS + LANES + AHEAD, np.uint32), np.empty(QUERIES * ROWS, np.int32)
    asked, scores = np.empty(QUERIES + TOGETHER, np.int64), np.empty((QUERIES, ROWS), np.int32)
    scales, offsets, tails = np.zeros(ROWS, np.float32), np.zeros(ROWS, np.float32), np.zeros((blocks, ROWS), np.float32)
    for first in range(start, end, ROWS):
        last = min(first + ROWS, end)
        size = last - first
        _copy(rows.scales[first:], scales[:size])
        _copy(rows.offsets[first:], offsets[:size])
        for block in range(blocks):
            _copy(rows.tails[block, first:], tails[block, :size])
        ready[:] = 0
        for query in range(0, queries.codes.shape[0], QUERIES):
            count, done = min(QUERIES, queries.codes.shape[0] - query), 0
            for place in range(count):
                asked[place] = place
            while count:
                if done == 0 and known.shape[1]:
                    for place in range(count):
                        _copy(known[query + place, first - origin :], scores[place, :size])
                else:
                    _multiply(queries, rows, done, (query, first, last), asked, count, scores, packed, ready)
                done += 1
                own = scales, tails[0], tails[done % blocks], offsets
                many, count, left = count, 0, 0
                for place in asked[:many]:
                    one = query + place
                    change = queries.reach[one, done] * rows.errors[done]
                    factors = queries.steps[one], change, queries.moved[one, done], queries.tails[one, done]
                    reached = keep(scores, place, factors, floor[one], own, size, place * ROWS, pairs, left)
                    if done < blocks and packed.shape[0] and reached - left > MANY * size:
                        asked[count] = place
                        count += 1
                    else:
                        left = reached
                left = _finish(queries, rows, done, scores, (query, first), floor, pairs, left, sums, vnni)
                if number + left > found.shape[1]:
                    return -1
                for pair in pairs[:left]:
                    found[0, number], found[1, number] = query + pair // ROWS, first + pair % ROWS
                    number += 1
    return number
