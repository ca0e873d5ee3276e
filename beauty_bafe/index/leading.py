"""A first pass over leading dimensions in int8, after a rotation that gathers most of the rows' length in them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..manifest import replace_file
from .first_pass import Estimates, FirstPass, blocks
from .memory_index import save_npy

EDGES = (256, 512, 768)  # where blocks of dimensions end, except the last block
CHUNK = 1 << 13  # rows rotated at a time
SAMPLE = 1 << 14  # rows from which the rotation is learned
MANY = 2  # leading blocks that are multiplied for many queries
FEW = 16  # queries below which reading the codes takes longer than multiplying them
CELLS = 1 << 22  # scores of a block
MOST = 1 << 13  # rows of a block for many queries, whose codes are widened
SAVED = "leading_"  # start of the names of files
OVER = np.float32(1 + 1e-6)  # for lengths that are rounded to float32 and must not be too low


class Leading(FirstPass):
    """Codes of all rows, rotated to their principal axes: blocks of dimensions in int8, with a scale for each row and block.

    With the orthogonal matrix R, <q, x> is the sum of <p_b, y_b> over the blocks b of p = R q and y = R x. If y_b is stored
    as c_b, then after some blocks, by Cauchy and Schwarz,

        <q, x> <= sum of <p_b, c_b> + sum of |p_b| |y_b - c_b| + |p'| |y'|

    where p' and y' are all dimensions that have not been read. A row whose right side is below the k-th best score so far
    is ruled out. The axes are sorted by the rows' mean square, so that y' is short if descriptors are far from uniform, as
    those of trained networks are: nearly all rows are ruled out by the first block. |q - x|^2 = |q|^2 + |x|^2 - 2 <q, x>.

    p and y are computed in float64, whose rounding errors (1e-15) disappear in the allowance for the float32 sums: summing
    D products adds at most D 2^-24 times the sum of their sizes, which |p| |c| bounds; doubled, as in Bound.

    Codes are multiples of a step: a scale of the row times the unit of the axis, as rows are much longer along the first axes.
    The units are multiplied into the queries. For FEW queries and more, the first MANY blocks are one product of bfloat16
    numbers: codes are exact in them; what rounding the queries moves is added to the bound, and so is the rounding of the
    result.

    Memory per row: D bytes, 8 per block and 8 more. metric: ip or l2.
    """

    def __init__(self, rows: Tensor, metric: str, axes: Axes | None = None) -> None:
        self.metric = metric
        self.axes = learn_axes(rows)[0] if axes is None else axes
        width = rows.shape[1]
        self.edges = np.array([0, *(edge for edge in EDGES if edge < width), width])
        blocks, first = len(self.edges) - 1, self.edges[1]
        self.codes, self.others = np.empty((len(rows), first), np.int8), np.empty((len(rows), width - first), np.int8)
        # Per row: the scale; of each block the rounding error; of each block the length after it; the length of all.
        self.numbers = np.empty((2 * blocks + 2, len(rows)), np.float32)
        for start in range(0, len(rows), CHUNK):
            self._encode(slice(start, min(start + CHUNK, len(rows))), rows)

    def _encode(self, part: slice, rows: Tensor) -> None:
        rotated = rows[part].double() @ self.axes.rotation
        scale = ((rotated / self.axes.units).abs().amax(1) / 127).float().clamp(min=1e-30)
        steps = scale.double()[:, None] * self.axes.units
        codes = (rotated / steps).round().clamp(-127, 127)
        errors, blocks = rotated - codes * steps, len(self.edges) - 1
        self.codes[part] = codes[:, : self.edges[1]].to(torch.int8).numpy()
        self.others[part] = codes[:, self.edges[1] :].to(torch.int8).numpy()
        self.numbers[0, part] = scale.numpy()
        for block, (start, end) in enumerate(pairwise(self.edges)):
            self.numbers[1 + block, part] = errors[:, start:end].norm(dim=1).numpy() * OVER
            self.numbers[1 + blocks + block, part] = rotated[:, end:].norm(dim=1).numpy() * OVER
        self.numbers[-1, part] = rotated.norm(dim=1).numpy() * OVER

    def __str__(self) -> str:
        return f"int8, {self.edges[1]} of {self.edges[-1]} dimensions first"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.others.nbytes + self.numbers.nbytes

    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        rotated = _Rotated(queries, self)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            cells = min(CELLS, MOST * len(queries)) if rotated.many else CELLS
            for part in blocks(len(self.codes), len(queries), k, cells):
                yield _LeadingScores(rotated, part, pool)

    def grown(self, rows: Tensor, before: int) -> Self:
        new = type(self)(rows[before:], self.metric, self.axes)
        return self._with(
            np.concatenate([self.codes, new.codes]),
            np.concatenate([self.others, new.others]),
            np.concatenate([self.numbers, new.numbers], axis=1),
        )

    def shrunk(self, keep: np.ndarray) -> Self:
        return self._with(self.codes[keep], self.others[keep], self.numbers[:, keep])

    def save(self, folder: Path) -> None:
        """Write the codes, which take longer to make than to read."""
        arrays = {"rotation": self.axes.rotation.numpy(), "units": self.axes.units.numpy(), "edges": self.edges}
        arrays |= {"codes": self.codes, "others": self.others, "numbers": self.numbers}
        for name, array in arrays.items():
            replace_file(folder / f"{SAVED}{name}.npy", partial(save_npy, array))

    @classmethod
    def load(cls, folder: Path, metric: str, rows: int) -> Self | None:
        """What `save` wrote, mapped from disk; None if there is nothing, or of another number of rows or other EDGES."""
        files = {file.stem.removeprefix(SAVED): file for file in folder.glob(f"{SAVED}*.npy")}
        if len(files) != 6:
            return None
        arrays = {name: np.asarray(np.load(file, mmap_mode="c")) for name, file in files.items()}
        axes = Axes(torch.from_numpy(arrays["rotation"]), torch.from_numpy(arrays["units"]))
        empty = cls(torch.empty(0, len(axes.units)), metric, axes)
        if len(arrays["codes"]) != rows or not np.array_equal(arrays["edges"], empty.edges):
            return None
        return empty._with(arrays["codes"], arrays["others"], arrays["numbers"])

    def _with(self, codes: np.ndarray, others: np.ndarray, numbers: np.ndarray) -> Self:
        twin = type(self)(torch.empty(0, len(self.axes.units)), self.metric, self.axes)
        twin.codes, twin.others, twin.numbers = codes, others, np.ascontiguousarray(numbers)
        return twin


class _Rotated:
    """Rotated queries and the lengths that the bound needs."""

    def __init__(self, queries: Tensor, first: Leading) -> None:
        self.first, self.many = first, len(queries) >= FEW
        self.done = min(MANY if self.many else 1, len(first.edges) - 1)
        exact = queries.double() @ first.axes.rotation
        width, edges = queries.shape[1], first.edges
        lengths, largest = exact.norm(dim=1), float(first.numbers[-1].max(initial=0))
        scaled = exact * first.axes.units
        self.values, self.squares = scaled.float().numpy(), lengths.square()
        pairs = list(pairwise(edges))
        self.parts = np.stack([exact[:, start:end].norm(dim=1).numpy() for start, end in pairs], 1).astype(np.float32) * OVER
        self.rests = np.stack([exact[:, end:].norm(dim=1).numpy() for _, end in pairs], 1).astype(np.float32) * OVER
        self.slack = (2 * width + 16) * 2.0**-24 * lengths * largest + 1e-30
        if self.many:
            self.rounded = scaled[:, : edges[self.done]].bfloat16()
            # Each number of the query moves by 2^-9 of itself at most, and with it each term of the sum.
            self.moved = 1.02 * 2.0**-9 * exact[:, : edges[self.done]].norm(dim=1) * largest
        else:
            self.moved = torch.zeros(len(queries))
        # Half of |x|^2, rather too low, for l2.
        self.offsets = np.zeros(len(first.codes), np.float32)
        if first.metric == "l2":
            np.multiply(first.numbers[-1], first.numbers[-1] * np.float32(0.5 * (1 - 4e-6)), out=self.offsets)


class _LeadingScores(Estimates):
    """Products of the queries with the codes of the leading block: `sums`, or `halves` from rounded queries."""

    def __init__(self, queries: _Rotated, part: slice, pool: ThreadPoolExecutor) -> None:
        self._queries, self._part, self._pool = queries, part, pool
        self._sums = np.zeros((0, 0), np.float32)
        self._halves: Tensor | None = None  # bfloat16 (B, R)
        if queries.many:
            self._halves = self._multiply()
        else:
            self._sums, self._best = self._sum()

    def _multiply(self) -> Tensor:
        from .kernels import widen

        first, rounded, part = self._queries.first, self._queries.rounded, self._part
        halves = np.empty((part.stop - part.start, rounded.shape[1]), np.uint16)
        split = first.edges[1]

        def work(cut: slice) -> None:
            here = slice(part.start + cut.start, part.start + cut.stop)
            widen(first.codes[here], halves[cut, :split])
            widen(first.others[here, : rounded.shape[1] - split], halves[cut, split:])

        list(self._pool.map(work, cuts(len(halves))))
        return rounded @ torch.from_numpy(halves).view(torch.bfloat16).T

    def _sum(self) -> tuple[np.ndarray, np.ndarray]:
        from .kernels import GROUP, leading_sums

        first, rows = self._queries.first, self._part.stop - self._part.start
        sums = np.empty((len(self._queries.values), rows), np.float32)
        best = np.empty((len(sums), -(-rows // GROUP)), np.int64)

        def work(cut: slice) -> None:
            here = slice(self._part.start + cut.start, self._part.start + cut.stop)
            groups = slice(cut.start // GROUP, -(-cut.stop // GROUP))
            for query, values in enumerate(self._queries.values):
                leading_sums(
                    values[: first.edges[1]], first.codes[here], first.numbers[0, here], sums[query, cut], best[query, groups]
                )
                best[query, groups] += cut.start

        list(self._pool.map(work, cuts(rows, GROUP)))
        return sums, best

    def likely(self, k: int) -> Tensor:
        scales = torch.from_numpy(self._queries.first.numbers[0, self._part])
        scores = (torch.from_numpy(self._sums) if self._halves is None else self._halves) * scales
        if self._halves is not None or self._best.shape[1] < 4 * k:
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

        def work(some: tuple[int, int, int, int]) -> np.ndarray:
            size = 1 << 16
            while True:
                found = np.empty((2, size), np.int64)
                number = survivors(
                    self._sums,
                    halves,
                    queries.done,
                    queries.values,
                    first.edges,
                    queries.parts,
                    queries.rests,
                    moved,
                    least,
                    queries.offsets,
                    first.codes,
                    first.others,
                    first.numbers,
                    self._part.start,
                    some,
                    found,
                )
                if number >= 0:
                    return found[:, :number]
                size *= 8

        count, rows = len(queries.values), self._part.stop - self._part.start
        if queries.many:
            somes = [(cut.start, cut.stop, 0, rows) for cut in cuts(count)]
        else:
            somes = [(query, query + 1, cut.start, cut.stop) for query in range(count) for cut in cuts(rows)]
        who, row = torch.from_numpy(np.concatenate(list(self._pool.map(work, somes)), axis=1))
        return who, row


def cuts(length: int, multiple: int = 1) -> list[slice]:
    """0 to length in one slice for each thread, whose starts are multiples."""
    threads = torch.get_num_threads()
    edges = [length * number // threads // multiple * multiple for number in range(threads)] + [length]
    return [slice(start, end) for start, end in pairwise(edges) if end > start]


class Axes(NamedTuple):
    """`rotation`: float64 (D, D), orthogonal, its columns sorted by the rows' mean squares along them; `units`: float64 (D,),
    the roots of these, at least a thousandth of the largest, which is 1."""

    rotation: Tensor
    units: Tensor


def learn_axes(rows: Tensor) -> tuple[Axes, float]:
    """The principal axes of float32 (N, D) about 0, and how many of the rows a first pass over the first block leaves, 0 to 1.

    Both from a sample. Some of its rows are the queries, seven of their neighbours are searched.
    """
    picked = torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[:SAMPLE])
    sample = rows[picked].double()
    squares, axes = torch.linalg.eigh(sample.T @ sample / max(1, len(sample)))
    units = squares.flip(0).clamp(min=0).sqrt()
    units = (units / units[:1]).clamp(min=1e-3) if len(units) and units[0] > 1e-30 else torch.ones_like(units)
    rotated = sample @ (rotation := axes.flip(1).contiguous())
    queries = rotated[:64]
    best = (queries @ rotated.T).topk(min(8, len(rotated))).values[:, -1:]  # the query itself is one of them
    lead, rest = slice(0, EDGES[0]), slice(EDGES[0], None)
    bounds = queries[:, lead] @ rotated[:, lead].T + queries[:, rest].norm(dim=1)[:, None] * rotated[:, rest].norm(dim=1)
    return Axes(rotation, units), float((bounds >= best).double().mean()) if len(queries) else 1.0
