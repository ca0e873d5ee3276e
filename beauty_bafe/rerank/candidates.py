"""The interface of re-rankers, and the search results that they take and return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..data.catalog import Catalog
from ..data.images import Pictures
from ..extraction.features import Features, unit
from ..index.base import Index
from ..index.ranking import Evidence, Ranking


@dataclass(frozen=True)
class Candidates:
    """The current ranking, the queries, and the index to search again; `context` is for steps that use the pictures.

    `rescored`: whether the scores are a re-ranker's rather than the index's. `small`: which queries are compared with small
    copies of the gallery's photos, bool (Q,); None before SmallCopies.
    """

    ranking: Ranking
    queries: Features
    index: Index
    context: SearchContext | None = None
    rescored: bool = False
    small: np.ndarray | None = None

    @property
    def needed_context(self) -> SearchContext:
        """`context`. Raises ValueError if there is none."""
        if self.context is None:
            raise ValueError("this re-ranking needs the pictures of gallery and queries, but this search has only descriptors")
        return self.context

    def vectors(self, depth: int, rows: slice = slice(None)) -> np.ndarray:
        """The first `depth` candidates of the queries in `rows`, float32 (queries, depth, D)."""
        positions = self.ranking.positions[rows, :depth]
        names = self.ranking.gallery_ids
        vectors = self.index.get([names[position] for position in positions.ravel().tolist()])
        return vectors.reshape(*positions.shape, self.index.dimensions)

    def take(self, rows: np.ndarray) -> Candidates:
        """The candidates of the queries in `rows`, int (R,)."""
        ranking, queries = self.ranking, self.queries
        ids = tuple(ranking.query_ids[row] for row in rows)
        evidence = None if ranking.evidence is None else ranking.evidence.take(rows)
        masks, small = (None if part is None else part[rows] for part in (queries.masks, self.small))
        return replace(
            self,
            ranking=Ranking(ids, ranking.gallery_ids, ranking.positions[rows], ranking.scores[rows], evidence=evidence),
            queries=replace(queries, vectors=queries.vectors[rows], ids=ids, masks=masks),
            small=small,
        )


class PictureDescriber(Protocol):
    """Describes pictures in the way the gallery's were described. `about`: identifies the networks and their settings; `size`:
    the longest side in pixels that they need.
    """

    @property
    def about(self) -> str: ...

    @property
    def size(self) -> int: ...

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 (H, W, 3) each -> the descriptors of each member of the ensemble, float32 (N, D)."""

    def combine(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """The descriptors of each member, float32 (N, D) -> those of the index, float32 (N, D)."""


@dataclass(frozen=True)
class SearchContext:
    """The pictures of a search. `folder`: where steps may cache what they extract from them; `cache`: what they have opened
    there, shared by all searches of the same gallery. `describe`: for steps that need descriptors of other pictures.
    """

    gallery: Catalog
    queries: Pictures
    folder: Path
    cache: dict[Any, Any] = field(default_factory=dict)
    describe: PictureDescriber | None = None


class Reranker(Protocol):
    """Candidates -> re-ranked candidates. `depth`: how many of each query's first candidates it re-ranks; 0: all given."""

    @property
    def depth(self) -> int: ...

    def __call__(self, candidates: Candidates) -> Candidates: ...


@runtime_checkable
class TrainableReranker(Reranker, Protocol):
    """A re-ranker, a dataclass, whose `weights` may be learned once from street views of the gallery, before it is used."""

    @property
    def weights(self) -> Mapping[str, float] | None: ...

    def fit(self, examples: Candidates) -> Reranker:
        """A copy with fitted weights. `examples`: queries whose ids are those of the gallery pictures that they show."""


def check_depth(depth: int) -> None:
    """Raise ValueError if no candidate would be left."""
    if depth < 1:
        raise ValueError(f"depth={depth}: type how many of each query's first candidates to re-rank, 1 or more")


def reorder(candidates: Candidates, scores: np.ndarray, evidence: Evidence | None = None) -> Candidates:
    """Sort each query's first candidates by new scores, float (Q, depth), and drop the others; ties keep their order.

    `evidence`: of the same candidates.
    """
    scores = scores.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranking = candidates.ranking
    positions = np.take_along_axis(ranking.positions[:, : scores.shape[1]], order, axis=1)
    evidence = None if evidence is None else evidence.pick(order)
    scores = np.take_along_axis(scores, order, axis=1)
    reordered = Ranking(ranking.query_ids, ranking.gallery_ids, positions, scores, evidence=evidence)
    return replace(candidates, ranking=reordered, rescored=True)


def with_depth(candidates: Candidates, depth: int) -> Candidates:
    """Search again if the ranking holds fewer than `depth` candidates and the gallery has more.

    A ranking that a re-ranker has rescored is returned as it is, as a new search would discard its scores.
    """
    have, want = candidates.ranking.positions.shape[1], min(depth, len(candidates.index))
    if have >= want or candidates.rescored:
        return candidates
    queries = candidates.queries
    return replace(candidates, ranking=candidates.index.search(queries.vectors, queries.ids, want))


def similarity_of(candidates: Candidates, depth: int) -> np.ndarray:
    """Scores of each query's first candidates, float (Q, depth), non-increasing along each row.

    Scores of the index are used if they are cosines. For distances, or inner products of vectors of any length, they have no
    fixed scale: then the cosines of the candidates, sorted in descending order, whatever the order of the candidates.
    """
    if candidates.rescored or (candidates.index.metric == "ip" and not candidates.queries.any_length):
        return candidates.ranking.scores[:, :depth]
    rows = enumerate(unit(candidates.queries.vectors))
    cosines = np.stack([unit(candidates.vectors(depth, slice(row, row + 1))[0]) @ query for row, query in rows])
    return -np.sort(-cosines, axis=1)
