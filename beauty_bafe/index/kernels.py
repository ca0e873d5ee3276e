"""Compiled loops of the exact search (Numba). They release the GIL; callers split the work among threads.

B queries, N rows of D dimensions; R rows are compared at a time.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled, prefetch

CHUNK = 4096  # scores compared at a time: a multiple of 8 that fits a processor's first cache
GROUP = 64  # rows of which `best_of_groups` reports the best
BOUNDS = 2048  # bounds computed at a time: a multiple of 8 that fits a processor's first cache with the numbers of its rows
AHEAD = 8  # how many rows ahead codes are requested from memory


@compiled
def _dot(values, codes):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for column in range(values.shape[0]):
        total += values[column] * np.float32(codes[column])
    return total


@compiled
def best_of_groups(products, scales, some, best):  # type: ignore[no-untyped-def]
    """Of each group of rows, the first whose product, int32 (B, R), times its scale, float32 (R,), is the highest.

    some: the range of groups. Written into best, int64 (B, ceil(R / GROUP)).
    """
    orders = np.empty(GROUP, np.int32)  # the bits of scores, in the order of these: maxima of whole numbers are vectorised
    scores = orders.view(np.float32)
    for query in range(products.shape[0]):
        for group in range(some[0], some[1]):
            start = group * GROUP
            own, factors = products[query, start : start + GROUP], scales[start : start + GROUP]
            size, highest = own.shape[0], np.int32(-(1 << 31))
            for row in range(size):
                score = np.float32(own[row]) * factors[row]
                scores[row] = score if score > -np.inf else -np.inf
            for row in range(size):
                orders[row] ^= (orders[row] >> np.int32(31)) & np.int32(0x7FFFFFFF)
                highest = max(highest, orders[row])
            first = np.int32(size)
            for row in range(size):
                first = min(first, np.int32(row) if orders[row] == highest else np.int32(size))
            best[query, group] = start + first


@compiled
def small_products(values, codes, products):  # type: ignore[no-untyped-def]
    """Products of a few queries' codes, as float32 (B, W), with those of rows, int8 (R, W): written into int32 (B, R)."""
    width = codes.shape[1]
    for start in range(0, codes.shape[0], GROUP):
        some = codes[start : start + GROUP]
        for query in range(values.shape[0]):
            own, out = values[query], products[query, start : start + GROUP]
            for row in range(some.shape[0]):
                for line in range(0, width, 64):
                    prefetch(some, row + AHEAD, line)
                out[row] = np.int32(_dot(own, some[row]))


