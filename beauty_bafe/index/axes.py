"""Principal axes of an index's rows, and a test of how many rows the leading dimensions rule out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EDGES = (128, 256, 512, 768)  # where blocks of dimensions end, except the last block
SAMPLE = 1 << 14  # rows from which the axes are learned
QUERIES, NEIGHBOURS = 64, 7  # rows of the sample that serve as queries, and for how many neighbours


class Axes(NamedTuple):
    """`rotation`: float64 (D, D), orthogonal, its columns sorted by the rows' mean squares along them; `units`: float64 (D,),
    the roots of these, at least a thousandth of the largest, which is 1."""

    rotation: Tensor
    units: Tensor


def block_edges(width: int) -> np.ndarray:
    """Where the blocks of `width` dimensions start, and where the last one ends, int64 (blocks + 1,)."""
    return np.array([0, *(edge for edge in EDGES if edge < width), width])


def learn_axes(rows: Tensor) -> tuple[Axes, float]:
    """The principal axes of float32 (N, D) about 0, and the share of rows, 0 to 1, that the first block of dimensions leaves.

    Both are estimated from a sample; some of its rows serve as queries. The bound is Leading's for inner products, but takes
    all later dimensions as one block, so that it is slightly looser.
    """
    picked = torch.from_numpy(np.random.default_rng(0).permutation(len(rows))[:SAMPLE])
    sample = rows[picked].double()
    sample = sample[sample.isfinite().all(dim=1)]
    squares, axes = torch.linalg.eigh(sample.T @ sample / max(1, len(sample)))
    units = squares.flip(0).clamp(min=0).sqrt()
    units = (units / units[:1]).clamp(min=1e-3) if len(units) and units[0] > 1e-30 else torch.ones_like(units)
    learned = Axes(axes.flip(1).contiguous(), units)
    if not len(sample):
        return learned, 1.0
    rotated = sample @ learned.rotation
    queries = rotated[:QUERIES]
    best = (queries @ rotated.T).topk(min(NEIGHBOURS + 1, len(rotated))).values[:, -1:]  # each query finds itself as well
    lead, rest = slice(0, EDGES[0]), slice(EDGES[0], None)
    bounds = queries[:, lead] @ rotated[:, lead].T + queries[:, rest].norm(dim=1)[:, None] * rotated[:, rest].norm(dim=1)
    return learned, float((bounds >= best).double().mean())
