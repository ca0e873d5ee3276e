"""Re-ranking by keypoints: the hybrid paper's count of matches, and pictures that can be laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .appearance import APPEARANCE, compare_looks
from .candidates import Candidates, check_depth, reorder, with_depth
from .evidence import EvidenceReranker
from .keypoints import Detector, Look
from .looking import look_at_answers
from .matching import Matcher, count_matches, fit_geometry


@dataclass(frozen=True)
class MatchCount:
    """The hybrid paper's: each query's first `depth` answers by the number of SIFT matches, ties by their distance.

    Answers without a match keep their order behind the others. Raises ValueError for a depth below 1.
    """

    depth: int
    ratio: float
    detector: Detector

    def __post_init__(self) -> None:
        check_depth(self.depth)

    def __call__(self, found: Candidates) -> Candidates:
        found = with_depth(found, self.depth)
        return reorder(found, look_at_answers(found, self.depth, self.detector, self._score)[..., 0])

    def _score(self, query: Look, candidates: Sequence[Look]) -> np.ndarray:
        counts = [count_matches(query.keypoints, candidate.keypoints, self.ratio) for candidate in candidates]
        # SIFT distances stay below 1000, so that no distance outweighs a match.
        return np.array([[count + (1 - min(distance, 999) / 1000 if count else 0)] for count, distance in counts])


@dataclass(frozen=True)
class Verification(EvidenceReranker):
    """Geometric verification, and how alike the pictures are where the geometry lays them over each other: see APPEARANCE.

    With `detector.foreground` the keypoints are the product's: of the query by its predicted mask, of a catalogue photo by
    its plain backdrop. `every_turn`: the query is matched upright and turned by 90, 180 and 270 degrees, and the most
    inliers count, for keypoints that change as the picture is turned.
    """

    detector: Detector
    matcher: Matcher
    every_turn: bool = False
    kinds = APPEARANCE

    def evidence(self, found: Candidates) -> np.ndarray:
        return look_at_answers(found, self.depth, self.detector, self._score, 4 if self.every_turn else 1)

    def _score(self, query: Look, candidates: Sequence[Look]) -> np.ndarray:
        keypoints, size = query.keypoints, self.detector.size
        matches = self.matcher(keypoints, [candidate.keypoints for candidate in candidates], size)
        scores = []
        for candidate, (rows, columns) in zip(candidates, matches, strict=True):
            geometry = fit_geometry(keypoints.points[rows], candidate.keypoints.points[columns])
            scores.append(compare_looks(query, candidate, geometry, size))
        return np.array(scores)
