"""Appearance features of two aligned pictures."""

from __future__ import annotations

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


def compare_appearance(query: np.ndarray, candidate: np.ndarray, geometry: Geometry | None, size: int) -> list[float]:
    """APPEARANCE of two pictures, given as thumbnails (see LocalFeatures).

    `geometry`: between the canvases of their keypoints, `size` pixels a side.
    """
    if geometry is None:
        return [0.0] * len(APPEARANCE)
    return [float(np.log1p(geometry.inliers)), *_compare(query, candidate, geometry.matrix, size)]


def _compare(query: np.ndarray, candidate: np.ndarray, matrix: np.ndarray, size: int) -> tuple[float, float, float]:
    to_canvas = np.diag([size / THUMBNAIL, size / THUMBNAIL, 1])
    warp = np.linalg.inv(to_canvas) @ matrix @ to_canvas
    warped = cv2.warpPerspective(query, warp, (THUMBNAIL, THUMBNAIL), flags=cv2.INTER_LINEAR)
    both = (warped[..., 3] > 127) & (candidate[..., 3] > 127)
    if np.count_nonzero(both) < MIN_OVERLAP:
        return 0.0, 0.0, 0.0
    # Blurred, as the alignment is seldom accurate to the pixel.
    own, other = (cv2.GaussianBlur(part[..., :3], (0, 0), 1.0)[both].astype(np.float64) for part in (warped, candidate))
    shift = own[:, 1:] - other[:, 1:]
    difference = float(np.abs(shift - np.median(shift, axis=0)).mean())
    lightness, chroma = _correlate(own[:, :1], other[:, :1]), _correlate(own[:, 1:], other[:, 1:])
    return lightness, chroma, -min(difference / 10, MAX_DIFFERENCE)


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Zero-normalised cross-correlation of (N, C); 0 if one of them is constant."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), 1e-3))
