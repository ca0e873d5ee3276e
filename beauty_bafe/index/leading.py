"""A first pass over leading dimensions in int8, after a rotation that concentrates the norm of the rows in them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..manifest import replace_file
from .axes import Axes, block_edges, learn_axes
from .first_pass import Estimates, FirstPass, blocks, collect, cuts
from .memory_index import save_npy

CHUNK = 1 << 13  # rows rotated at a time
MIN_BATCH = 16  # queries from which all blocks are one matrix product; with fewer, reading the codes takes longest
CELLS = 1 << 22  # scores of a block
MAX_BLOCK_ROWS = 1 << 13  # rows of a block for many queries, whose codes are widened
SAVED, ARRAYS = "leading_", ("rotation", "units", "edges", "codes", "numbers")  # names of files
CHECKED_ROWS = 64  # rows that are compared with the saved ones
SAFE_LENGTHS = (1e-12, 1e12)  # lengths for which float32 sums neither overflow nor become denormal
ROUND_UP = np.float32(1 + 1e-6)  # so that a length rounded to float32 is never too small


class Leading(FirstPass):
    """Codes of all rows, rotated to their principal axes: blocks of dimensions in int8, with one scale per row.

    With the orthogonal matrix R, <q, x> is the sum of <p_b, y_b> over the blocks b of p = R q and y = R x. If y_b is stored
    as c_b, then after some blocks, by Cauchy and Schwarz,

        <q, x> <= sum of <p_b, c_b> + |p_b| |y_b - c_b| over these blocks + sum of |p_b| |y_b| over the others.

    A row whose right side is below the k-th best score so far is ruled out. The axes are sorted by the rows' mean square, so
    that later blocks are short if descriptors are far from uniform, as those of trained networks are: most rows are ruled out
    by the first block. |q - x|^2 = |q|^2 + |x|^2 - 2 <q, x>.

    p and y are computed in float64, whose rounding errors (1e-15) are covered by the allowance for the float32 sums: summing
    D products adds at most D 2^-24 times the sum of their sizes, which |p| |c| bounds; doubled, as in first_pass.Bound.

    Codes are multiples of a step: a scale of the row times the unit of the axis, as rows are much longer along the first axes.
    The units are multiplied into the queries. For MIN_BATCH or more queries, all blocks are one matrix product, in bfloat16 if
    `dtype` is bfloat16: the codes are exact in it; the largest errors due to rounding the queries and the result are added
    to the bound.

    Memory per row: D bytes, 8 per block and 8 more. metric: ip or l2.
    """

    def __init__(self, rows: Tensor, metric: str, dtype: torch.dtype, axes: Axes | None = None) -> None:
        self.metric, self.dtype = metric, dtype
        self.axes = learn_axes(rows)[0] if axes is None else axes
        width = rows.shape[1]
        self.edges = block_edges(width)
        # Stored block after block, so that reading the codes of the rows that are left causes few cache misses.
        self.codes = np.empty(len(rows) * width, np.int8)
        # Per row: the scale; of each block the rounding error; of each block the length; the length of all.
        self.numbers = np.empty((2 * len(self.edges), len(rows)), np.float32)
        for start in range(0, len(rows), CHUNK):
            self._encode(slice(start, min(start + CHUNK, len(rows))), rows)
        self._measure()

    def block(self, number: int) -> np.ndarray:
        """The codes of a block, int8 (N, its dimensions), not copied."""
        rows, (start, end) = self.numbers.shape[1], self.edges[number : number + 2]
        return self.codes[rows * start : rows * end].reshape(rows, end - start)

    def _measure(self) -> None:
        """Upper limit of the length of any row, exact or as stored in codes: the length plus the rounding errors."""
        errors = self.numbers[1 : len(self.edges)]
        bounded = np.isfinite(errors).all(axis=0)  # the bounds of other rows rule nothing out
        self.largest = float((self.numbers[-1] + errors.sum(axis=0))[bounded].max(initial=0))

    def _encode(self, part: slice, rows: Tensor) -> None:
        rotated = rows[part].double() @ self.axes.rotation
        scale = ((rotated / self.axes.units).abs().amax(1) / 127).float().clamp(min=1e-30)
        steps = scale.double()[:, None] * self.axes.units
        codes = (rotated / steps).round().clamp(-127, 127)
        errors, blocks = rotated - codes * steps, len(self.edges) - 1
        self.numbers[0, part] = scale.numpy()
        with np.errstate(over="ignore"):  # a length beyond float32 is infinite
            for block, (start, end) in enumerate(pairwise(self.edges)):
                self.block(block)[part] = codes[:, start:end].to(torch.int8).numpy()
                self.numbers[1 + block, part] = errors[:, start:end].norm(dim=1).numpy() * ROUND_UP
                self.numbers[1 + blocks + block, part] = rotated[:, start:end].norm(dim=1).numpy() * ROUND_UP
            self.numbers[-1, part] = rotated.norm(dim=1).numpy() * ROUND_UP

    def __str__(self) -> str:
        return f"int8, {self.edges[1]} of {self.edges[-1]} dimensions first"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.numbers.nbytes

    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        rotated = _Rotated(queries, self)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            cells = min(CELLS, MAX_BLOCK_ROWS * len(queries)) if rotated.many else CELLS
            for part in blocks(self.numbers.shape[1], len(queries), k, cells):
                yield _LeadingScores(rotated, part, pool)

    def grown(self, rows: Tensor, before: int) -> Self:
        new = type(self)(rows[before:], self.metric, self.dtype, self.axes)
        blocks = [part.block(number).ravel() for number in range(len(self.edges) - 1) for part in (self, new)]
        return self._with(np.concatenate(blocks), np.concatenate([self.numbers, new.numbers], axis=1))

    def shrunk(self, keep: np.ndarray) -> Self:
        blocks = [self.block(number)[keep].ravel() for number in range(len(self.edges) - 1)]
        return self._with(np.concatenate(blocks), self.numbers[:, keep])

    def save(self, folder: Path) -> None:
        """Write the codes, which take longer to make than to read."""
        rotation, units = self.axes.rotation.numpy(), self.axes.units.numpy()
        arrays: tuple[np.ndarray, ...] = (rotation, units, self.edges, self.codes, self.numbers)
        for name, array in zip(ARRAYS, arrays, strict=True):
            replace_file(folder / f"{SAVED}{name}.npy", partial(save_npy, array))

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """The files in a folder that `save` wrote."""
        return list(folder.glob(f"{SAVED}*.npy"))

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray, metric: str, dtype: torch.dtype) -> Self | None:
        """What `save` wrote, mapped from disk; None if there is none, or if it was saved for other vectors or blocks."""
        files = {file.stem.removeprefix(SAVED): file for file in cls.files(folder)}
        if files.keys() != set(ARRAYS):
            return None
        arrays = {name: np.asarray(np.load(file, mmap_mode="c")) for name, file in files.items()}
        axes = Axes(torch.from_numpy(arrays["rotation"]), torch.from_numpy(arrays["units"]))
        picked = np.linspace(0, len(vectors) - 1, min(len(vectors), CHECKED_ROWS)).astype(np.int64)
        if vectors.shape != (arrays["numbers"].shape[1], len(axes.units)) or vectors.size != len(arrays["codes"]):
            return None
        some = cls(torch.from_numpy(vectors[picked]), metric, dtype, axes)
        if not np.array_equal(arrays["edges"], some.edges):
            return None
        if not np.allclose(some.numbers, arrays["numbers"][:, picked], rtol=1e-3, atol=1e-6 * some.largest, equal_nan=True):
            return None
        return some._with(arrays["codes"], arrays["numbers"])

    def _with(self, codes: np.ndarray, numbers: np.ndarray) -> Self:
        twin = type(self)(torch.empty(0, len(self.axes.units)), self.metric, self.dtype, self.axes)
        twin.codes, twin.numbers = codes, np.ascontiguousarray(numbers)
        twin._measure()
        return twin


class _Rotated:
    """Rotated queries and the lengths that the bound needs."""

    def __init__(self, queries: Tensor, first: Leading) -> None:
        self.first, self.many = first, len(queries) >= MIN_BATCH
        self.halves = self.many and first.dtype == torch.bfloat16
        self.done = len(first.edges) - 1 if self.many else 1
        exact = queries.double() @ first.axes.rotation
        width, edges = queries.shape[1], first.edges
        lengths, largest = exact.norm(dim=1), first.largest
        scaled = exact * first.axes.units
        self.values, self.squares = scaled.float().numpy(), lengths.square()
        parts = [exact[:, start:end].norm(dim=1).numpy() for start, end in pairwise(edges)]
        self.parts = np.stack(parts, 1).astype(np.float32) * ROUND_UP
        slack = (2 * width + 16) * 2.0**-24 * lengths * largest + 1e-30
        # Where float32 sums could overflow or become denormal, all rows are scored.
        low, high = SAFE_LENGTHS
        safe = (lengths > low) & (lengths < high) & (low < largest < high) | (lengths == 0)
        self.slack = torch.where(safe, slack, torch.inf)
        self.rounded, self.moved = scaled.float(), torch.zeros(len(queries))
        if self.halves:
            self.rounded = scaled.bfloat16()
            # Each number of the query moves by 2^-8 of itself at most, and with it each term of the sum.
            self.moved = 1.02 * 2.0**-8 * lengths * largest
        # Half of |x|^2, rounded down, for l2.
        self.offsets = np.zeros(first.numbers.shape[1], np.float32)
        if first.metric == "l2":
            np.multiply(first.numbers[-1], first.numbers[-1] * np.float32(0.5 * (1 - 4e-6)), out=self.offsets)


class _LeadingScores(Estimates):
    """Products of the queries with the codes of the first block, or of all for many queries; `halves` if those are rounded."""

    def __init__(self, queries: _Rotated, part: slice, pool: ThreadPoolExecutor) -> None:
        self._queries, self._part, self._pool = queries, part, pool
        self._sums = np.zeros((0, 0), np.float32)
        self._halves: Tensor | None = None  # bfloat16 (B, R)
        self._best: np.ndarray | None = None  # int64, columns with high sums
        if queries.halves:
            self._halves = queries.rounded @ self._widened(torch.bfloat16).T
        elif queries.many:
            self._sums = (queries.rounded @ self._widened(torch.float32).T).numpy()
        else:
            self._sums, self._best = self._sum()

    def _widened(self, dtype: torch.dtype) -> Tensor:
        """The codes of all blocks, (R, D)."""
        first, part = self._queries.first, self._part
        wide = torch.empty(part.stop - part.start, int(first.edges[-1]), dtype=dtype)
        for block, (start, end) in enumerate(pairwise(first.edges)):
            wide[:, start:end] = torch.from_numpy(first.block(block)[part])
        return wide

    def _sum(self) -> tuple[np.ndarray, np.ndarray]:
        from .kernels import GROUP, leading_sums

        first, rows = self._queries.first, self._part.stop - self._part.start
        codes = first.block(0)
        sums = np.empty((len(self._queries.values), rows), np.float32)
        best = np.empty((len(sums), -(-rows // GROUP)), np.int64)

        def work(cut: slice) -> None:
            here = slice(self._part.start + cut.start, self._part.start + cut.stop)
            groups = slice(cut.start // GROUP, -(-cut.stop // GROUP))
            for query, values in enumerate(self._queries.values):
                leading_sums(
                    values[: first.edges[1]], codes[here], first.numbers[0, here], sums[query, cut], best[query, groups]
                )
                best[query, groups] += cut.start

        list(self._pool.map(work, cuts(rows, GROUP)))
        return sums, best

    def likely(self, k: int) -> Tensor:
        scales = torch.from_numpy(self._queries.first.numbers[0, self._part])
        scores = (torch.from_numpy(self._sums) if self._halves is None else self._halves) * scales
        if self._best is None or self._best.shape[1] < 4 * k:
            return scores.topk(min(4 * k, scores.shape[1])).indices + self._part.start
        best = torch.from_numpy(self._best)
        return best.gather(1, scores.gather(1, best).topk(4 * k).indices) + self._part.start

    def reaching(self, kth: Tensor) -> tuple[Tensor, Tensor]:
        from .kernels import survivors

        queries, first = self._queries, self._queries.first
        kth = kth.double()
        floor = kth - 2.0**-22 * kth.abs()
        if first.metric == "l2":  # <q, x> = (score + |q|^2 + |x|^2) / 2
            floor = (floor + queries.squares) / 2 - 2.0**-22 * queries.squares
        least = (floor - queries.slack).float().numpy()

        moved = queries.moved.float().numpy()
        halves = None if self._halves is None else self._halves.view(torch.uint16).numpy()

        def find(some: tuple[int, int, int, int], found: np.ndarray) -> int:
            return int(
                survivors(
                    self._sums,
                    halves,
                    queries.done,
                    queries.values,
                    first.edges,
                    queries.parts,
                    moved,
                    least,
                    queries.offsets,
                    first.codes,
                    first.numbers,
                    self._part.start,
                    some,
                    found,
                )
            )

        return collect(find, len(queries.values), self._part.stop - self._part.start, self._pool)
