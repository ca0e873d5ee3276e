"""Ensembles: several descriptors of a picture are concatenated, or several rankings are fused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..extraction.features import Features, mean_masks, unit
from ..index.ranking import Ranking
from ..manifest import replace_file

BLOCK = 1 << 14  # rows processed at a time
PCA_ROWS = 100_000  # gallery rows, evenly spread, that a PCA is learned from at most


class Concatenation:
    """Z-score each member's descriptors if `zscore`, L2-normalise, weight and concatenate them, and L2-normalise the result.

    `zscore`: subtract the mean and divide by the standard deviation of every dimension, both of the gallery, for gallery
    and queries alike (the paper uses the queries' own, which gives NaN for a single query). `weights`: one per member, or
    None for equal ones; a weight is a share of the final score, so vectors are scaled by its square root. `pca`: number of
    principal components of the gallery to keep, centred; `whiten`: scale each to the same variance (Jegou & Chum, ECCV
    2012). Everything is learned from the gallery alone. `normalize`: whether members and result are L2-normalised; BAFE's
    code does not, and compares by L2 (`index.metric=l2`).
    """

    depth = 0  # it needs no more answers than requested

    def __init__(
        self,
        zscore: bool,
        weights: Sequence[float] | None,
        pca: int | None = None,
        whiten: bool = False,
        normalize: bool = True,
    ) -> None:
        self.zscore, self.weights, self.pca, self.whiten, self.normalize = zscore, weights, pca, whiten, normalize
        self._learned: dict[str, np.ndarray] = {}

    def describe(self) -> dict[str, Any]:
        """Plain values that must be the same in a saved ensemble for this one to load it."""
        weights = None if self.weights is None else [float(weight) for weight in self.weights]
        return {
            "ensemble": "concatenation",
            "zscore": self.zscore,
            "weights": weights,
            "pca": self.pca,
            "whiten": self.whiten,
            "normalize": self.normalize,
        }

    def fit(self, gallery: Sequence[Features]) -> Self:
        """Learn the gallery's statistics. Raises ValueError if `weights` or `pca` do not fit the gallery."""
        _check_weights(self.weights, len(gallery))
        self._learned = {}
        for number, features in enumerate(gallery):
            if self.zscore:
                vectors = features.vectors
                self._learned[f"mean{number}"] = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
                deviation = np.sqrt(_variance(vectors, self._learned[f"mean{number}"]))
                # A constant dimension is divided by 1, so that its z-score is 0 for the whole gallery.
                self._learned[f"deviation{number}"] = np.where(deviation > 1e-8, deviation, 1.0).astype(np.float32)
        if self.pca is not None:
            from sklearn.decomposition import PCA

            width = sum(features.vectors.shape[1] for features in gallery)
            rows = np.unique(np.linspace(0, len(gallery[0].ids) - 1, PCA_ROWS).astype(int))
            if not 1 <= self.pca <= min(width, len(rows)):
                raise ValueError(
                    f"ensemble.pca={self.pca} of {width} dimensions and {len(rows)} gallery pictures; "
                    f"type a number from 1 to {min(width, len(rows))}"
                )
            sample = self._joined([features.vectors[rows] for features in gallery])
            model = PCA(self.pca, whiten=self.whiten, svd_solver="covariance_eigh" if width <= 4096 else "randomized").fit(
                sample
            )
            scale = np.sqrt(np.maximum(model.explained_variance_, 1e-12)) if self.whiten else np.ones(self.pca)
            self._learned["centre"] = model.mean_.astype(np.float32)
            self._learned["axes"] = (model.components_ / scale[:, None]).astype(np.float32)
        return self

    def transform(self, members: Sequence[Features]) -> list[Features]:
        """One Features per member, of the same pictures -> a list of one Features, (N, D), of length 1 if `normalize`."""
        if any(features.ids != members[0].ids for features in members):
            raise ValueError("the members' features are of different pictures; describe the same catalogue with all of them")
        width = self.pca or sum(features.vectors.shape[1] for features in members)
        joined = np.empty((len(members[0].ids), width), np.float32)  # filled in place, to keep one copy in memory
        for start in range(0, len(joined), BLOCK):
            block = self._joined([features.vectors[start : start + BLOCK] for features in members])
            if "axes" in self._learned:
                block = (block - self._learned["centre"]) @ self._learned["axes"].T
                block = unit(block) if self.normalize else block
            joined[start : start + BLOCK] = block
        return [Features(joined, members[0].ids, mean_masks(members).masks, any_length=not self.normalize)]

    def _joined(self, members: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        for number, (vectors, weight) in enumerate(zip(members, self.weights or [1.0] * len(members), strict=True)):
            if self.zscore:
                vectors = (vectors - self._learned[f"mean{number}"]) / self._learned[f"deviation{number}"]
            parts.append((unit(vectors) if self.normalize else vectors) * np.float32(weight**0.5))
        joined = np.concatenate(parts, axis=1)
        return unit(joined) if self.normalize else joined

    def fuse(self, rankings: Sequence[Ranking], k: int) -> Ranking:
        """The first k of the only ranking."""
        return rankings[0].first(k)

    def save(self, folder: Path) -> None:
        """Write what was learned, so that later queries are transformed in the same way."""
        replace_file(folder / "ensemble.npz", lambda part: _save_npz(part, self._learned))

    def load(self, folder: Path) -> Self:
        with np.load(folder / "ensemble.npz") as file:
            self._learned = {name: file[name] for name in file.files}
        return self


class Fusion:
    """Every member is searched separately, and the rankings are fused.

    `method`: "score", the weighted mean of scores, standardised over each member's `depth` answers to the query (a picture
    missing among them counts as the last one); or "rank", reciprocal rank fusion, the weighted mean of 1 / (60 + rank)
    (Cormack et al., SIGIR 2009). `weights`: one per member, or None for equal ones. `depth`: answers used of each member.
    """

    def __init__(self, method: str, weights: Sequence[float] | None, depth: int) -> None:
        if method not in ("score", "rank"):
            raise ValueError(f"ensemble.method={method}: type score or rank")
        self.method, self.weights, self.depth = method, weights, depth

    def describe(self) -> dict[str, Any]:
        """Plain values that must be the same in a saved ensemble for this one to load it."""
        return {"ensemble": "fusion"}

    def fit(self, gallery: Sequence[Features]) -> Self:
        """Learn nothing. Raises ValueError if the numbers of weights and members differ."""
        _check_weights(self.weights, len(gallery))
        return self

    def transform(self, members: Sequence[Features]) -> list[Features]:
        """Each member's descriptors, L2-normalised."""
        return [Features(unit(features.vectors).astype(np.float32), features.ids, features.masks) for features in members]

    def fuse(self, rankings: Sequence[Ranking], k: int) -> Ranking:
        """Fuse rankings of the same queries over the same gallery: the k best of each query, ties in the gallery's order.

        Raises ValueError if a ranking is shorter than k, as the fused one could then be shorter as well.
        """
        for ranking in rankings:
            ranking.first(k)
        weights = self.weights or [1.0] * len(rankings)
        positions = np.zeros((len(rankings[0].query_ids), k), np.int64)
        scores = np.zeros(positions.shape, np.float32)
        for query in range(len(positions)):
            votes = [_votes(ranking, query, self.method) for ranking in rankings]
            candidates = np.array(sorted(set().union(*(vote for vote, _ in votes))))
            table = np.array([[vote.get(candidate, absent) for candidate in candidates.tolist()] for vote, absent in votes])
            total = np.average(table, axis=0, weights=weights)
            order = np.argsort(-total, kind="stable")[:k]
            positions[query], scores[query] = candidates[order], total[order]
        return Ranking(rankings[0].query_ids, rankings[0].gallery_ids, positions, scores)

    def save(self, folder: Path) -> None:
        """Write nothing."""

    def load(self, folder: Path) -> Self:
        return self


def _votes(ranking: Ranking, query: int, method: str) -> tuple[dict[int, float], float]:
    """One member's vote for each of its answers to a query, and for every other picture."""
    places, scores = ranking.positions[query].tolist(), ranking.scores[query].astype(float)
    if method == "rank":
        return {place: 1 / (60 + rank) for rank, place in enumerate(places, start=1)}, 0.0
    spread = max(float(scores.std()), 1e-12)
    values = ((scores - scores.mean()) / spread).tolist()
    return dict(zip(places, values, strict=True)), values[-1]


def _check_weights(weights: Sequence[float] | None, members: int) -> None:
    if weights is not None and (len(weights) != members or min(weights) < 0 or not sum(weights)):
        raise ValueError(f"ensemble.weights={list(weights)} for {members} members; give one number of 0 or more for each")


def _variance(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), BLOCK):
        total += np.square(vectors[start : start + BLOCK] - mean, dtype=np.float64).sum(axis=0)
    return total / len(vectors)


def _save_npz(part: Path, arrays: dict[str, Any]) -> None:
    with part.open("wb") as stream:  # np.savez would append .npz to the name
        np.savez(stream, **dict(arrays))
