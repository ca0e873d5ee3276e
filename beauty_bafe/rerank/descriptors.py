"""Re-rankers that need descriptors alone.

None compares the whole gallery with itself at once: they look at each query's first `depth` answers, or search block by
block. Likeness is the cosine, whatever metric the index searches by and whatever length its vectors have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rich.progress import track

from ..extraction.features import unit
from ..index.base import Index
from .candidates import Candidates, reorder, with_depth

BLOCK = 1024  # gallery rows searched for together
SILENT = 5000  # rows or queries below which no progress is shown


@dataclass(frozen=True)
class QueryExpansion:
    """Alpha query expansion (Radenovic et al., TPAMI 2019): search again with each query plus its n best answers.

    An answer weighs likeness^alpha (nothing where negative), the query itself 1. `n` beyond the gallery is all of it.
    """

    n: int
    alpha: float

    @property
    def depth(self) -> int:
        return self.n

    def __call__(self, found: Candidates) -> Candidates:
        found = with_depth(found, self.n)
        queries = found.queries.vectors
        items = np.concatenate([queries[:, None], found.vectors(self.n)], axis=1)
        return _search_again(found, _turn(queries, items, self.alpha), found.index)


@dataclass(frozen=True)
class GalleryAugmentation:
    """Database-side augmentation (Arandjelovic & Zisserman, CVPR 2012; weights as in alpha expansion).

    Every gallery descriptor becomes the sum of its n + 1 nearest ones, itself among them, weighted by likeness^alpha;
    then all queries search anew. Costs one search with every gallery picture as a query.
    """

    n: int
    alpha: float
    depth = 0  # it searches anew

    def __call__(self, found: Candidates) -> Candidates:
        index, rows = found.index, len(found.index)
        augmented = np.empty((rows, index.dimensions), np.float32)
        starts = range(0, rows, BLOCK)
        for start in track(starts, f"augmenting {rows} gallery descriptors") if rows > SILENT else starts:
            names = index.ids[start : start + BLOCK]
            block = index.get(names)
            near = replace(found, ranking=index.search(block, names, min(self.n + 1, rows)))
            augmented[start : start + BLOCK] = _turn(block, near.vectors(self.n + 1), self.alpha)
        return _search_again(found, found.queries.vectors, copy.copy(index).fit(augmented, index.ids))


def _turn(vectors: np.ndarray, items: np.ndarray, alpha: float) -> np.ndarray:
    """(N, D) in the direction of the sum of its `items`, (N, n, D), each at length 1 times likeness^alpha; lengths stay."""
    directions = unit(items)
    weights = np.maximum(np.einsum("qd,qnd->qn", unit(vectors), directions), 0) ** alpha
    return unit(np.einsum("qn,qnd->qd", weights, directions)) * np.linalg.norm(vectors, axis=1, keepdims=True)


@dataclass(frozen=True)
class KReciprocal:
    """k-reciprocal encoding (Zhong et al., CVPR 2017) among each query and its first `depth` answers.

    Score: minus ((1 - weight) x Jaccard distance of their k-reciprocal neighbourhoods + weight x cosine distance), with
    neighbourhoods of `k1`, averaged over the `k2` nearest.
    """

    depth: int
    k1: int
    k2: int
    weight: float

    def __call__(self, found: Candidates) -> Candidates:
        return _rescore(found, self.depth, self._score)

    def _score(self, query: np.ndarray, answers: np.ndarray) -> np.ndarray:
        items = np.concatenate([query[None], answers])
        distance = 1 - items @ items.T
        np.fill_diagonal(distance, -1)  # everything is its own nearest, duplicates or not
        order = np.argsort(distance, axis=1, kind="stable")
        np.fill_diagonal(distance, 0)
        near, half = (_mutual(order, min(k + 1, len(items))) for k in (self.k1, round(self.k1 / 2)))
        # Neighbours whose own, smaller neighbourhood lies two thirds inside bring it along.
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
    """Diffusion (Iscen et al., CVPR 2017) truncated to each query's first `depth` answers (Yang et al., AAAI 2019).

    Solves (I - alpha D^-1/2 A D^-1/2) f = y: A holds likeness^gamma of mutual `k` nearest answers, y the query's
    likeness^gamma to its `seeds` best. Answers that nothing flows to keep their order behind the others.
    """

    depth: int
    k: int
    seeds: int
    alpha: float
    gamma: float

    def __call__(self, found: Candidates) -> Candidates:
        return _rescore(found, self.depth, self._score)

    def _score(self, query: np.ndarray, answers: np.ndarray) -> np.ndarray:
        likeness = np.maximum(answers @ answers.T, 0).astype(np.float64)
        np.fill_diagonal(likeness, -1)
        near = _mutual(np.argsort(-likeness, axis=1, kind="stable"), min(self.k, len(answers) - 1))
        affinity = np.where(near, np.maximum(likeness, 0) ** self.gamma, 0)
        root = np.sqrt(affinity.sum(axis=1))
        scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
        to_query = np.maximum(answers @ query, 0).astype(np.float64) ** self.gamma
        to_query[np.argsort(-to_query, kind="stable")[self.seeds :]] = 0
        return np.linalg.solve(np.eye(len(answers)) - self.alpha * scale[:, None] * affinity * scale, to_query)


@dataclass(frozen=True)
class SuperGlobal:
    """SuperGlobal re-ranking (Shao et al., ICCV 2023): M = `depth`, K = `k`.

    An answer is refined to the weighted mean of itself (1) and its k nearest among the answers (beta x likeness). The score
    is the mean of two products of the refined answer: with the query, and with the largest value a dimension has among the
    k + 1 refined answers nearest to the query.
    """

    depth: int
    k: int
    beta: float

    def __call__(self, found: Candidates) -> Candidates:
        return _rescore(found, self.depth, self._score)

    def _score(self, query: np.ndarray, answers: np.ndarray) -> np.ndarray:
        likeness = answers @ answers.T
        np.fill_diagonal(likeness, np.inf)
        near = np.argsort(-likeness, axis=1, kind="stable")[:, : self.k + 1]
        weights = self.beta * np.take_along_axis(likeness, near, axis=1)
        weights[:, 0] = 1
        refined = np.einsum("an,and->ad", weights, answers[near]) / weights.sum(axis=1, keepdims=True)
        first = refined @ query
        largest = refined[np.argsort(-first, kind="stable")[: self.k + 1]].max(axis=0)
        return (first + refined @ largest) / 2


def _rescore(found: Candidates, depth: int, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Candidates:
    """Order each query's first `depth` answers by `score(query (D,), answers (depth, D))`, vectors at length 1; equal ones
    keep their order.
    """
    found = with_depth(found, depth)
    positions = found.ranking.positions[:, :depth]
    queries = range(len(positions))
    values = np.empty(positions.shape, np.float32)
    for row in track(queries, f"re-ranking {len(positions)} queries") if len(positions) > SILENT else queries:
        values[row] = score(unit(found.queries.vectors[row]), unit(found.vectors(depth, slice(row, row + 1))[0]))
    return reorder(found, values)


def _search_again(found: Candidates, queries: np.ndarray, index: Index) -> Candidates:
    ranking = index.search(queries, found.queries.ids, found.ranking.positions.shape[1])
    return replace(found, ranking=ranking, queries=replace(found.queries, vectors=queries), index=index, rescored=False)


def _mutual(order: np.ndarray, k: int) -> np.ndarray:
    """Neighbours by nearness, int (N, N) -> bool (N, N): each is among the other's first k."""
    near = np.zeros(order.shape, bool)
    np.put_along_axis(near, order[:, :k], True, axis=1)
    return near & near.T
