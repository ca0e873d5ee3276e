"""Principal axes of an index's rows, and a test of how many rows the leading dimensions rule out."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EDGES = (256, 512, 768)  # where blocks of dimensions end, except the last block
SAMPLE = 1 << 14  # rows from which the axes are learned
QUERIES, NEIGHBOURS = 64, 7  # rows of the sample that serve as queries, and for how many neighbours
LEFT = 0.05  # largest share of rows that may remain, with rows as queries; photos in shops leave more


class Axes(NamedTuple):
    """`rotation`: float64 (D, D), orthogonal, or None: no rotation; `edges`: where blocks of dimensions start, and
    where the last one ends."""

    rotation: Tensor | None
    edges: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return len(self.edges) - 1

    def rotate(self, vectors: Tensor) -> Tensor:
        """Float64 (N, D)."""
        return vectors.double() if self.rotation is None else vectors.double() @ self.rotation


def block_edges(width: int) -> tuple[int, ...]:
    """Where the blocks of `width` dimensions start, and where the last one ends."""
    return (0, *(edge for edge in EDGES if edge < width), width)


def learn_axes(rows: Tensor) -> Axes:
    """The principal axes of float32 (N, D) about 0 in blocks, the longest first, each turned within itself by `mixing`.

    No rotation, and one block, if the first block of the principal ones would leave more than LEFT of the rows. That
    is estimated from a sample of which some rows serve as queries. The bound is Leading's for inner products without rounding.
    """
    picked = torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[:SAMPLE])
    sample = rows[picked].double()
    sample = sample[sample.isfinite().all(dim=1)]
    _, axes = torch.linalg.eigh(sample.T @ sample / max(1, len(sample)))
    axes = axes.flip(1)
    width = rows.shape[1]
    if share_left(sample @ axes) > LEFT:
        return Axes(None, (0, width))
    edges = block_edges(width)
    return Axes(torch.cat([axes[:, start:end] @ mixing(end - start) for start, end in pairwise(edges)], dim=1), edges)


def share_left(rotated: Tensor) -> float:
    """The share of rows, 0 to 1, that the first block of dimensions leaves; 1 if there are no rows."""
    if not len(rotated):
        return 1.0
    queries = rotated[:QUERIES]
    best = (queries @ rotated.T).topk(min(NEIGHBOURS + 1, len(rotated))).values[:, -1:]  # each query finds itself as well
    lead, rest = slice(0, EDGES[0]), slice(EDGES[0], None)
    bounds = queries[:, lead] @ rotated[:, lead].T + queries[:, rest].norm(dim=1)[:, None] * rotated[:, rest].norm(dim=1)
    return float((bounds >= best).double().mean())


def mixing(width: int) -> Tensor:
    """An orthogonal matrix, float64 (D, D), that makes the coordinates of most vectors alike in size: for int8 codes.

    Random signs, then the cosine transform (DCT-II).
    """
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], size=(width, 1)))
    places = torch.arange(width, dtype=torch.float64)
    waves = torch.cos(torch.pi / width * (places[:, None] + 0.5) * places) * (2 / width) ** 0.5
    waves[:, 0] *= 0.5**0.5
    return signs * waves
