"""First passes of the exact search: estimates of scores with a bound on their error, which rules out nearly all rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

CELLS = {"cpu": 1 << 23, "cuda": 1 << 28}  # scores of a block; on a CPU they fit its caches
GROUP = 32  # scores of which first only the maximum is compared
FOUND = 1 << 16  # initial room for pairs
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # relative rounding error of the first pass's output


class Estimates(ABC):
    """The estimated scores of some queries, B of them, and consecutive rows. May share memory with the next block."""

    @abstractmethod
    def likely(self, k: int) -> Tensor:
        """For each query rows with high estimates, int64 (B, M): at least k different ones, or all that there are."""

    @abstractmethod
    def reaching(self, kth: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of query and row, int64 (P,) each, whose exact scores can be kth (B,) or more, ordered by query, then row.

        Other pairs may be included.
        """


class FirstPass(ABC):
    """Data derived from the rows of an index, float32 (N, D), to estimate scores quickly. Immutable; `str` names it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory."""

    @abstractmethod
    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        """The estimates for queries, float32 (B, D), block by block of consecutive rows."""

    @abstractmethod
    def grown(self, rows: Tensor, before: int) -> Self:
        """The first pass for `rows`, whose first `before` rows are those of this one."""

    @abstractmethod
    def shrunk(self, keep: np.ndarray) -> Self:
        """The first pass for the rows where `keep`, bool (N,), is true."""


