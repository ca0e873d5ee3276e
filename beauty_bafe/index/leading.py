"""A first pass in int8, over leading dimensions first if a rotation concentrates the norm of the rows in them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..manifest import replace_file
from .axes import Axes, learn_axes
from .comparison import ROUND_UP, Comparison, LeadingScores, RowCodes, quantize
from .first_pass import Estimates, FirstPass
from .memory_index import save_npy

CHUNK = 1 << 13  # rows rotated at a time
CELLS = 1 << 21  # pairs of query and row that are compared at a time
SAVED, ARRAYS = "leading_", ("rotation", "codes", "edges", "scales", "tails", "errors")  # names of files
CHECKED_ROWS = 64  # rows that are compared with the saved ones


class Leading(FirstPass):
    """Codes of all rows: blocks of dimensions in int8, with one scale per row and block; the first two share one.

    With an orthogonal matrix R, <q, x> is the sum of <p_b, y_b> over the blocks b of p = R q and y = R x. If these are stored
    as whole numbers c_b and d_b times a scale each, y_b ~ s c_b and p_b ~ t d_b, then after some blocks, by Cauchy and Schwarz,

        <q, x> <= sum of s t <c_b, d_b> + |t d_b| |y_b - s c_b| + |p_b - t d_b| |y_b| over these blocks
                + |p'| |y'|, where p' and y' are all other blocks.

    A row whose right side is below the k-th best score so far is ruled out. Products are computed for all rows, block by
    block, while many are left; then row by row, and in the end again with p instead of t d. R turns the rows to their
    principal axes, sorted by mean square, so that later blocks are short if descriptors are far from uniform, as those of
    trained networks are; otherwise R is the identity and all dimensions are one block. Within a block the rotation is free,
    and chosen so that coordinates are alike in size, which keeps rounding errors small. |q - x|^2 = |q|^2 + |x|^2 - 2 <q, x>.

    Products of codes are exact, or rounded to float32 for a few queries and on processors without int8 products. p and y are
    computed in float64, whose rounding errors (1e-15) are covered by the allowance for float32: summing D products adds at
    most D 2^-24 times the sum of their sizes, which |p| |y| bounds; doubled for any order of summation and for the lengths'
    own rounding, and 64 roundings more for the bound itself.

    Memory per row: D bytes, 8 per block and 4 more. metric: ip or l2.
    """

    def __init__(self, rows: Tensor, metric: str, axes: Axes | None = None) -> None:
        self.metric = metric
        self.axes = learn_axes(rows) if axes is None else axes
        count, shape = len(rows), (self.axes.blocks, len(rows))
        # Block after block, so that reading one block of all rows, or of the few that are left, is fast.
        codes, edges = np.empty(rows.numel(), np.int8), np.array(self.axes.edges)
        errors, offsets = np.zeros(self.axes.blocks, np.float32), np.zeros(count, np.float32)
        self.rows = RowCodes(codes, edges, np.empty(shape, np.float32), np.empty(shape, np.float32), errors, offsets)
        for start in range(0, count, CHUNK):
            self._encode(slice(start, min(start + CHUNK, count)), rows)
        self._measure()

    def _encode(self, part: slice, rows: Tensor) -> None:
        rotated, own = self.axes.rotate(rows[part]), self.rows
        with np.errstate(over="ignore"):  # a length beyond float32 is infinite
            for block, (scale, codes, error) in enumerate(quantize(rotated, self.axes.edges)):
                own.block(block)[part], own.scales[block, part] = codes.numpy(), scale.numpy()
                own.tails[block, part] = rotated[:, self.axes.edges[block] :].norm(dim=1).numpy() * ROUND_UP
                largest = (error / scale.double()).nan_to_num(0, 0).max().item()
                own.errors[block] = max(own.errors[block], np.float32(largest) * ROUND_UP)

    def _measure(self) -> None:
        lengths = self.rows.tails[0]
        if self.metric == "l2":  # half of |x|^2, rounded down
            np.multiply(lengths, lengths * np.float32(0.5 * (1 - 4e-6)), out=self.rows.offsets)
        # Upper limit of the length of any row, exact or as stored in codes: the length plus the rounding errors. Rows whose
        # length is not finite need none, as their bounds rule nothing out.
        with np.errstate(over="ignore", invalid="ignore"):
            limits = (self.rows.errors @ self.rows.scales + lengths)[np.isfinite(lengths)]
        self.largest = float(limits.max(initial=0))

    def __str__(self) -> str:
        _, first, *others = self.axes.edges
        return f"int8, {first} of {others[-1]} dimensions first" if others else "int8"

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.rows)

    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            comparison = Comparison(self.axes.rotate(queries), self.rows, self.metric, self.largest, pool)
            rows, start = len(self.rows.offsets), 0
            size = max(CELLS // len(queries), 4 * k)
            while start < rows:  # each part as large as all before it, as thresholds change less and less
                end = min(start + max(start, size), rows)
                yield LeadingScores(comparison, slice(start, end), size)
                start = end

    def grown(self, rows: Tensor, before: int) -> Self:
        old, new = self.rows, type(self)(rows[before:], self.metric, self.axes).rows
        codes = [part.block(block).ravel() for block in range(self.axes.blocks) for part in (old, new)]
        scales, tails = (np.concatenate(pair, axis=1) for pair in ((old.scales, new.scales), (old.tails, new.tails)))
        return self._with(np.concatenate(codes), scales, tails, np.maximum(old.errors, new.errors))

    def shrunk(self, keep: np.ndarray) -> Self:
        codes = [self.rows.block(block)[keep].ravel() for block in range(self.axes.blocks)]
        return self._with(np.concatenate(codes), self.rows.scales[:, keep], self.rows.tails[:, keep], self.rows.errors)

    def save(self, folder: Path) -> None:
        """Write the codes, which take longer to make than to read."""
        rotation = np.empty((0, 0)) if self.axes.rotation is None else self.axes.rotation.numpy()
        arrays = (rotation, *(getattr(self.rows, name) for name in ARRAYS[1:]))
        for name, array in zip(ARRAYS, arrays, strict=True):
            replace_file(folder / f"{SAVED}{name}.npy", partial(save_npy, array))

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """The files in a folder that `save` wrote."""
        return list(folder.glob(f"{SAVED}*.npy"))

    @classmethod
    def load(cls, folder: Path, vectors: np.ndarray, metric: str) -> Self | None:
        """What `save` wrote, mapped from disk; None if there is none, or if it was saved for other vectors."""
        files = {file.stem.removeprefix(SAVED): file for file in cls.files(folder)}
        if files.keys() != set(ARRAYS):
            return None
        rotation, codes, edges, scales, tails, errors = (np.asarray(np.load(files[name], mmap_mode="c")) for name in ARRAYS)
        axes = Axes(torch.from_numpy(rotation) if rotation.size else None, tuple(edges.tolist()))
        picked = np.linspace(0, len(vectors) - 1, min(len(vectors), CHECKED_ROWS)).astype(np.int64)
        if vectors.shape != (scales.shape[1], axes.edges[-1]) or vectors.size != len(codes):
            return None
        some = cls(torch.from_numpy(vectors[picked]), metric, axes)
        for own, saved in ((some.rows.scales, scales), (some.rows.tails, tails)):
            if not np.allclose(own, saved[:, picked], rtol=1e-3, atol=1e-6 * some.largest, equal_nan=True):
                return None
        return some._with(codes, scales, tails, errors)

    def _with(self, codes: np.ndarray, scales: np.ndarray, tails: np.ndarray, errors: np.ndarray) -> Self:
        twin = type(self)(torch.empty(0, self.axes.edges[-1]), self.metric, self.axes)
        scales, tails = np.ascontiguousarray(scales), np.ascontiguousarray(tails)
        offsets = np.zeros(scales.shape[1], np.float32)
        twin.rows = RowCodes(codes, np.array(self.axes.edges), scales, tails, errors, offsets)
        twin._measure()
        return twin
