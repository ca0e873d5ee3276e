"""Comparing queries with the int8 codes of an index's rows: products, and the bound that rules rows out (see leading.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.precision import has_integer_products
from .first_pass import Estimates, collect, cuts

SAMPLED = 64  # each SAMPLED-th query and chunk of rows shows how many rows are left
FEW = 8  # queries below which a loop over the codes is faster than a matrix product
JOINED = 2  # leading blocks that share a scale
MANY = 128  # queries from which one product of these is faster than one of each
PAIR = 4000  # deciding on one pair takes as long as multiplying so many more dimensions of a pair, on average
SAFE_LENGTHS = (1e-12, 1e12)  # lengths for which float32 sums neither overflow nor become denormal
ROUND_UP = np.float32(1 + 1e-6)  # so that a length rounded to float32 is never too small


class Block(NamedTuple):
    """A block of dimensions of N vectors in int8."""

    scale: Tensor  # float32 (N,)
    codes: Tensor  # int8 (N, W)
    error: Tensor  # float64 (N,), length of what rounding leaves over


def quantize(exact: Tensor, edges: Sequence[int]) -> list[Block]:
    """Quantize vectors, float64 (N, D), block by block. The first JOINED blocks share a scale."""
    parts = [exact[:, start:end] for start, end in pairwise(edges)]
    peaks = [part.abs().amax(1) for part in parts]
    peaks[:JOINED] = [torch.stack(peaks[:JOINED]).amax(0)] * len(peaks[:JOINED])
    blocks = []
    for part, peak in zip(parts, peaks, strict=True):
        scale = (peak / 127).float().clamp(min=1e-30)
        codes = (part / scale.double()[:, None]).round().clamp(-127, 127)
        blocks.append(Block(scale, codes.to(torch.int8), (part - codes * scale.double()[:, None]).norm(dim=1)))
    return blocks


class RowCodes(NamedTuple):
    """What the compiled loops read of N rows of D dimensions.

    If this class or the next is renamed or moved, delete Numba's cache (*.nbi in __pycache__), which fails to load then.
    """

    codes: np.ndarray  # int8 (N * D,), block after block
    edges: np.ndarray  # int64 (blocks + 1,)
    scales: np.ndarray  # float32 (blocks, N)
    tails: np.ndarray  # float32 (blocks, N), lengths of this block and all later ones together
    errors: np.ndarray  # float32 (blocks,), largest |y_b - s c_b| / s of any row
    offsets: np.ndarray  # float32 (N,), subtracted from each product

    def block(self, number: int) -> np.ndarray:
        """The codes of a block, int8 (N, its dimensions), not copied."""
        rows, (start, end) = len(self.offsets), self.edges[number : number + 2]
        return self.codes[rows * start : rows * end].reshape(rows, end - start)


class QueryCodes(NamedTuple):
    """What the compiled loops read of B rotated queries."""

    values: np.ndarray  # float32 (B, D), p
    steps: np.ndarray  # float32 (B, blocks), t
    coded: np.ndarray  # float32 (B, blocks), |t d_b|
    norms: np.ndarray  # float32 (B, blocks), |p_b|
    moved: np.ndarray  # float32 (B, blocks + 1), |p_b - t d_b| of all earlier blocks together
    tails: np.ndarray  # float32 (B, blocks + 1), |p_b| of this block and all later ones together


class Comparison:
    """Rotated queries, float64 (B, D), quantized, and the memory for their products with the codes of rows.

    `largest`: upper limit of the length of any row, exact or as stored in codes.
    """

    def __init__(self, queries: Tensor, rows: RowCodes, metric: str, largest: float, pool: ThreadPoolExecutor) -> None:
        self.rows, self.metric, self.pool = rows, metric, pool
        lengths = queries.norm(dim=1)
        self.squares = lengths.square()
        self.blocks = len(rows.errors)
        steps, coded, norms = np.empty((3, len(queries), self.blocks), np.float32)
        moved, tails = np.zeros((2, len(queries), self.blocks + 1), np.float32)
        edges = rows.edges.tolist()
        quantized = quantize(queries, edges)
        for block, (scale, codes, error) in enumerate(quantized):
            start, end = edges[block : block + 2]
            steps[:, block], norms[:, block] = scale, queries[:, start:end].norm(dim=1)
            coded[:, block] = codes.double().norm(dim=1) * scale
            moved[:, block + 1] = np.hypot(moved[:, block], error)
            tails[:, block] = queries[:, start:].norm(dim=1)
        self.joined = 1 if len(queries) < MANY else min(JOINED, self.blocks)
        self.codes = [torch.cat([block.codes for block in quantized[: self.joined]], dim=1)]
        self.codes += [block.codes for block in quantized[self.joined :]]
        rounded = (array * ROUND_UP for array in (coded, norms, moved, tails))
        self.queries = QueryCodes(queries.float().numpy(), steps, *rounded)
        slack = (2 * queries.shape[1] + 64) * 2.0**-24 * lengths * largest + 1e-30
        # Where float32 sums could overflow or become denormal, all rows are scored.
        low, high = SAFE_LENGTHS
        safe = (lengths > low) & (lengths < high) & (low < largest < high) | (lengths == 0)
        self.slack = torch.where(safe, slack, torch.inf)
        self._memory = torch.empty(0, dtype=torch.int32)

    def room(self, rows: int) -> Tensor:
        """Memory for products of all blocks, (blocks, B, R): shared, as allocating it again and again is slow."""
        shape = self.blocks, len(self.squares), rows
        if self._memory.numel() < math.prod(shape):
            self._memory = torch.empty(math.prod(shape), dtype=torch.int32)
        return self._memory[: math.prod(shape)].view(shape)

    def multiply(self, done: int, part: slice, out: Tensor) -> int:
        """Products of the codes of the next block, or of the joined ones, int32 (B, R). Returns how many blocks are done."""
        ahead = self.joined if done == 0 else done + 1
        queries = self.codes[ahead - self.joined]
        blocks = [torch.from_numpy(self.rows.block(block)[part]) for block in range(done, ahead)]
        rows = torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]
        if len(queries) < FEW:
            self._multiply_few(queries.float().numpy(), rows.numpy(), out.numpy())
        elif has_integer_products() and queries.shape[1] > 1:  # torch._int_mm writes nothing if there is one dimension
            torch._int_mm(queries, rows.T, out=out)
        else:
            out.copy_(queries.float() @ rows.float().T)
        return ahead

    def _multiply_few(self, queries: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        from .kernels import small_products

        list(self.pool.map(lambda cut: small_products(queries, rows[cut], out[:, cut]), cuts(len(rows))))

    def floor(self, kth: Tensor) -> np.ndarray:
        """k-th best exact scores, (B,) -> the least upper bound of a row that can still equal or beat them."""
        kth = kth.double()
        floor = kth - 2.0**-22 * kth.abs()
        if self.metric == "l2":  # <q, x> = (score + |q|^2 + |x|^2) / 2
            floor = (floor + self.squares) / 2 - 2.0**-22 * self.squares
        return (floor - self.slack).float().numpy()


class Products:
    """Products of the codes of queries and some rows: of the first blocks, and of others while many rows are left.

    `known`, int32 (blocks, B, R): known[0] is the sum of the joined blocks, known[b] block b; those between are not used.
    """

    def __init__(self, comparison: Comparison, part: slice) -> None:
        self._comparison, self.part = comparison, part
        self.known, self.done = comparison.room(part.stop - part.start), 0
        self._next()

    def _next(self) -> None:
        self.done = self._comparison.multiply(self.done, self.part, self.known[self.done])

    def best(self, count: int) -> Tensor:
        """Rows with high products, int64 (B, count); all rows if there are not so many."""
        from .kernels import GROUP, best_of_groups

        products, scales = self.known[0], self._comparison.rows.scales[0, self.part]
        groups = -(-products.shape[1] // GROUP)
        if groups < count:
            scores = products * torch.from_numpy(scales)
            return scores.topk(min(count, scores.shape[1])).indices + self.part.start
        best = torch.empty(len(products), groups, dtype=torch.int64)

        def work(cut: slice) -> None:
            best_of_groups(products.numpy(), scales, (cut.start, cut.stop), best.numpy())

        list(self._comparison.pool.map(work, cuts(groups)))
        scores = products.gather(1, best) * torch.from_numpy(scales)[best]
        return best.gather(1, scores.topk(count).indices) + self.part.start

    def reaching(self, floor: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pairs of query and row whose upper bound reaches the floor, int64 (P,) each."""
        from .kernels import surviving_share, survivors

        queries, rows, products = self._comparison.queries, self._comparison.rows, self.known.numpy()
        widths, first, joined = np.diff(rows.edges), self.part.start, self._comparison.joined
        while self.done < len(widths):
            left = surviving_share(products, joined, self.done, queries, rows, floor, first, SAMPLED)
            if left * PAIR < 2 * widths[self.done]:  # another block would rule out about half of them
                break
            self._next()

        def find(some: tuple[int, int, int, int], found: np.ndarray) -> int:
            return int(survivors(products, joined, self.done, queries, rows, floor, first, some, found))

        _, asked, compared = products.shape
        return collect(find, asked, compared, self._comparison.pool)


class LeadingScores(Estimates):
    """Of consecutive rows, compared in parts of `size` so that their products stay small."""

    def __init__(self, comparison: Comparison, part: slice, size: int) -> None:
        self._comparison = comparison
        self._parts = [slice(start, min(start + size, part.stop)) for start in range(part.start, part.stop, size)]
        self._first: Products | None = None

    def likely(self, k: int) -> Tensor:
        self._first = Products(self._comparison, self._parts[0])
        return self._first.best(4 * k)

    def reaching(self, kth: Tensor) -> tuple[Tensor, Tensor]:
        floor, pairs = self._comparison.floor(kth), []
        known, self._first = self._first, None  # the products of the next part are written over these
        for part in self._parts:
            pairs.append((known or Products(self._comparison, part)).reaching(floor))
            known = None
        who, row = (torch.cat(column) for column in zip(*pairs, strict=True))
        if len(pairs) > 1:
            order = who.argsort(stable=True)
            who, row = who[order], row[order]
        return who, row