def blocks(rows: int, queries: int, k: int, cells: int) -> Iterator[slice]:
    """All rows in blocks of about `cells` scores, one per row and query."""
    size = max(cells // queries, 4 * k, GROUP)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def cuts(length: int, multiple: int = 1, parts: int | None = None) -> list[slice]:
    """Split 0..length into `parts` slices, None: one per thread, whose starts are multiples of `multiple`."""
    parts = torch.get_num_threads() if parts is None else parts
    edges = [length * number // parts // multiple * multiple for number in range(parts)] + [length]
    return [slice(start, end) for start, end in pairwise(edges) if end > start]


Task = TypeVar("Task")


def collect(find: Callable[[Task, np.ndarray], int], tasks: Sequence[Task], pool: ThreadPoolExecutor) -> tuple[Tensor, Tensor]:
    """All pairs of query and row that the compiled loop `find` reports, int64 (P,) each, ordered by query.

    `find(task, found)` writes the pairs of a task into int64 (2, P) and returns their number, or -1 if there is no room. Pairs
    of the same query stay in the order of the tasks.
    """

    def work(task: Task) -> np.ndarray:
        size = FOUND
        while True:
            found = np.empty((2, size), np.int64)
            number = find(task, found)
            if number >= 0:
                return found[:, :number]
            size *= 8

    pairs = torch.from_numpy(np.concatenate(list(pool.map(work, tasks)), axis=1))
    who, row = pairs[:, pairs[0].argsort(stable=True)]
    return who, row


class Rounded(FirstPass):
    """Copies of all rows in bfloat16 or float32 (`dtype`)."""

    def __init__(self, rows: Tensor, metric: str, device: str, dtype: torch.dtype) -> None:
        self.metric, self.device, self.dtype = metric, device, dtype
        self.coarse = torch.empty(rows.shape, dtype=dtype, device=device)
        self.norms, self.errors = (torch.empty(len(rows), device=device) for _ in range(2))
        for first in range(0, len(rows), 1 << 14):
            part = slice(first, min(first + (1 << 14), len(rows)))
            exact = rows[part].to(device)
            self.coarse[part] = exact.to(dtype)
            self.norms[part] = exact.norm(dim=1)
            self.errors[part] = (exact - self.coarse[part].float()).norm(dim=1)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        return self.coarse.nbytes

    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        bound = Bound(queries.to(self.device), self)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for part in blocks(len(self.coarse), len(queries), k, CELLS[torch.device(self.device).type]):
                yield _RoundedScores(bound, part, queries.device, pool)

    def grown(self, rows: Tensor, before: int) -> Self:
        return self._with(*(torch.cat(pair) for pair in zip(self._arrays(), self._new(rows[before:])._arrays(), strict=True)))

    def shrunk(self, keep: np.ndarray) -> Self:
        kept = torch.from_numpy(keep).to(self.device)
        return self._with(*(array[kept] for array in self._arrays()))

    def _arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.coarse, self.norms, self.errors

    def _new(self, rows: Tensor) -> Self:
        return type(self)(rows, self.metric, self.device, self.dtype)

    def _with(self, coarse: Tensor, norms: Tensor, errors: Tensor) -> Self:
        twin = self._new(torch.empty(0, coarse.shape[1]))
        twin.coarse, twin.norms, twin.errors = coarse, norms, errors
        return twin


class _RoundedScores(Estimates):
    def __init__(self, bound: Bound, part: slice, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._bound, self._first, self._device, self._pool = bound, part.start, device, pool
        self._scores = bound.scores(part)

    def likely(self, k: int) -> Tensor:
        return self._scores.topk(min(k, self._scores.shape[1])).indices.to(self._device) + self._first

    def reaching(self, kth: Tensor) -> tuple[Tensor, Tensor]:
        floor = self._bound.floor(kth.to(self._scores.device))
        if self._scores.device.type == "cpu":
            who, row = self._at_least_compiled(floor.numpy())
        else:
            who, row = _at_least(self._scores, floor)
        return who.to(self._device), row.to(self._device) + self._first

    def _at_least_compiled(self, floor: np.ndarray) -> tuple[Tensor, Tensor]:
        """The pairs that `_at_least` finds, on a CPU."""
        from .kernels import reaching

        shape, halves = self._scores.shape, None
        scores = np.empty((0, 0), np.float32)
        if self._scores.dtype == torch.bfloat16:
            halves = self._scores.view(torch.uint16).numpy()
        else:
            scores = self._scores.numpy()

        def find(some: tuple[int, int, int, int], found: np.ndarray) -> int:
            return int(reaching(scores, halves, floor, some, found))

        queries, rows = shape
        threads = torch.get_num_threads()
        if queries >= 2 * threads:
            tasks = [(cut.start, cut.stop, 0, rows) for cut in cuts(queries)]
        else:  # few tasks, as each takes time of its own
            parts = min(threads, -(-2 * threads // queries))
            tasks = [(query, query + 1, cut.start, cut.stop) for query in range(queries) for cut in cuts(rows, parts=parts)]
        return collect(find, tasks, self._pool)


class Bound:
    """Rounded scores for a batch of queries, and the rounded score below which the exact one must be too low."""

    def __init__(self, queries: Tensor, first: Rounded) -> None:
        coarse, norms, errors = first.coarse, first.norms, first.errors
        self.queries, self.coarse, self.metric = queries.to(coarse.dtype), coarse, first.metric
        self.row_squares, self.squares = norms.square(), queries.square().sum(1)
        length, largest = queries.norm(dim=1).double(), norms.max().double()
        width = queries.shape[1]
        # |<q, g> - <q', g'>| <= |q - q'| |g| + |q'| |g - g'| (Cauchy-Schwarz); lengths of rounded vectors are at most
        # 1 + 2^-8 times the exact ones. Summing D products in float32 adds D 2^-24 of the sum of their sizes, which
        # |q'| |g'| bounds; doubled for any order of summation and for the lengths' own rounding.
        moved = (queries - self.queries.float()).norm(dim=1).double()
        self.error = 1.001 * (moved * largest + 1.01 * length * errors.max().double())
        self.error += (2 * width + 16) * 2.0**-24 * length * largest + 1e-30
        self.unit, self.reach, self.width = UNIT[coarse.dtype], length * largest, width
        self.sum = length + largest
        self._products: Tensor | None = None

    def scores(self, part: slice) -> Tensor:
        """Scores of the first pass, bfloat16 or float32 (B, R)."""
        if self.metric == "l1":
            return -torch.cdist(self.queries, self.coarse[part], p=1)
        products = self._multiply(part)
        if self.metric == "ip":
            return products
        return 2 * products.float() - self.row_squares[part] - self.squares[:, None]

    def _multiply(self, part: slice) -> Tensor:
        """Products, in memory that all blocks share, as allocating it for every block is slow."""
        shape = len(self.queries), part.stop - part.start
        if self._products is None:
            self._products = torch.empty(shape, dtype=self.coarse.dtype, device=self.coarse.device)
        out = self._products.flatten()[: shape[0] * shape[1]].view(shape)
        return torch.mm(self.queries, self.coarse[part].T, out=out)

    def floor(self, kth: Tensor) -> Tensor:
        """k-th best exact scores, (B,) -> the least rounded score of a row that can still equal or beat them."""
        kth = kth.double()
        if self.metric == "l1":  # sums of D terms of one sign: the error is relative
            floor = kth - (self.width + 8) * 2.0**-22 * kth.abs()
        elif self.metric == "l2":
            floor = kth - 2 * (self.error + 1.02 * self.unit * self.reach) - 2.0**-20 * self.sum.square()
        else:
            floor = kth - self.error - 2.0**-22 * kth.abs()
            floor = floor - 1.02 * self.unit * floor.abs()
        floor = torch.where(kth == -torch.inf, kth, floor)
        return torch.nextafter(floor.float(), torch.full_like(floor, -torch.inf).float())


def _at_least(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of query and row, int64 (P,) each, whose scores (B, R) reach floor (B,), ordered by query, then by row.

    Maxima over groups of strided columns are compared first, as few groups reach the floor.
    """
    width = scores.shape[1] // GROUP
    groups = scores[:, : width * GROUP].unflatten(1, (GROUP, width)) if width else scores.new_empty(len(scores), GROUP, 0)
    who, column = (groups.amax(1) >= floor[:, None]).nonzero(as_tuple=True)
    hit, member = (groups[who, :, column] >= floor[who, None]).nonzero(as_tuple=True)
    rest_who, rest = (scores[:, width * GROUP :] >= floor[:, None]).nonzero(as_tuple=True)
    grouped = who[hit] * scores.shape[1] + member * width + column[hit]
    keys = torch.cat([grouped, rest_who * scores.shape[1] + rest + width * GROUP]).sort().values
    return keys // scores.shape[1], keys % scores.shape[1]
