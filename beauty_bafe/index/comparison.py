"""Comparing queries with the int8 codes of an index's rows: products, and the bound that rules rows out (see leading.py)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .first_pass import Estimates, collect, cuts

FEW = 8  # queries below which packing codes costs more than it saves
FINER = 64  # largest ratio of a query's coarse and fine scales
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
    """What the compiled loops read of B rotated queries. Lengths are of what lies before each edge; in `tails`, from it on."""

    codes: np.ndarray  # int8 (B, D + STEP), d; a load can reach beyond the last block
    wide: np.ndarray  # int16 (B, D), d as well, as single rows are multiplied faster with this
    shifts: np.ndarray  # int32 (B, blocks), the product of d with a vector of SHIFT in each block
    fine: np.ndarray  # int16 (B, D), e
    steps: np.ndarray  # float32 (B,), t
    fine_steps: np.ndarray  # float32 (B,), u
    reach: np.ndarray  # float32 (B, blocks + 1), at least the length of vectors with t d or u e in each block
    moved: np.ndarray  # float32 (B, blocks + 1), |p - t d|
    missed: np.ndarray  # float32 (B,), |p - u e|
    tails: np.ndarray  # float32 (B, blocks + 1), |p|


class Comparison:
    """Rotated queries, float64 (B, D), quantized, to be compared with the codes of rows.

    `largest`: upper limit of the length of any row, exact or as stored in codes.
    """

    def __init__(self, queries: Tensor, rows: RowCodes, metric: str, largest: float, pool: ThreadPoolExecutor) -> None:
        from .vectors import SHIFT, STEP, has_vnni

        self.rows, self.metric, self.pool = rows, metric, pool
        lengths = queries.norm(dim=1)
        self.squares = lengths.square()
        edges, width = rows.edges.tolist(), queries.shape[1]
        steps, codes, moved = quantize(queries, edges)
        finer = min(FINER, (2**31 - 1) // (127 * 127 * width))  # so that products fit int32
        fine_steps = steps / finer
        fine = (queries / fine_steps.double()[:, None]).round().clamp(-127 * finer, 127 * finer)
        rounded = [codes * steps.double()[:, None], fine * fine_steps.double()[:, None]]
        # In each block the longer of the two, so that any choice of them is covered.
        squares = torch.stack([lengths_before(one, edges).square() for one in rounded])
        reach = torch.nn.functional.pad(squares.diff(dim=2).amax(0).cumsum(1).sqrt(), (1, 0))
        shifts = torch.stack([SHIFT * codes[:, start:end].sum(1) for start, end in pairwise(edges)], dim=1)
        lengths_up = (reach, moved, (queries - rounded[1]).norm(dim=1), lengths_after(queries, edges))
        self._vnni = has_vnni()
        self._packs = self._vnni and len(queries) >= FEW
        self.queries = QueryCodes(
            torch.nn.functional.pad(codes, (0, STEP)).numpy(),
            codes.short().numpy(),
            shifts.int().numpy(),
            fine.short().numpy(),
            steps.numpy(),
            fine_steps.numpy(),
            *(array.float().numpy() * ROUND_UP for array in lengths_up),
        )
        slack = (2 * width + 64) * 2.0**-24 * lengths * largest + 1e-30
        # Where float32 sums could overflow or become denormal, all rows are scored.
        low, high = SAFE_LENGTHS
        safe = (lengths > low) & (lengths < high) & (low < largest < high) | (lengths == 0)
        self.slack = torch.where(safe, slack, torch.inf)

    def room(self) -> np.ndarray:
        """Room for the packed codes of a tile of rows, of length 0 if they are not packed: uint32."""
        from .survivors import ROWS
        from .vectors import STEP

        edges = self.rows.edges
        return np.empty(ROWS * (edges[-1] // STEP + len(edges)) if self._packs else 0, np.uint32)

    def products(self, part: slice) -> np.ndarray:
        """Products of the codes of all queries and consecutive rows in the first block: int32 (B, R)."""
        from .survivors import ROWS, products

        some = part.stop - part.start
        found = np.empty((len(self.squares), some), np.int32)

        def work(cut: slice) -> None:
            ends = part.start + cut.start, part.start + cut.stop, part.start
            products(self.queries, self.rows, ends, found, self.room())

        list(self.pool.map(work, cuts(some, ROWS)))
        return found

    def best(self, products: np.ndarray, part: slice, count: int) -> Tensor:
        """Rows with high products, int64 (B, count); all rows if there are not so many."""
        from .kernels import GROUP, best_of_groups

        scales = self.rows.scales[part]
        groups = -(-len(scales) // GROUP)
        if groups < count:
            scores = torch.from_numpy(products) * torch.from_numpy(scales)
            return scores.topk(min(count, scores.shape[1])).indices + part.start
        best = torch.empty(len(products), groups, dtype=torch.int64)

        def work(cut: slice) -> None:
            best_of_groups(products, scales, (cut.start, cut.stop), best.numpy())

        list(self.pool.map(work, cuts(groups)))
        scores = torch.from_numpy(products).gather(1, best) * torch.from_numpy(scales)[best]
        return best.gather(1, scores.topk(count).indices) + part.start

    def reaching(self, part: slice, kth: Tensor, known: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pairs of query and row whose upper bound reaches the k-th best exact scores, (B,): int64 (P,) each.

        known: what `products` returned for these rows, or an array without columns.
        """
        from .survivors import ROWS, survivors

        floor = self._floor(kth)

        def find(cut: slice, found: np.ndarray) -> int:
            some = part.start + cut.start, part.start + cut.stop, part.start
            return int(survivors(self.queries, self.rows, floor, some, known, self.room(), self._vnni, found))

        return collect(find, cuts(part.stop - part.start, ROWS), self.pool)

    def _floor(self, kth: Tensor) -> np.ndarray:
        """k-th best exact scores, (B,) -> the least upper bound of a row that can still equal or beat them."""
        kth = kth.double()
        floor = kth - 2.0**-22 * kth.abs()
        if self.metric == "l2":  # <q, x> = (score + |q|^2 + |x|^2) / 2
            floor = (floor + self.squares) / 2 - 2.0**-22 * self.squares
        return (floor - self.slack).float().numpy()


class LeadingScores(Estimates):
    """Of consecutive rows."""

    def __init__(self, comparison: Comparison, part: slice) -> None:
        self._comparison, self._part = comparison, part
        self._known = np.empty((0, 0), np.int32)

    def likely(self, k: int) -> Tensor:
        self._known = self._comparison.products(self._part)
        return self._comparison.best(self._known, self._part, 4 * k)

    def reaching(self, kth: Tensor) -> tuple[Tensor, Tensor]:
        return self._comparison.reaching(self._part, kth, self._known)
