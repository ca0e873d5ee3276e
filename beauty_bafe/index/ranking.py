"""The search results of a set of queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Evidence:
    """What the probabilities of answers are computed from.

    `single`: float (Q, k, E), of each answer. `pairwise`: float (Q, k, k, P); at [q, i, j] for answer i against answer j, NaN
    where unknown; the diagonal is ignored. Raises ValueError if their shapes do not fit.
    """

    single: np.ndarray
    pairwise: np.ndarray

    def __post_init__(self) -> None:
        if self.pairwise.shape[:3] != (*self.single.shape[:2], self.single.shape[1]):
            raise ValueError(f"pairwise evidence {self.pairwise.shape} does not fit that of each answer {self.single.shape}")

    @classmethod
    def of(cls, single: np.ndarray) -> Evidence:
        """Evidence without pairwise numbers."""
        queries, answers = single.shape[:2]
        return cls(single, np.zeros((queries, answers, answers, 0), np.float32))

    def first(self, k: int) -> Evidence:
        """The evidence for the first k answers."""
        return Evidence(self.single[:, :k], self.pairwise[:, :k, :k])

    def take(self, queries: np.ndarray) -> Evidence:
        """The evidence for the queries in these rows."""
        return Evidence(self.single[queries], self.pairwise[queries])

    def pick(self, places: np.ndarray) -> Evidence:
        """The evidence for the answers at these places of each row, int (Q, n), in this order."""
        single = np.take_along_axis(self.single, places[..., None], axis=1)
        rows = np.take_along_axis(self.pairwise, places[:, :, None, None], axis=1)
        return Evidence(single, np.take_along_axis(rows, places[:, None, :, None], axis=2))

    def join(self, other: Evidence) -> Evidence:
        """This evidence and `other`, for the same answers."""
        parts = zip((self.single, self.pairwise), (other.single, other.pairwise), strict=True)
        return Evidence(*(np.concatenate(pair, axis=-1) for pair in parts))


@dataclass(frozen=True)
class Ranking:
    """`positions`: int (Q, k), rows of the gallery, best first. `scores`: float (Q, k), non-increasing along each row.

    `probabilities`: float32 (Q, k), that each answer is right; None without a Calibration. `evidence`: what they are computed
    from, a similarity first; None: the scores.

    Raises ValueError if shapes differ, a position is out of range or repeated in a row, or scores increase or are not finite.
    """

    query_ids: tuple[str, ...]
    gallery_ids: tuple[str, ...]
    positions: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray | None = None
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        if self.positions.shape != self.scores.shape or len(self.positions) != len(self.query_ids):
            raise ValueError(
                f"positions {self.positions.shape} and scores {self.scores.shape} do not fit {len(self.query_ids)} queries"
            )
        if self.positions.size and not 0 <= self.positions.min() <= self.positions.max() < len(self.gallery_ids):
            raise ValueError(f"positions must lie in 0..{len(self.gallery_ids) - 1}")
        if self.evidence is not None and self.evidence.single.shape[:2] != self.positions.shape:
            raise ValueError(f"evidence {self.evidence.single.shape} does not fit positions {self.positions.shape}")
        ordered = np.sort(self.positions, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError("a gallery picture occurs twice among the answers to one query")
        broken = np.flatnonzero(~np.isfinite(self.scores).all(axis=1))
        if len(broken):
            raise ValueError(
                f"the scores of query '{self.query_ids[broken[0]]}' are not finite: {self.scores[broken[0]].tolist()[:7]}; "
                "type rerank=none to see whether a re-ranking step is the cause"
            )
        if (np.diff(self.scores, axis=1) > 0).any():
            raise ValueError("scores must not increase along a row")

    def first(self, k: int) -> Ranking:
        """The k best answers to each query. Raises ValueError if there are fewer."""
        if k > self.positions.shape[1]:
            raise ValueError(
                f"k={k}, but re-ranking or fusion kept {self.positions.shape[1]} answers; raise their depth to k or lower k"
            )
        sure = None if self.probabilities is None else self.probabilities[:, :k]
        evidence = None if self.evidence is None else self.evidence.first(k)
        return Ranking(self.query_ids, self.gallery_ids, self.positions[:, :k], self.scores[:, :k], sure, evidence)

    def get_evidence(self) -> Evidence:
        """What probabilities are computed from."""
        return Evidence.of(self.scores[..., None]) if self.evidence is None else self.evidence

    def answers(self, query: int) -> list[str]:
        """The gallery ids that answer one query, best first."""
        return [self.gallery_ids[position] for position in self.positions[query].tolist()]

    def certainty(self, query: int) -> list[float] | list[None]:
        """The probabilities of the answers to one query; None for each if there are none."""
        return [None] * self.positions.shape[1] if self.probabilities is None else self.probabilities[query].tolist()

    def as_answers(self) -> dict[str, list[str]]:
        """Query id -> gallery ids, best first."""
        return {query: self.answers(row) for row, query in enumerate(self.query_ids)}


def check_k(k: int, gallery: int) -> None:
    """Raise ValueError if k is not between 1 and the number of pictures in the gallery."""
    if not 1 <= k <= gallery:
        raise ValueError(f"k={k}, but the gallery has {gallery} readable pictures; type k= a number from 1 to {gallery}")
