"""Appearance features of two aligned pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import cv2
import numpy as np

from .keypoints import THUMBNAIL
from .matching import Geometry

# Higher values make the same product more likely; all are 0 if no geometry is found.
#   inliers: log(1 + matches that agree on one geometry).
#   lightness, chroma: correlation of L*, and of a* and b*, of the two pictures aligned by it, -1 to 1.
#   colour: minus the mean difference of a* and b*, in tens of levels, after removing the shift due to the light's colour.
APPEARANCE = ("inliers", "lightness", "chroma", "colour")
MIN_OVERLAP = 14  # pixels of a thumbnail that must overlap for a comparison
MAX_DIFFERENCE = 2.0  # tens of levels
# For the contrast of two candidates.
MIN_INLIERS = 4  # of both; with fewer, the geometry is often wrong
MIN_SHARED = 50  # pixels of a thumbnail where the query and both candidates show their product
MIN_CALM = 25  # pixels where the candidates agree, for the shift due to the light
DIFFERENT = 10.0  # CIELAB units by which candidates must differ at a pixel
MIN_DIFFERENCE = 300.0  # total of what exceeds it


def compare_appearance(query: np.ndarray, candidate: np.ndarray, geometry: Geometry | None, size: int) -> list[float]:
    """APPEARANCE of two pictures, given as thumbnails (see LocalFeatures).

    `geometry`: between the canvases of their keypoints, `size` pixels a side.
    """
    if geometry is None:
        return [0.0] * len(APPEARANCE)
    return [float(np.log1p(geometry.inliers)), *_compare(query, candidate, geometry.matrix, size)]


def _compare(query: np.ndarray, candidate: np.ndarray, matrix: np.ndarray, size: int) -> tuple[float, float, float]:
    warped = cv2.warpPerspective(query, _for_thumbnails(matrix, size), (THUMBNAIL, THUMBNAIL), flags=cv2.INTER_LINEAR)
    both = (warped[..., 3] > 127) & (candidate[..., 3] > 127)
    if np.count_nonzero(both) < MIN_OVERLAP:
        return 0.0, 0.0, 0.0
    # Blurred, as the alignment is seldom accurate to the pixel.
    own, other = (cv2.GaussianBlur(part[..., :3], (0, 0), 1.0)[both].astype(np.float64) for part in (warped, candidate))
    shift = own[:, 1:] - other[:, 1:]
    difference = float(np.abs(shift - np.median(shift, axis=0)).mean())
    lightness, chroma = _correlate(own[:, :1], other[:, :1]), _correlate(own[:, 1:], other[:, 1:])
    return lightness, chroma, -min(difference / 10, MAX_DIFFERENCE)


def contrast_candidates(
    query: np.ndarray, candidates: Sequence[np.ndarray], geometries: Sequence[Geometry | None], size: int
) -> np.ndarray:
    """How much more the query resembles one candidate than another where these two differ, float32 (k, k).

    Thumbnails, each candidate aligned with the query by its geometry. At pixels where a (row) and b (column) differ by more
    than DIFFERENT, weighted by the excess: sum(|q - b| - |q - a|) / sum(|a - b|), from -1 (like b) to 1 (like a); near 0 for
    a query that is neither. Siblings differ in few places, which measures of the whole picture hardly see. NaN if two
    candidates are not both aligned with the query, or do not differ.
    """
    contrast = np.full((len(candidates), len(candidates)), np.nan, np.float32)
    aligned = {row: fit for row, fit in enumerate(geometries) if fit is not None and fit.inliers >= MIN_INLIERS}
    if len(aligned) < 2:
        return contrast
    own, product = _to_lab(query), query[..., 3] > 127
    warped = {}
    for row, fit in aligned.items():
        matrix, flags = _for_thumbnails(fit.matrix, size), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        lab, mask = (
            cv2.warpPerspective(part, matrix, (THUMBNAIL, THUMBNAIL), flags=flags)
            for part in (_to_lab(candidates[row]), candidates[row][..., 3])
        )
        warped[row] = lab, product & (mask > 127)
    for first, second in combinations(aligned, 2):
        (a, shown), (b, shown_too) = warped[first], warped[second]
        if np.count_nonzero(both := shown & shown_too) >= MIN_SHARED:
            found = _contrast(own[both], a[both], b[both])
            contrast[first, second], contrast[second, first] = found, -found
    return contrast


def _contrast(query: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """See `contrast_candidates`; float (N, 3) each."""
    difference = np.linalg.norm(a - b, axis=1)
    weights = np.maximum(difference - DIFFERENT, 0)
    if weights.sum() < MIN_DIFFERENCE:
        return np.nan
    calm = difference < DIFFERENT
    if np.count_nonzero(calm) < MIN_CALM:
        calm[:] = True
    seen = query + ((a + b)[calm] / 2 - query[calm]).mean(axis=0)  # without the shift due to the light
    nearer = np.linalg.norm(seen - b, axis=1) - np.linalg.norm(seen - a, axis=1)
    return float(weights @ nearer / (weights @ difference))


def _to_lab(thumbnail: np.ndarray) -> np.ndarray:
    """Blurred CIELAB, float32 (THUMBNAIL, THUMBNAIL, 3), L* from 0 to 100; blurred since no alignment is exact."""
    lab = thumbnail[..., :3].astype(np.float32) * np.array([100 / 255, 1, 1], np.float32)
    return cv2.GaussianBlur(lab, (0, 0), 0.7)


def _for_thumbnails(matrix: np.ndarray, size: int) -> np.ndarray:
    """A map between canvases of `size` pixels a side, for their thumbnails."""
    to_canvas = np.diag([size / THUMBNAIL, size / THUMBNAIL, 1])
    return np.linalg.inv(to_canvas) @ matrix @ to_canvas


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Zero-normalised cross-correlation of (N, C); 0 if one of them is constant."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), 1e-3))
