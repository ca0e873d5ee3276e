"""Comparing queries with the int8 codes of an index's rows: products, and the bound that rules rows out (see leading.py)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.precision import has_integer_products, has_tile_products
from .first_pass import Estimates, collect, cuts

SAMPLED = 64  # each SAMPLED-th query and chunk of rows shows how many rows are left
FEW = 8  # queries below which a loop over the codes is faster than a matrix product
JOINED = 2  # leading blocks that are multiplied at once from FEW queries on
MANY = 32  # queries from which all blocks are multiplied at once, if the processor multiplies tiles
PAIR = 2500  # finishing one pair that is left takes as long as multiplying so many dimensions of a pair in the matrix product
SAFE_LENGTHS = (1e-12, 1e12)  # lengths for which float32 sums neither overflow nor become denormal
ROUND_UP = np.float32(1 + 1e-6)  # so that a length rounded to float32 is never too small


class Codes(NamedTuple):
    """N vectors of D dimensions in int8."""

    scales: Tensor  # float32 (N,)
    codes: Tensor  # int8 (N, D)
    errors: Tensor  # float64 (N, blocks + 1), length of the rounding error in the blocks before each edge


def quantize(exact: Tensor, edges: Sequence[int]) -> Codes:
    """Round vectors, float64 (N, D), to whole multiples of a scale each."""
    scales = (exact.abs().amax(1) / 127).float().clamp(min=1e-30)
    codes = (exact / scales.double()[:, None]).round().clamp(-127, 127)
    return Codes(scales, codes.to(torch.int8), lengths_before(exact - codes * scales.double()[:, None], edges))


def lengths_before(vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Lengths of float64 (N, D) before each of E edges: float64 (N, E)."""
    return torch.stack([vectors[:, :edge].norm(dim=1) for edge in edges], dim=1)


def lengths_after(vectors: Tensor, edges: Sequence[int]) -> Tensor:
    """Lengths of float64 (N, D) from each of E edges on: float64 (N, E)."""
    return torch.stack([vectors[:, edge:].norm(dim=1) for edge in edges], dim=1)


class RowCodes(NamedTuple):
    """What the compiled loops read of N rows of D dimensions.

    If this class or the next is renamed or moved, delete Numba's cache (*.nbi in __pycache__), which fails to load then.
    """

    codes: np.ndarray  # int8 (N, D)
    lead: np.ndarray  # int8 (N, W), a copy of the first block, as reading part of each row is slow; or codes
    edges: np.ndarray  # int64 (blocks + 1,)
    scales: np.ndarray  # float32 (N,), s
    tails: np.ndarray  # float32 (blocks, N), lengths of this block and all later ones together
    errors: np.ndarray  # float32 (blocks + 1,), largest |y - s c| / s of any row, before each edge
    offsets: np.ndarray  # float32 (N,), subtracted from each product


class QueryCodes(NamedTuple):
    """What the compiled loops read of B rotated queries: lengths before each edge, in `tails` from it on."""

    values: np.ndarray  # float32 (B, D), p
    steps: np.ndarray  # float32 (B,), t
    reach: np.ndarray  # float32 (B, blocks + 1), at least the length of vectors with t d or p in each block
    moved: np.ndarray  # float32 (B, blocks + 1), |p - t d|
    tails: np.ndarray  # float32 (B, blocks + 1), |p|


class Comparison:
    """Rotated queries, float64 (B, D), quantized, and the memory for their products with the codes of rows.

    `largest`: upper limit of the length of any row, exact or as stored in codes.
    """

    def __init__(self, queries: Tensor, rows: RowCodes, metric: str, largest: float, pool: ThreadPoolExecutor) -> None:
        self.rows, self.metric, self.pool = rows, metric, pool
        lengths = queries.norm(dim=1)
        self.squares = lengths.square()
        edges = rows.edges.tolist()
        steps, self.codes, moved = quantize(queries, edges)
        longer = torch.stack([lengths_before(one, edges) for one in (queries, self.codes * steps.double()[:, None])])
        # In each block the longer of the two, so that any choice of them is covered.
        reach = longer.square().diff(dim=2).amax(0).cumsum(1).sqrt()
        reach = torch.nn.functional.pad(reach, (1, 0))
        rounded = (array.float().numpy() * ROUND_UP for array in (reach, moved, lengths_after(queries, edges)))
        self.queries = QueryCodes(queries.float().numpy(), steps.numpy(), *rounded)
        slack = (2 * queries.shape[1] + 64) * 2.0**-24 * lengths * largest + 1e-30
        # Where float32 sums could overflow or become denormal, all rows are scored.
        low, high = SAFE_LENGTHS
        safe = (lengths > low) & (lengths < high) & (low < largest < high) | (lengths == 0)
        self.slack = torch.where(safe, slack, torch.inf)
        blocks = len(edges) - 1
        self.first = 1 if len(queries) < FEW else min(JOINED, blocks)
        if len(queries) >= MANY and has_tile_products():
            self.first = blocks
        self._memory: dict[str, Tensor] = {}

    def room(self, name: str, rows: int) -> Tensor:
        """Memory for products, int32 (B, R): the same in each call, as allocating it again and again is slow."""
        size, memory = len(self.codes) * rows, self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = torch.empty(size, dtype=torch.int32)
        return memory[:size].view(-1, rows)

    def multiply(self, blocks: range, part: slice, out: Tensor) -> None:
        """Products of the codes of queries and rows in consecutive blocks, written into int32 (B, R)."""
        start, end = self.rows.edges[[blocks.start, blocks.stop]]
        queries, whole = self.codes[:, start:end], self.rows.lead if blocks == range(1) else self.rows.codes[:, start:end]
        rows = torch.from_numpy(whole[part])
        if len(queries) < FEW:
            self._multiply_few(queries.float().numpy(), rows.numpy(), out.numpy())
        elif has_integer_products() and end > start + 1:  # torch._int_mm writes nothing if there is one dimension
            torch._int_mm(queries, rows.T, out=out)
        else:
            out.copy_(queries.float() @ rows.float().T)

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

    `known`, int32 (B, R): the sum over the first `done` blocks.
    """

    def __init__(self, comparison: Comparison, part: slice) -> None:
        self._comparison, self.part, self.done = comparison, part, comparison.first
        self.known = self._room("products")
        comparison.multiply(range(self.done), part, self.known)

    def _room(self, name: str) -> Tensor:
        return self._comparison.room(name, self.part.stop - self.part.start)

    def _next(self) -> None:
        added = self._room("added")
        self._comparison.multiply(range(self.done, self.done + 1), self.part, added)
        self.known += added
        self.done += 1

    def best(self, count: int) -> Tensor:
        """Rows with high products, int64 (B, count); all rows if there are not so many."""
        from .kernels import GROUP, best_of_groups

        products, scales = self.known, self._comparison.rows.scales[self.part]
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
        widths, first = np.diff(rows.edges), self.part.start
        while len(products) >= FEW and self.done < len(widths):
            left = surviving_share(products, self.done, queries, rows, floor, first, SAMPLED)
            if left * PAIR < 2 * widths[self.done]:  # another block would rule out about half of them
                break
            self._next()

        def find(some: tuple[int, int, int, int], found: np.ndarray) -> int:
            return int(survivors(products, self.done, queries, rows, floor, first, some, found))

        asked, compared = products.shape
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
