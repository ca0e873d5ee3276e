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
MOST = 8  # candidates that are compared, those with the most inliers; the time rises with their square
MIN_INLIERS = 4  # of each of the two, beyond the matches that determine the geometry; with fewer, it is often wrong
MIN_SHARED = 50  # pixels of a thumbnail where the query and both candidates show their product
MIN_AGREEING = 25  # pixels where the candidates agree, from which the colour cast is estimated; with fewer, from all pixels
DIFFERENT = 10.0  # CIELAB units by which candidates must differ at a pixel
MIN_DIFFERENCE = 300.0  # sum over pixels of the excess over DIFFERENT


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

    Compares thumbnails; each candidate is first warped onto the query by its geometry. At pixels where candidates a (row) and
    b (column) differ by more than DIFFERENT, weighted by the excess: sum(|q - b| - |q - a|) / sum(|a - b|), from -1 (like b)
    to 1 (like a), near 0 for a query that is neither. Variants of a product differ in few places, which measures of the whole
    picture hardly see. NaN unless both are among the MOST candidates with the most inliers, are aligned with the query, and
    differ.
    """
    contrast = np.full((len(candidates), len(candidates)), np.nan, np.float32)
    fits = {row: fit for row, fit in enumerate(geometries) if fit is not None and fit.inliers >= MIN_INLIERS}
    rows = sorted(fits, key=lambda row: -fits[row].inliers)[:MOST]
    if len(rows) < 2:
        return contrast
    product = query[..., 3] > 127
    own, flags = _to_lab(query)[product], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = {}
    for row in rows:
        matrix = _for_thumbnails(fits[row].matrix, size)
        lab, mask = (
            cv2.warpPerspective(part, matrix, (THUMBNAIL, THUMBNAIL), flags=flags)[product]
            for part in (_to_lab(candidates[row]), candidates[row][..., 3])
        )
        warped[row] = np.ascontiguousarray((lab - own).T), mask > 127
    for first, second in combinations(rows, 2):
        (a, shown), (b, shown_too) = warped[first], warped[second]
        both = shown & shown_too
        if np.count_nonzero(both) >= MIN_SHARED:
            found = _contrast(a, b, both)
            contrast[first, second], contrast[second, first] = found, -found
    return contrast


def _contrast(a: np.ndarray, b: np.ndarray, both: np.ndarray) -> float:
    """See `contrast_candidates`. `a`, `b`: less the query, float32 (3, N); `both`: the pixels that count, bool (N,)."""
    difference = _length(a - b)
    differing = both & (difference > DIFFERENT)
    distance = difference[differing]
    weights = distance - DIFFERENT
    if weights.sum() < MIN_DIFFERENCE:
        return np.nan
    agreeing = both & ~differing
    if np.count_nonzero(agreeing) < MIN_AGREEING:
        agreeing = both
    cast = ((a + b) @ agreeing.astype(np.float32) / (2 * np.count_nonzero(agreeing)))[:, None]
    nearer = _length(b[:, differing] - cast) - _length(a[:, differing] - cast)
    return float(weights @ nearer / (weights @ distance))


def _length(vectors: np.ndarray) -> np.ndarray:
    """float (3, N) -> (N,)."""
    length: np.ndarray = np.sqrt(np.einsum("cn,cn->n", vectors, vectors))
    return length


def _to_lab(thumbnail: np.ndarray) -> np.ndarray:
    """Blurred CIELAB, float32 (THUMBNAIL, THUMBNAIL, 3), L* from 0 to 100; blurred since no alignment is exact."""
    lab = thumbnail[..., :3].astype(np.float32) * np.array([100 / 255, 1, 1], np.float32)
    return cv2.GaussianBlur(lab, (0, 0), 0.7)


def _for_thumbnails(matrix: np.ndarray, size: int) -> np.ndarray:
    """Rescale a map between canvases of `size` pixels a side to their thumbnails."""
    to_canvas = np.diag([size / THUMBNAIL, size / THUMBNAIL, 1])
    return np.linalg.inv(to_canvas) @ matrix @ to_canvas


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Zero-normalised cross-correlation of (N, C); 0 if one of them is constant."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), 1e-3))
