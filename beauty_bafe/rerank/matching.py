"""Matches between the keypoints of two pictures, and the geometry on which most of them agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from .keypoints import Keypoints, compare_by

REACH = 4.0  # pixels by which an inlier may miss where the homography or affine map leads it
Matches = tuple[np.ndarray, np.ndarray]  # int (M,) each: rows of the query's keypoints and of the candidate's


class Matcher(Protocol):
    """Matches one query with its candidates. `size`: pixels of the square canvas that all keypoints lie on."""

    def __call__(self, query: Keypoints, candidates: Sequence[Keypoints], size: int) -> list[Matches]: ...


@dataclass(frozen=True)
class NearestNeighbours:
    """Keypoints whose descriptors are each other's nearest, both nearer than `ratio` times the next; 1 sets no condition."""

    ratio: float

    def __call__(self, query: Keypoints, candidates: Sequence[Keypoints], size: int) -> list[Matches]:
        own = compare_by(query)
        return [match_mutually(own, compare_by(candidate), self.ratio) for candidate in candidates]


def count_matches(query: Keypoints, candidate: Keypoints, ratio: float) -> tuple[int, float]:
    """Query keypoints whose nearest descriptor is nearer than `ratio` times the next (FLANN, Lowe's test); their mean distance.

    (0, 0.0) where nothing matches.
    """
    if not len(query.points) or len(candidate.points) < 2:
        return 0, 0.0
    # FLANN's exact index: at a few hundred keypoints four times as fast as its trees, and the same every time.
    index = cv2.flann_Index(candidate.descriptors.astype(np.float32), {"algorithm": 0})  # type: ignore[attr-defined]
    _, squares = index.knnSearch(query.descriptors.astype(np.float32), 2, params={})
    near = np.sqrt(squares[:, 0])
    passed = near < ratio * np.sqrt(squares[:, 1])
    return int(passed.sum()), float(near[passed].mean()) if passed.any() else 0.0


def match_mutually(query: np.ndarray, candidate: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two arrays, float32 (K, D), (L, D) of length 1, that are each other's nearest and pass the ratio both ways."""
    if len(query) < 2 or len(candidate) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    distance = np.sqrt(np.maximum(2 - 2 * query @ candidate.T, 0))
    rows = np.arange(len(query))
    nearest = distance.argmin(axis=1)
    forward = distance[rows, nearest] < ratio * np.partition(distance, 1, axis=1)[:, 1]
    rows, nearest = rows[forward], nearest[forward]
    columns = distance[:, nearest]  # only these candidates are looked at from the other side
    backward = (columns.argmin(axis=0) == rows) & (distance[rows, nearest] < ratio * np.partition(columns, 1, axis=0)[1])
    return rows[backward], nearest[backward]


class Geometry(NamedTuple):
    """`inliers`: matches that agree on it, beyond those that always do. `matrix`: float64 (3, 3), query to candidate."""

    inliers: int
    matrix: np.ndarray


def fit_geometry(source: np.ndarray, target: np.ndarray) -> Geometry | None:
    """The homography or affine map on which most matches, float32 (M, 2) each, agree beyond the 4 or 3 that it needs.

    MAGSAC++ (Barath et al., CVPR 2020). None where no match is left over; mirroring maps and those that shrink or enlarge
    over 20 times do not count.
    """
    fits = []
    if len(source) > 4:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.findHomography(source, target, cv2.USAC_MAGSAC, REACH, maxIters=500, confidence=0.99)
        if matrix is not None and _plausible(matrix[:2, :2]):
            fits.append(Geometry(int(inliers.sum()) - 4, matrix))
    if len(source) > 3:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.estimateAffine2D(
            source, target, method=cv2.USAC_MAGSAC, ransacReprojThreshold=REACH, maxIters=500, confidence=0.99
        )
        if matrix is not None and _plausible(matrix[:, :2]):
            fits.append(Geometry(int(inliers.sum()) - 3, np.vstack([matrix, [0, 0, 1]])))
    best = max(fits, key=lambda fit: fit.inliers, default=None)
    return best if best is not None and best.inliers > 0 else None


def _plausible(linear: np.ndarray) -> bool:
    return bool(1 / 400 < np.linalg.det(linear) < 400)
