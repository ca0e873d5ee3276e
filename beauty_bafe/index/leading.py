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
from .comparison import ROUND_UP, Comparison, LeadingScores, RowCodes, lengths_after, quantize
from .first_pass import Estimates, FirstPass
from .memory_index import save_npy

CHUNK = 1 << 13  # rows rotated at a time
CELLS = 1 << 22  # pairs of query and row that are compared before there is a threshold
WIDEST = (2**31 - 1) // 127**2  # dimensions, so that products of codes fit int32
SAVED, ARRAYS = "leading_", ("rotation", "codes", "lead", "edges", "scales", "tails", "errors")  # names of files
CHECKED_ROWS = 64  # rows that are compared with the saved ones


class Leading(FirstPass):
    """Codes of all rows: 8-bit integers times one scale per row, in blocks of dimensions.

    With an orthogonal matrix R, <q, x> = <p, y> for p = R q and y = R x. p is rounded to t d and y to s c, where d and c are
    integers. Let p', y', c' and d' be the first blocks of dimensions and p'' and y'' the rest; then, by Cauchy and Schwarz,

        <q, x> <= s t <c', d'> + |t d'| |y' - s c'| + |p' - t d'| |y'| + |p''| |y''|.

    A row whose right side is below the k-th best score so far is ruled out. Products of the first block are computed for all
    rows; with VNNI and several queries, so are those of further blocks, for queries for which many rows are left. The rows that
    remain are finished one by one, block by block. There p is rounded to u e, where the integers e are finer than d: if t d is
    used in some blocks and u e in others, |p' - t d'| + |p - u e| takes the place of |p' - t d'|. At last u e is used in all
    blocks.

    R turns the rows to their principal axes, sorted by mean square, so that later blocks are short if descriptors are far from
    uniform, as those of trained networks are; otherwise R is the identity and all dimensions are one block. Within a block the
    rotation is free, and chosen so that coordinates are alike in size, which keeps rounding errors small. With metric l2,
    |q - x|^2 = |q|^2 + |x|^2 - 2 <q, x>.

    Products of codes are exact. What is computed from them in float32, with lengths that are rounded up, takes fewer roundings
    than the 64 + 2 D of 2^-24, relative to |p| |y|, that are allowed for, which covers those of p and y in float64 as well.

    Memory per row: D bytes, plus the first block's again if there are several blocks, plus 4 per block, plus 8. metric: ip
    or l2. Raises ValueError if D is more than WIDEST.
    """

    def __init__(self, rows: Tensor, metric: str, axes: Axes | None = None) -> None:
        if rows.shape[1] > WIDEST:
            raise ValueError(
                f"index.first_pass=int8 takes up to {WIDEST} dimensions, vectors have {rows.shape[1]}; "
                "type index.first_pass=float32"
            )
        self.metric = metric
        self.axes = learn_axes(rows) if axes is None else axes
        count, blocks = len(rows), self.axes.blocks
        codes, edges = np.empty(rows.shape, np.int8), np.array(self.axes.edges)
        lead = np.empty((count, edges[1]), np.int8) if blocks > 1 else codes
        scales, tails = np.empty(count, np.float32), np.empty((blocks, count), np.float32)
        errors, offsets = np.zeros(blocks + 1, np.float32), np.zeros(count, np.float32)
        self.rows = RowCodes(codes, lead, edges, scales, tails, errors, offsets)
        for start in range(0, count, CHUNK):
            self._encode(slice(start, min(start + CHUNK, count)), rows)
        self._measure()

    def _encode(self, part: slice, rows: Tensor) -> None:
        rotated, own = self.axes.rotate(rows[part]), self.rows
        scales, codes, errors = quantize(rotated, self.axes.edges)
        with np.errstate(over="ignore"):  # a length beyond float32 is infinite
            own.codes[part] = codes.numpy()
            own.lead[part] = own.codes[part, : own.edges[1]]
            own.scales[part] = scales.numpy()
            own.tails[:, part] = lengths_after(rotated, self.axes.edges[:-1]).T.numpy() * ROUND_UP
            largest = (errors / scales.double()[:, None]).nan_to_num(0, 0).amax(0).numpy() * ROUND_UP
            np.maximum(own.errors, largest, out=own.errors, casting="same_kind")

    def _measure(self) -> None:
        lengths = self.rows.tails[0]
        if self.metric == "l2":  # half of |x|^2, rounded down
            with np.errstate(over="ignore"):
                np.multiply(lengths, lengths * np.float32(0.5 * (1 - 4e-6)), out=self.rows.offsets)
        # Upper limit of the length of any row, exact or as stored in codes: the length plus the rounding errors. Rows whose
        # length is not finite need none, as their bounds rule nothing out.
        with np.errstate(over="ignore", invalid="ignore"):
            limits = (self.rows.errors[-1] * self.rows.scales + lengths)[np.isfinite(lengths)]
        self.largest = float(limits.max(initial=0))

    def __str__(self) -> str:
        _, first, *others = self.axes.edges
        return f"int8, {first} of {others[-1]} dimensions first" if others else "int8"

    @property
    def nbytes(self) -> int:
        return sum({id(array): array.nbytes for array in self.rows}.values())

    def compare(self, queries: Tensor, k: int) -> Iterator[Estimates]:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            comparison = Comparison(self.axes.rotate(queries), self.rows, self.metric, self.largest, pool)
            rows, start = len(self.rows.offsets), 0
            size = max(CELLS // len(queries), 4 * k)
            while start < rows:  # each part as large as all before it, as thresholds change less and less
                end = min(start + max(start, size), rows)
                yield LeadingScores(comparison, slice(start, end))
                start = end

    def grown(self, rows: Tensor, before: int) -> Self:
        old, new = self.rows, type(self)(rows[before:], self.metric, self.axes).rows
        codes, scales = np.concatenate([old.codes, new.codes]), np.concatenate([old.scales, new.scales])
        tails = np.concatenate([old.tails, new.tails], axis=1)
        return self._with(codes, self._leading(codes), scales, tails, np.maximum(old.errors, new.errors))

    def shrunk(self, keep: np.ndarray) -> Self:
        own, codes = self.rows, self.rows.codes[keep]
        return self._with(codes, self._leading(codes), own.scales[keep], own.tails[:, keep], own.errors)

    def _leading(self, codes: np.ndarray) -> np.ndarray:
        """The first block of codes; the codes themselves if it is the only one."""
        return codes if self.axes.blocks == 1 else np.ascontiguousarray(codes[:, : self.axes.edges[1]])

    def save(self, folder: Path) -> None:
        """Write the codes, which take longer to make than to read."""
        arrays = self.rows._asdict()
        arrays["rotation"] = np.empty((0, 0)) if self.axes.rotation is None else self.axes.rotation.numpy()
        if self.axes.blocks == 1:
            arrays["lead"] = np.empty((0, 0), np.int8)
        for name in ARRAYS:
            replace_file(folder / f"{SAVED}{name}.npy", partial(save_npy, arrays[name]))

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
        rotation, codes, lead, edges, scales, tails, errors = (
            np.asarray(np.load(files[name], mmap_mode="c")) for name in ARRAYS
        )
        axes = Axes(torch.from_numpy(rotation) if rotation.size else None, tuple(edges.tolist()))
        picked = np.linspace(0, len(vectors) - 1, min(len(vectors), CHECKED_ROWS)).astype(np.int64)
        if axes.blocks == 1:
            lead = codes
        rows, width = vectors.shape
        shapes = [(rows, width), (rows, axes.edges[1]), (rows,), (axes.blocks, rows), (axes.blocks + 1,)]
        if [array.shape for array in (codes, lead, scales, tails, errors)] != shapes or axes.edges[-1] != width:
            return None
        some = cls(torch.from_numpy(vectors[picked]), metric, axes)
        # Where the rotation is computed in another order, a number between two codes can be rounded to the other one.
        far = np.abs(some.rows.codes.astype(np.int16) - codes[picked]).max(initial=0) > 1
        if far or not np.array_equal(lead[picked], codes[picked, : axes.edges[1]]):
            return None
        for own, saved in ((some.rows.scales, scales), (some.rows.tails, tails)):
            if not np.allclose(own, saved[..., picked], rtol=1e-3, atol=1e-6 * some.largest, equal_nan=True):
                return None
        return some._with(codes, lead, scales, tails, errors)

    def _with(self, codes: np.ndarray, lead: np.ndarray, scales: np.ndarray, tails: np.ndarray, errors: np.ndarray) -> Self:
        twin = type(self)(torch.empty(0, self.axes.edges[-1]), self.metric, self.axes)
        offsets = np.zeros(len(scales), np.float32)
        twin.rows = RowCodes(codes, lead, twin.rows.edges, scales, np.ascontiguousarray(tails), errors, offsets)
        twin._measure()
        return twin
