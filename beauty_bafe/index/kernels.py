"""Compiled loops of the exact search (Numba). They release the GIL; callers split the work among threads.

B queries, N rows of D dimensions; R rows are compared at a time.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled

CHUNK = 4096  # scores compared at a time: a multiple of 8 that fits a processor's first cache
GROUP = 64  # rows of which `best_of_groups` reports the best


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
def reaching(scores, halves, floor, some, found):  # type: ignore[no-untyped-def]
    """The pairs of query and row whose score reaches the floor, float32 (B,).

    scores: float32 (B, R). halves: None; or the bits of bfloat16 numbers, uint16 (B, R), which are used instead. some: the
    ranges of queries and of rows, (start, end, start, end). Writes query and row of each pair into found, int64 (2, P), in
    order; returns their number, or -1 if found is too small.
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
