"""Re-rankers that use only descriptors.

None needs all pairs of gallery descriptors at once: they use each query's first `depth` candidates, or search in blocks.
Similarity is the cosine, whatever the metric of the index and the length of its vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..extraction.features import unit
from ..index.base import Index
from ..progress import show_progress
from .candidates import Candidates, reorder, with_depth

BLOCK = 1024  # gallery rows used as queries at a time
PROGRESS_ABOVE = 5000  # rows or queries up to which no progress is shown


@dataclass(frozen=True)
class QueryExpansion:
    """Alpha query expansion (Radenovic et al., TPAMI 2019): search again with each query plus its n best candidates.

    A candidate is weighted by similarity^alpha (0 if negative), the query by 1. `n` is capped at the gallery's size.
    """

    n: int
    alpha: float

    @property
    def depth(self) -> int:
        return self.n

    def __call__(self, candidates: Candidates) -> Candidates:
        candidates = with_depth(candidates, self.n)
        queries = candidates.queries.vectors
        items = np.concatenate([queries[:, None], candidates.vectors(self.n)], axis=1)
        return _search_again(candidates, _expand(queries, items, self.alpha), candidates.index)


@dataclass(frozen=True)
class GalleryAugmentation:
    """Database-side augmentation (Arandjelovic & Zisserman, CVPR 2012; weights as in alpha expansion).

    Replace every gallery descriptor by the sum of its n + 1 nearest neighbours (itself included), weighted by
    similarity^alpha, and search again. Costs one search with every gallery picture as a query.
    """

    n: int
    alpha: float
    depth = 0  # it searches again

    def __call__(self, candidates: Candidates) -> Candidates:
        index, rows = candidates.index, len(candidates.index)
        augmented = np.empty((rows, index.dimensions), np.float32)
        starts = range(0, rows, BLOCK)
        for start in show_progress(starts, f"augmenting {rows} gallery descriptors", rows, PROGRESS_ABOVE):
            names = index.ids[start : start + BLOCK]
            block = index.get(names)
            near = replace(candidates, ranking=index.search(block, names, min(self.n + 1, rows)))
            augmented[start : start + BLOCK] = _expand(block, near.vectors(self.n + 1), self.alpha)
        return _search_again(candidates, candidates.queries.vectors, copy.copy(index).fit(augmented, index.ids))


def _expand(vectors: np.ndarray, items: np.ndarray, alpha: float) -> np.ndarray:
    """Sum the unit vectors of `items`, (N, n, D), weighted by similarity^alpha; rescale to the lengths of `vectors`, (N, D)."""
    directions = unit(items)
    weights = np.maximum(np.einsum("qd,qnd->qn", unit(vectors), directions), 0) ** alpha
    return unit(np.einsum("qn,qnd->qd", weights, directions)) * np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class KReciprocal:
    """k-reciprocal encoding (Zhong et al., CVPR 2017) within each query and its first `depth` candidates.

    Score: minus ((1 - weight) x Jaccard distance of their k-reciprocal neighbourhoods + weight x cosine distance). The
    neighbourhoods have size `k1`, and their encodings are averaged over the `k2` nearest.
    """

    depth: int
    k1: int
    k2: int
    weight: float

    def __call__(self, candidates: Candidates) -> Candidates:
        return _rescore(candidates, self.depth, self._score)

    def _score(self, query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        items = np.concatenate([query[None], candidates])
        distance = 1 - items @ items.T
        np.fill_diagonal(distance, -1)  # each item is its own nearest neighbour, even among duplicates
        order = np.argsort(distance, axis=1, kind="stable")
        np.fill_diagonal(distance, 0)
        near, half = (_mutual(order, min(k + 1, len(items))) for k in (self.k1, round(self.k1 / 2)))
        # A neighbour's smaller neighbourhood is added if two thirds of it are already included.
        overlap = near.astype(np.float32) @ half.T.astype(np.float32)
        joining = near & (overlap >= half.sum(axis=1) * (2 / 3))
        wide = near | ((joining.astype(np.float32) @ half.astype(np.float32)) > 0)
        encoding = np.where(wide, np.exp(-distance), 0)
        encoding /= encoding.sum(axis=1, keepdims=True)
        encoding = np.stack([encoding[row[: self.k2]].mean(axis=0) for row in order])
        smaller = np.minimum(encoding[0], encoding[1:]).sum(axis=1)
        larger = np.maximum(encoding[0], encoding[1:]).sum(axis=1)
        return -((1 - self.weight) * (1 - smaller / larger) + self.weight * distance[0, 1:])


@dataclass(frozen=True)
class Diffusion:
    """Diffusion (Iscen et al., CVPR 2017) truncated to each query's first `depth` candidates (Yang et al., AAAI 2019).

    Solves (I - alpha D^-1/2 A D^-1/2) f = y. A holds similarity^gamma of mutual `k` nearest candidates; y holds the query's
    similarity^gamma to its `seeds` best ones. Candidates that are not reached keep their order, after the others.
    """

    depth: int
    k: int
    seeds: int
    alpha: float
    gamma: float

    def __call__(self, candidates: Candidates) -> Candidates:
        return _rescore(candidates, self.depth, self._score)

    def _score(self, query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        similarity = np.maximum(candidates @ candidates.T, 0).astype(np.float64)
        np.fill_diagonal(similarity, -1)
        near = _mutual(np.argsort(-similarity, axis=1, kind="stable"), min(self.k, len(candidates) - 1))
        affinity = np.where(near, np.maximum(similarity, 0) ** self.gamma, 0)
        root = np.sqrt(affinity.sum(axis=1))
        scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
        to_query = np.maximum(candidates @ query, 0).astype(np.float64) ** self.gamma
        to_query[np.argsort(-to_query, kind="stable")[self.seeds :]] = 0
        return np.linalg.solve(np.eye(len(candidates)) - self.alpha * scale[:, None] * affinity * scale, to_query)


@dataclass(frozen=True)
class SuperGlobal:
    """SuperGlobal re-ranking (Shao et al., ICCV 2023): M = `depth`, K = `k`.

    A candidate is refined to the weighted mean of itself (weight 1) and its k nearest candidates (beta x similarity). The
    score is the mean of two inner products of the refined candidate: with the query, and with the element-wise maximum of
    the k + 1 refined candidates nearest to the query.
    """

    depth: int
    k: int
    beta: float

    def __call__(self, candidates: Candidates) -> Candidates:
        return _rescore(candidates, self.depth, self._score)

    def _score(self, query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        similarity = candidates @ candidates.T
        np.fill_diagonal(similarity, np.inf)
        near = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k + 1]
        weights = self.beta * np.take_along_axis(similarity, near, axis=1)
        weights[:, 0] = 1
        refined = np.einsum("an,and->ad", weights, candidates[near]) / weights.sum(axis=1, keepdims=True)
        first = refined @ query
        largest = refined[np.argsort(-first, kind="stable")[: self.k + 1]].max(axis=0)
        return (first + refined @ largest) / 2


def _rescore(candidates: Candidates, depth: int, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Candidates:
    """Sort each query's first `depth` candidates by `score(query (D,), candidates (depth, D))`, of vectors of length 1;
    ties keep their order.
    """
    candidates = with_depth(candidates, depth)
    positions = candidates.ranking.positions[:, :depth]
    count = len(positions)
    values = np.empty(positions.shape, np.float32)
    for row in show_progress(range(count), f"re-ranking {count} queries", count, PROGRESS_ABOVE):
        values[row] = score(unit(candidates.queries.vectors[row]), unit(candidates.vectors(depth, slice(row, row + 1))[0]))
    return reorder(candidates, values)


def _search_again(candidates: Candidates, queries: np.ndarray, index: Index) -> Candidates:
    ranking = index.search(queries, candidates.queries.ids, candidates.ranking.positions.shape[1])
    expanded = replace(candidates.queries, vectors=queries)
    return replace(candidates, ranking=ranking, queries=expanded, index=index, rescored=False)


def _mutual(order: np.ndarray, k: int) -> np.ndarray:
    """Neighbours, nearest first, int (N, N) -> bool (N, N): whether each is among the other's first k."""
    near = np.zeros(order.shape, bool)
    np.put_along_axis(near, order[:, :k], True, axis=1)
    return near & near.T
