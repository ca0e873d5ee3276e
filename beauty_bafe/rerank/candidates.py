"""What a re-ranker is given and what it is: candidates in, better ones out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..data.catalog import Catalog
from ..data.images import Pictures
from ..extraction.features import Features
from ..index.base import Index
from ..index.ranking import Ranking


@dataclass(frozen=True)
class Candidates:
    """The answers so far, the queries, and the index to search again; `context` is for steps that look at pictures.

    `rescored`: the scores are a re-ranker's, no longer the index's.
    """

    ranking: Ranking
    queries: Features
    index: Index
    context: SearchContext | None = None
    rescored: bool = False

    def vectors(self, depth: int, rows: slice = slice(None)) -> np.ndarray:
        """The first `depth` answers of the queries in `rows`, float32 (queries, depth, D)."""
        positions = self.ranking.positions[rows, :depth]
        names = self.ranking.gallery_ids
        vectors = self.index.get([names[place] for place in positions.ravel().tolist()])
        return vectors.reshape(*positions.shape, self.index.dimensions)


@dataclass(frozen=True)
class SearchContext:
    """The pictures behind a search. `folder`: where a step may keep what it makes of them, `looks`: what it has opened there,
    for later searches of the same gallery.
    """

    gallery: Catalog
    queries: Pictures
    folder: Path
    looks: dict[Any, Any] = field(default_factory=dict)


class Reranker(Protocol):
    """Candidates -> better ones. `depth`: how many of each query's first answers it looks at, 0: those it is given."""

    @property
    def depth(self) -> int: ...

    def __call__(self, found: Candidates) -> Candidates: ...


@runtime_checkable
class Learner(Reranker, Protocol):
    """A re-ranker, a dataclass, whose `weights` may be learned from street views of the gallery, once, before it answers."""

    @property
    def weights(self) -> Mapping[str, float] | None: ...

    def learned(self, practice: Candidates) -> Reranker:
        """What has learned. `practice`: queries named after the gallery pictures that they show."""


def check_depth(depth: int) -> None:
    """Raise ValueError where no answer would be left."""
    if depth < 1:
        raise ValueError(f"depth={depth}: type how many of each query's first answers are looked at, 1 or more")


def reorder(found: Candidates, scores: np.ndarray) -> Candidates:
    """Each query's first answers by new scores, float (Q, depth), and no others; equal ones keep their order."""
    scores = scores.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")
    positions = np.take_along_axis(found.ranking.positions[:, : scores.shape[1]], order, axis=1)
    ranking = Ranking(found.ranking.query_ids, found.ranking.gallery_ids, positions, np.take_along_axis(scores, order, axis=1))
    return replace(found, ranking=ranking, rescored=True)


def with_depth(found: Candidates, depth: int) -> Candidates:
    """Search again where the ranking holds fewer than `depth` answers and the gallery has more.

    What a re-ranker has ordered stays as it is: searching again would forget its work.
    """
    have, want = found.ranking.positions.shape[1], min(depth, len(found.index))
    if have >= want or found.rescored:
        return found
    return replace(found, ranking=found.index.search(found.queries.vectors, found.queries.ids, want))
