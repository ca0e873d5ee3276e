"""Several descriptors of one picture become one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .features import Features


class Concatenation:
    """L2-normalise each checkpoint's descriptors, z-score them if asked, weigh, concatenate, L2-normalise the whole.

    `zscore`: subtract the mean and divide by the deviation of every dimension, both of the gallery, for gallery and
    queries alike (the paper takes the queries' own, so that one query gives NaN). `weights`: one a checkpoint, or None
    for equal ones; a weight is a share of the final score, so vectors are scaled by its square root.
    """

    def __init__(self, zscore: bool, weights: Sequence[float] | None) -> None:
        self.zscore, self.weights = zscore, weights
        self._statistics: list[tuple[np.ndarray, np.ndarray]] = []

    def fit(self, gallery: Sequence[Features]) -> Concatenation:
        """Learn the gallery's statistics. Raises ValueError where the number of weights differs from that of checkpoints."""
        if self.weights is not None and (len(self.weights) != len(gallery) or min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError(
                f"ensemble.weights={list(self.weights)} for {len(gallery)} checkpoints; give one number of 0 or more for each"
            )
        # A dimension that never varies carries nothing: divided by 1, its z-score is 0 everywhere in the gallery.
        self._statistics = []
        for features in gallery:
            deviation = features.vectors.std(axis=0)
            self._statistics.append((features.vectors.mean(axis=0), np.where(deviation > 1e-8, deviation, 1.0)))
        return self

    def transform(self, members: Sequence[Features]) -> Features:
        """One Features per checkpoint, of the same pictures -> one, float32 (N, sum of D), rows of length 1."""
        weights = self.weights or [1.0] * len(members)
        parts = []
        for features, weight, (mean, deviation) in zip(members, weights, self._statistics, strict=True):
            if features.ids != members[0].ids:
                raise ValueError("the checkpoints' features are of different pictures; extract them from one catalogue")
            vectors = _unit((features.vectors - mean) / deviation) if self.zscore else _unit(features.vectors)
            parts.append(vectors * np.float32(weight**0.5))
        return Features(_unit(np.concatenate(parts, axis=1)).astype(np.float32), members[0].ids, members[0].masks)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
