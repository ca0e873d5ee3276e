"""Keypoint matching between two pictures, and robust estimation of their geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from .keypoints import Keypoints, normalized_descriptors

INLIER_THRESHOLD = 4.0  # largest reprojection error of an inlier, pixels
Matches = tuple[np.ndarray, np.ndarray]  # int (M,) each: rows of the query's keypoints and of the candidate's


class Matcher(Protocol):
    """Matches one query with its candidates. `size`: side in pixels of the square canvas of all keypoints."""

    def __call__(self, query: Keypoints, candidates: Sequence[Keypoints], size: int) -> list[Matches]: ...


@dataclass(frozen=True)
class NearestNeighbours:
    """Mutual nearest neighbours that pass Lowe's ratio test in both directions; `ratio` 1 disables the test."""

    ratio: float

    def __call__(self, query: Keypoints, candidates: Sequence[Keypoints], size: int) -> list[Matches]:
        own = normalized_descriptors(query)
        return [mutual_nearest_neighbours(own, normalized_descriptors(candidate), self.ratio) for candidate in candidates]


def count_matches(query: Keypoints, candidate: Keypoints, ratio: float) -> tuple[int, float]:
    """Number of query keypoints that pass Lowe's ratio test (FLANN), and their mean distance; (0, 0.0) without matches."""
    if not len(query.points) or len(candidate.points) < 2:
        return 0, 0.0
    # FLANN's exact index: for a few hundred keypoints four times as fast as its trees, and deterministic.
    index = cv2.flann_Index(candidate.descriptors.astype(np.float32), {"algorithm": 0})  # type: ignore[attr-defined]
    _, squares = index.knnSearch(query.descriptors.astype(np.float32), 2, params={})
    near = np.sqrt(squares[:, 0])
    passed = near < ratio * np.sqrt(squares[:, 1])
    return int(passed.sum()), float(near[passed].mean()) if passed.any() else 0.0


def mutual_nearest_neighbours(query: np.ndarray, candidate: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Row pairs of two arrays, float32 (K, D) and (L, D) of length 1: nearest to each other, ratio test passed both ways."""
    if len(query) < 2 or len(candidate) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    distance = np.sqrt(np.maximum(2 - 2 * query @ candidate.T, 0))
    rows = np.arange(len(query))
    nearest = distance.argmin(axis=1)
    forward = distance[rows, nearest] < ratio * np.partition(distance, 1, axis=1)[:, 1]
    rows, nearest = rows[forward], nearest[forward]
    columns = distance[:, nearest]  # only these candidates are tested in the other direction
    backward = (columns.argmin(axis=0) == rows) & (distance[rows, nearest] < ratio * np.partition(columns, 1, axis=0)[1])
    return rows[backward], nearest[backward]


class Geometry(NamedTuple):
    """`inliers`: matches that agree on it, less those that any model fits. `matrix`: float64 (3, 3), query to candidate."""

    inliers: int
    matrix: np.ndarray


def fit_geometry(source: np.ndarray, target: np.ndarray) -> Geometry | None:
    """The homography or affine map with the most inliers beyond the 4 or 3 matches that determine it.

    `source`, `target`: the matched points, float32 (M, 2). MAGSAC++ (Barath et al., CVPR 2020). None if there are no further
    inliers; maps that mirror, or scale by more than 20 or less than 1/20, are rejected.
    """
    fits = []
    if len(source) > 4:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.findHomography(source, target, cv2.USAC_MAGSAC, INLIER_THRESHOLD, maxIters=500, confidence=0.99)
        if matrix is not None and _plausible(matrix[:2, :2]):
            fits.append(Geometry(int(inliers.sum()) - 4, matrix))
    if len(source) > 3:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.estimateAffine2D(
            source, target, method=cv2.USAC_MAGSAC, ransacReprojThreshold=INLIER_THRESHOLD, maxIters=500, confidence=0.99
        )
        if matrix is not None and _plausible(matrix[:, :2]):
            fits.append(Geometry(int(inliers.sum()) - 3, np.vstack([matrix, [0, 0, 1]])))
    best = max(fits, key=lambda fit: fit.inliers, default=None)
    return best if best is not None and best.inliers > 0 else None


def fit_geometries(query: Keypoints, candidates: Sequence[Keypoints], matcher: Matcher, size: int) -> list[Geometry | None]:
    """Match a query with its candidates, and fit the geometry of each pair. `size`: see Matcher."""
    matches = matcher(query, candidates, size)
    return [
        fit_geometry(query.points[rows], candidate.points[columns])
        for candidate, (rows, columns) in zip(candidates, matches, strict=True)
    ]


def _plausible(linear: np.ndarray) -> bool:
    return bool(1 / 400 < np.linalg.det(linear) < 400)