@compiled
def reaching(scores, halves, floor, some, found):  # type: ignore[no-untyped-def]
    """The pairs of query and row whose score reaches the floor, float32 (B,).

    scores: float32 (B, R). halves: None; or the bits of bfloat16 numbers, uint16 (B, R), which are used instead. some, found
    and what is returned: see survivors.
    """
    query_start, query_end, start, end = some
    count, bits = 0, np.empty(CHUNK, np.uint32)
    values = bits.view(np.float32)
    flags = np.zeros(CHUNK, np.uint8)  # one byte each, so that eight are tested as one uint64
    eights = flags.view(np.uint64)
    for query in range(query_start, query_end):
        least = floor[query]
        for first in range(start, end, CHUNK):
            size = min(CHUNK, end - first)
            if halves is None:
                own = scores[query, first : first + size]
                for column in range(size):
                    flags[column] = own[column] >= least
            else:
                half = halves[query, first : first + size]
                for column in range(size):
                    bits[column] = np.uint32(half[column]) << np.uint32(16)
                for column in range(size):
                    flags[column] = values[column] >= least
            for eight in range(-(-size // 8)):
                if eights[eight] == 0:
                    continue
                for column in range(8 * eight, min(8 * eight + 8, size)):
                    if flags[column] == 0:
                        continue
                    if count == found.shape[1]:
                        return -1
                    found[0, count], found[1, count] = query, first + column
                    count += 1
    return count


@compiled
def _flag(products, done, query, queries, rows, floor, first, flags):  # type: ignore[no-untyped-def]
    """Whether the upper bounds of rows from `first` on, whose products are int32 (R,), reach the floor: uint8 (R,)."""
    here = slice(first, first + products.shape[0])
    step, change = queries.steps[query], queries.reach[query, done] * rows.errors[done]
    moved, tail, blocks = queries.moved[query, done], queries.tails[query, done], rows.tails.shape[0]
    scales, offsets = rows.scales[here], rows.offsets[here]
    lengths, tails = rows.tails[0, here], rows.tails[done % blocks, here]
    for column in range(products.shape[0]):
        known = scales[column] * (step * np.float32(products[column]) + change)
        bound = known + moved * lengths[column] + tail * tails[column] - offsets[column]
        flags[column] = not bound < floor  # NaN must not rule out a row


@compiled
def surviving_share(products, done, queries, rows, floor, first, every):  # type: ignore[no-untyped-def]
    """The share of pairs of query and row that `done` blocks leave, estimated from each `every`-th query and chunk of rows."""
    flags = np.empty(BOUNDS, np.uint8)
    left, compared, number = 0, 0, 0
    for query in range(products.shape[0]):
        for start in range(0, products.shape[1], BOUNDS):
            number += 1
            if number % every != 1 % every:
                continue
            own = products[query, start : start + BOUNDS]
            _flag(own, done, query, queries, rows, floor[query], first + start, flags[: own.shape[0]])
            compared += own.shape[0]
            for flag in flags[: own.shape[0]]:
                left += flag
    return left / max(compared, 1)


@compiled
def _flagged(flags, groups, columns):  # type: ignore[no-untyped-def]
    """Writes where flags, uint8 (64 * G,), are set into columns, int64 (at least 64 * G + 1,), and returns their number.

    groups: int64 (2, 8 * G + 1), room for the groups of 64 and of 8 in which a flag is set. No branch depends on a flag, as
    processors would guess it wrong.
    """
    eights, sixty_fours, few, count = flags.view(np.uint64), 0, 0, 0
    for group in range(eights.shape[0] // 8):
        some = np.uint64(0)
        for eight in eights[8 * group : 8 * group + 8]:
            some |= eight
        groups[0, sixty_fours] = group
        sixty_fours += some != 0
    for group in groups[0, :sixty_fours]:
        for eight in range(8 * group, 8 * group + 8):
            groups[1, few] = eight
            few += eights[eight] != 0
    for eight in groups[1, :few]:
        for column in range(8 * eight, 8 * eight + 8):
            columns[count] = column
            count += flags[column]
    return count


@compiled
def survivors(products, done, queries, rows, floor, first, some, found):  # type: ignore[no-untyped-def]
    """The pairs of query and row whose upper bound reaches the floor, after as many blocks of dimensions as that takes.

    products: of the codes of queries and rows in the first `done` blocks, int32 (B, R). queries, rows: see
    comparison.QueryCodes and RowCodes; floor: float32 (B,). The rows that are compared are those from `first` on. some: the
    ranges of queries and of rows among these, (start, end, start, end). Writes query and row of each pair into found, int64
    (2, P), ordered; returns their number, or -1 if found is too small.
    """
    query_start, query_end, row_start, row_end = some
    count, blocks = 0, rows.tails.shape[0]
    flags, groups = np.zeros(BOUNDS, np.uint8), np.empty((2, BOUNDS // 8 + 1), np.int64)
    left, sums = np.zeros(BOUNDS + AHEAD, np.int64), np.empty(BOUNDS, np.float32)
    for query in range(query_start, query_end):
        step, least = queries.steps[query], floor[query]
        for start in range(row_start, row_end, BOUNDS):
            own, top = products[query, start : min(start + BOUNDS, row_end)], first + start
            _flag(own, done, query, queries, rows, least, top, flags[: own.shape[0]])
            flags[own.shape[0] :] = 0
            remaining = _flagged(flags[: -(-own.shape[0] // 64) * 64], groups, left)
            if remaining == 0:
                continue
            sums[:remaining] = 0
            # First the blocks that are not known yet, then the known ones again; both with queries that are not rounded.
            for block in range(done, blocks + 1):
                # The bound covers the blocks before `through`, the known ones with rounded queries if `coded`.
                if block < blocks:
                    begin, end, through, coded = rows.edges[block], rows.edges[block + 1], block + 1, 1
                else:
                    begin, end, through, coded = 0, rows.edges[done], blocks, 0
                values, codes = queries.values[query, begin:end], rows.codes
                factor, moved = coded * step, coded * queries.moved[query, done]
                change = queries.reach[query, through] * rows.errors[through]
                tail, tails = queries.tails[query, through], rows.tails[through % blocks]
                last, remaining = remaining, 0
                for place in range(last):
                    for column in range(begin, end, 64):
                        prefetch(codes, top + left[place + AHEAD], column)
                    column = left[place]
                    row = top + column
                    total = sums[place] + _dot(values, codes[row, begin:end])
                    known = rows.scales[row] * (total + factor * np.float32(own[column]) + change)
                    bound = known + moved * rows.tails[0, row] + tail * tails[row] - rows.offsets[row]
                    left[remaining], sums[remaining] = column, total
                    remaining += not bound < least
            for place in range(remaining):
                if count == found.shape[1]:
                    return -1
                found[0, count], found[1, count] = query, top + left[place]
                count += 1
    return count


@compiled
def pair_scores(queries, rows, pairs, squared, scores):  # type: ignore[no-untyped-def]
    """Scores of pairs, int64 (2, P), of queries and rows, float32 (B, D) and (N, D): float32 (P,), summed in float64.

    The inner product, or with `squared` the negative squared distance.
    """
    for number in range(scores.shape[0]):
        query, row = queries[pairs[0, number]], rows[pairs[1, number]]
        total = np.float64(0)
        if squared:
            for column in range(query.shape[0]):
                difference = np.float64(query[column]) - np.float64(row[column])
                total -= difference * difference
        else:
            for column in range(query.shape[0]):
                total += np.float64(query[column]) * np.float64(row[column])
        scores[number] = total
