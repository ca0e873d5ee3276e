"""Compiled loops of the exact search (Numba). They release the GIL; callers split the work among threads.

B queries, N rows of D dimensions; R rows are compared at a time.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled

CHUNK = 4096  # scores compared at a time: a multiple of 8 that fits a processor's first cache
GROUP = 64  # rows of which `best_of_groups` reports the best
BOUNDS = 2048  # bounds computed at a time: a multiple of 8 that fits a processor's first cache with the numbers of its rows


@compiled
def _dot(values, codes):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for column in range(values.shape[0]):
        total += values[column] * np.float32(codes[column])
    return total


@compiled
def best_of_groups(products, scales, some, best):  # type: ignore[no-untyped-def]
    """Of each group of rows, the one whose product, int32 (B, R), times its scale, float32 (R,), is the highest.

    some: the range of groups. Written into best, int64 (B, ceil(R / GROUP)).
    """
    for query in range(products.shape[0]):
        for group in range(some[0], some[1]):
            start, highest = group * GROUP, np.float32(-np.inf)
            best[query, group] = start
            for row in range(start, min(start + GROUP, scales.shape[0])):
                score = np.float32(products[query, row]) * scales[row]
                if score > highest:
                    highest, best[query, group] = score, row


@compiled
def small_products(values, codes, products):  # type: ignore[no-untyped-def]
    """Products of a few queries' codes, as float32 (B, W), with those of rows, int8 (R, W): written into int32 (B, R)."""
    for row in range(codes.shape[0]):
        for query in range(values.shape[0]):
            products[query, row] = np.int32(_dot(values[query], codes[row]))


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
def _bound(products, joined, done, query, queries, rows, floor, first, start, bounds, flags):  # type: ignore[no-untyped-def]
    """Upper bounds minus the floor, float32 (R,), written into bounds, and whether these are not negative, into flags.

    The rows from `first` + `start` on, whose products are products[:, :, start:]; see survivors.
    """
    size = bounds.shape[0]
    here = slice(first + start, first + start + size)
    bounds[:] = -floor
    for block in range(joined, done):
        step, change = queries.steps[query, block], queries.coded[query, block] * rows.errors[block]
        scales, own = rows.scales[block, here], products[block, query, start : start + size]
        for column in range(size):
            bounds[column] += scales[column] * (step * np.float32(own[column]) + change)
    step, change = queries.steps[query, 0], np.float32(0)
    for block in range(joined):
        change += queries.coded[query, block] * rows.errors[block]
    moved, tail = queries.moved[query, done], queries.tails[query, done]
    scales, own = rows.scales[0, here], products[0, query, start : start + size]
    lengths, tails, offset = rows.tails[0, here], rows.tails[done % rows.tails.shape[0], here], rows.offsets[here]
    for column in range(size):
        known = bounds[column] + scales[column] * (step * np.float32(own[column]) + change)
        bound = known + moved * lengths[column] + tail * tails[column] - offset[column]
        bounds[column] = bound
        flags[column] = not bound < 0  # NaN must not rule out a row


@compiled
def surviving_share(products, joined, done, queries, rows, floor, first, every):  # type: ignore[no-untyped-def]
    """The share of pairs of query and row that `done` blocks leave, estimated from each `every`-th query and chunk of rows."""
    bounds, flags = np.empty(BOUNDS, np.float32), np.empty(BOUNDS, np.uint8)
    left, compared, number = 0, 0, 0
    for query in range(products.shape[1]):
        for start in range(0, products.shape[2], BOUNDS):
            number += 1
            if number % every != 1 % every:
                continue
            size = min(BOUNDS, products.shape[2] - start)
            _bound(products, joined, done, query, queries, rows, floor[query], first, start, bounds[:size], flags[:size])
            compared += size
            for flag in flags[:size]:
                left += flag
    return left / max(compared, 1)


@compiled
def survivors(products, joined, done, queries, rows, floor, first, some, found):  # type: ignore[no-untyped-def]
    """The pairs of query and row whose upper bound reaches the floor, after as many blocks of dimensions as that takes.

    products: of the codes of queries and rows, int32 (blocks, B, R), of which the first `done` are known; the first
    is the sum of `joined` blocks. queries, rows: see comparison.QueryCodes and RowCodes; floor: float32 (B,). The rows that are
    compared are those from `first` on. some: the ranges of queries and of rows among these, (start, end, start, end). Writes
    query and row of each pair into found, int64 (2, P), ordered; returns their number, or -1 if found is too small.
    """
    query_start, query_end, row_start, row_end = some
    count, blocks, number_of_rows = 0, rows.errors.shape[0], rows.scales.shape[1]
    bounds, left = np.empty(BOUNDS, np.float32), np.empty(BOUNDS + 1, np.int64)
    flags = np.zeros(BOUNDS, np.uint8)  # one byte each, so that eight are tested as one uint64
    eights = flags.view(np.uint64)
    for query in range(query_start, query_end):
        for start in range(row_start, row_end, BOUNDS):
            size = min(BOUNDS, row_end - start)
            _bound(products, joined, done, query, queries, rows, floor[query], first, start, bounds[:size], flags[:size])
            flags[size:] = 0
            remaining = 0
            for eight in range(-(-size // 8)):
                if eights[eight] == 0:
                    continue
                for column in range(8 * eight, 8 * eight + 8):
                    left[remaining] = column
                    remaining += flags[column]
            # Then the blocks that are not known yet, and the others again with queries that are not rounded.
            for number in range(blocks):
                block = (done + number) % blocks
                values, norm = queries.values[query, rows.edges[block] : rows.edges[block + 1]], queries.norms[query, block]
                step, coded, error = queries.steps[query, block], queries.coded[query, block], rows.errors[block]
                before, after = queries.tails[query, block], queries.tails[query, block + 1]
                width, last = values.shape[0], remaining
                origin = number_of_rows * rows.edges[block] + (first + start) * width
                remaining = 0
                for place in range(last):
                    column = left[place]
                    row, begin = first + start + column, origin + column * width
                    scale = rows.scales[block, row]
                    change = scale * (_dot(values, rows.codes[begin : begin + width]) + norm * error)
                    if block >= done:
                        change -= before * rows.tails[block, row]
                        if block + 1 < blocks:
                            change += after * rows.tails[block + 1, row]
                    else:
                        change -= scale * coded * error
                        if block == 0 or block >= joined:
                            change -= scale * step * np.float32(products[block, query, start + column])
                        if block + 1 == done:  # moved is for all known blocks together
                            change -= queries.moved[query, done] * rows.tails[0, row]
                    bounds[column] += change
                    left[remaining] = column
                    # Of joined blocks, the bound is valid once all of them are replaced.
                    remaining += block + 1 < joined or not bounds[column] < 0
            for place in range(remaining):
                if count == found.shape[1]:
                    return -1
                found[0, count], found[1, count] = query, first + start + left[place]
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
