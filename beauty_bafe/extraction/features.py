"""Descriptors of pictures, validated on construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

TOLERANCE = 1e-3  # of a vector's length, for the rounding of extraction.dtype=float16


@dataclass(frozen=True)
class Features:
    """`vectors`: float32 (N, D), one row per picture. `ids`: N names. `masks`: uint8 (N, M, M) saliency, 0 to 255, or None.

    Every vector has length 1, or 0 if nothing in the picture could be described, unless `any_length` is true: the
    ensemble of BAFE's code (`ensemble.normalize=false`) does not normalise them. Call `unit` where length 1 is needed.

    Raises ValueError if the numbers of rows and ids differ, or a vector is not finite or has another length.
    """

    vectors: np.ndarray
    ids: tuple[str, ...]
    masks: np.ndarray | None = None
    any_length: bool = False

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.ids):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.ids)} ids")
        for start in range(0, len(self.vectors), 1 << 14):
            block = self.vectors[start : start + (1 << 14)]
            broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if len(broken):
                raise ValueError(f"the descriptor of '{self.ids[start + broken[0]]}' is not finite; try precision=32-true")
            lengths = np.linalg.norm(block, axis=1)
            other = np.flatnonzero((np.abs(lengths - 1) > TOLERANCE) & (lengths != 0))
            if len(other) and not self.any_length:
                raise ValueError(
                    f"the descriptor of '{self.ids[start + other[0]]}' has length {lengths[other[0]]:.6g}, not 1; "
                    "pass `unit(vectors)`, or any_length=True"
                )


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) scaled to length 1; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def mean_masks(members: Sequence[Features]) -> Features:
    """The first member's features, with the mean mask of all members that have masks."""
    masks = [features.masks for features in members if features.masks is not None]
    if len(masks) < 2:
        return replace(members[0], masks=masks[0] if masks else None)
    mean = np.asarray(masks, np.float32).mean(axis=0) + 0.5
    return replace(members[0], masks=np.asarray(mean, np.uint8))
