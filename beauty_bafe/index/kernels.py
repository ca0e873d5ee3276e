"""Compiled loops of the exact search (Numba). They release the GIL; callers split the work among threads.

B queries, N rows of D dimensions, W of them in the first block; R rows are compared at a time.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled

ROUNDED = 1.02 / 256  # upper limit of the relative change of a number that is rounded to bfloat16
CHUNK = 4096  # scores compared at a time: a multiple of 8 that fits a processor's first cache
GROUP = 64  # rows of which `leading_sums` reports the best


@compiled
def _dot(values, codes):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for column in range(values.shape[0]):
        total += values[column] * np.float32(codes[column])
    return total


@compiled
def leading_sums(query, codes, scales, sums, best):  # type: ignore[no-untyped-def]
    """Products of a query, float32 (W,), with codes, int8 (R, W): float32 (R,), written into sums.

    best, int64 (ceil(R / GROUP),): of each group, the row whose product times its scale, float32 (R,), is the highest.
    """
    for group in range(best.shape[0]):
        start, highest = group * GROUP, np.float32(-np.inf)
        best[group] = start
        for row in range(start, min(start + GROUP, codes.shape[0])):
            sums[row] = _dot(query, codes[row])
            if sums[row] * scales[row] > highest:
                highest, best[group] = sums[row] * scales[row], row


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
def survivors(  # type: ignore[no-untyped-def]
    sums, halves, done, queries, edges, parts, moved, floor, offsets, codes, numbers, first, some, found
):
    """The pairs of query and row whose upper bound reaches the floor, after as many blocks of dimensions as that takes.

    sums: products of the queries with the codes of the first `done` blocks, float32 (B, R). halves: None; or the bits of
    bfloat16 numbers, uint16 (B, R), the products of rounded queries, which are used instead. queries: float32 (B, D),
    rotated; edges: int64 (blocks + 1,); parts: float32 (B, blocks), the length of each block; moved, floor: float32 (B,),
    what rounding the query can change, and the least score. For all N rows, of which those from `first` on are compared:
    offsets, float32 (N,), added to the floor; codes, int8 (N * D,), block after block; numbers, float32 (2 * blocks + 2, N),
    see Leading.__init__. some: the ranges of queries and of sums' columns, (start, end, start, end). Writes query and row of
    each pair into found, int64 (2, P), ordered; returns their number, or -1 if found is too small.
    """
    query_start, query_end, start, end = some
    count, blocks, rows, size = 0, edges.shape[0] - 1, numbers.shape[1], end - start
    bits, bounds, left = np.empty(size, np.uint32), np.empty(size, np.float32), np.empty(size, np.int64)
    scores, rests = bits.view(np.float32), np.empty(size, np.float32)
    flags = np.zeros(-(-size // 8) * 8, np.uint8)  # one byte each, so that eight are tested as one uint64
    eights = flags.view(np.uint64)
    here = slice(first + start, first + end)
    scales, offset = numbers[0, here], -offsets[here]
    rests[:] = offset
    largest = np.zeros(done, np.float32)  # rounding error of each block
    for block in range(done):
        for error in numbers[1 + block, here]:
            if not error <= largest[block]:
                largest[block] = error if error == error else np.float32(np.inf)
    change = np.float32(0 if halves is None else ROUNDED)
    for query in range(query_start, query_end):
        least = floor[query]
        if halves is None:
            own = sums[query, start:end]
            for column in range(size):
                scores[column] = own[column] * scales[column]
        else:
            least -= moved[query]
            half = halves[query, start:end]
            for column in range(size):
                bits[column] = np.uint32(half[column]) << np.uint32(16)
            for column in range(size):
                scores[column] *= scales[column]
        if done < blocks:
            rests[:] = offset
        for block in range(done, blocks):
            part, lengths = parts[query, block], numbers[1 + blocks + block, here]
            for column in range(size):
                rests[column] += part * lengths[column]
        # Most rows fall short of the floor even if the rounding error of each block is the largest of any row.
        lenient = least
        for block in range(done):
            lenient -= parts[query, block] * largest[block]
        for column in range(size):
            score = scores[column]
            flags[column] = not score + change * abs(score) + rests[column] < lenient
        remaining = 0
        for eight in range(eights.shape[0]):
            if eights[eight] == 0:
                continue
            for column in range(8 * eight, min(8 * eight + 8, size)):
                bound = scores[column] + change * abs(scores[column]) - least
                for block in range(done):
                    bound += parts[query, block] * numbers[1 + block, first + start + column]
                bounds[column], left[remaining] = bound, column
                remaining += not bound + rests[column] < 0
        # bounds now hold everything but the unread dimensions and the offset; rests hold the most that those can add, and the
        # offset.
        for block in range(done, blocks):
            values, part = queries[query, edges[block] : edges[block + 1]], parts[query, block]
            width, last = values.shape[0], remaining
            origin = rows * edges[block] + (first + start) * width
            remaining = 0
            for number in range(last):
                column = left[number]
                row, place = first + start + column, origin + column * width
                product = _dot(values, codes[place : place + width]) * scales[column]
                bounds[column] += product + part * numbers[1 + block, row]
                rests[column] = offset[column]
                for later in range(block + 1, blocks):
                    rests[column] += parts[query, later] * numbers[1 + blocks + later, row]
                left[remaining] = column
                remaining += not bounds[column] + rests[column] < 0
        for number in range(remaining):
            column = left[number]
            row = first + start + column
            if halves is not None:  # again with sums in float32
                exact = np.float32(0)
                for block in range(done):
                    width = edges[block + 1] - edges[block]
                    place = rows * edges[block] + row * width
                    exact += _dot(queries[query, edges[block] : edges[block + 1]], codes[place : place + width])
                bound = bounds[column] - scores[column] - np.float32(ROUNDED) * abs(scores[column]) - moved[query]
                if bound + exact * scales[column] + offset[column] < 0:
                    continue
            if count == found.shape[1]:
                return -1
            found[0, count], found[1, count] = query, row
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
