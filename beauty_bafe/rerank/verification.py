"""Re-ranking by keypoints: the hybrid paper's count of matches, and geometric verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .appearance import APPEARANCE, compare_appearance
from .candidates import Candidates, check_depth, reorder, with_depth
from .evidence import EvidenceReranker
from .keypoints import Detector, LocalFeatures
from .local_features import score_candidates
from .matching import Matcher, count_matches, fit_geometry


@dataclass(frozen=True)
class MatchCount:
    """Sort each query's first `depth` candidates by the number of SIFT matches, ties by their distance (the hybrid paper).

    Candidates without a match keep their order, after the others. Raises ValueError for a depth below 1.
    """

    depth: int
    ratio: float
    detector: Detector

    def __post_init__(self) -> None:
        check_depth(self.depth)

    def __call__(self, candidates: Candidates) -> Candidates:
        candidates = with_depth(candidates, self.depth)
        return reorder(candidates, score_candidates(candidates, self.depth, self.detector, self._score)[..., 0])

    def _score(self, query: LocalFeatures, candidates: Sequence[LocalFeatures]) -> np.ndarray:
        counts = [count_matches(query.keypoints, candidate.keypoints, self.ratio) for candidate in candidates]
        # SIFT distances are below 1000, so a distance never outweighs a match.
        return np.array([[count + (1 - min(distance, 999) / 1000 if count else 0)] for count, distance in counts])


@dataclass(frozen=True)
class Verification(EvidenceReranker):
    """Geometric verification, and the similarity of the pictures once aligned by the geometry: see APPEARANCE.

    With `detector.foreground`, only keypoints on the product are used: it is located by the predicted mask in queries and by
    the plain backdrop in catalogue photos. `every_turn`: match the query rotated by 0, 90, 180 and 270 degrees and use the
    rotation with the most inliers, for descriptors that are not rotation-invariant.
    """

    detector: Detector
    matcher: Matcher
    every_turn: bool = False
    kinds = APPEARANCE

    def evidence(self, candidates: Candidates) -> np.ndarray:
        return score_candidates(candidates, self.depth, self.detector, self._score, 4 if self.every_turn else 1)

    def _score(self, query: LocalFeatures, candidates: Sequence[LocalFeatures]) -> np.ndarray:
        keypoints, size = query.keypoints, self.detector.size
        matches = self.matcher(keypoints, [candidate.keypoints for candidate in candidates], size)
        scores = []
        for candidate, (rows, columns) in zip(candidates, matches, strict=True):
            geometry = fit_geometry(keypoints.points[rows], candidate.keypoints.points[columns])
            scores.append(compare_appearance(query, candidate, geometry, size))
        return np.array(scores)
