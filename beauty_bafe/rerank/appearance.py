"""What two pictures laid over each other have in common."""

from __future__ import annotations

import cv2
import numpy as np

from .keypoints import THUMBNAIL, Look
from .matching import Geometry

# The more of each, the likelier the same product; 0 where no geometry is found.
#   inliers: log(1 + matches that agree on one geometry).
#   lightness, chroma: correlation of L*, and of a* and b*, of the two pictures laid over each other by it, -1 to 1.
#   colour: minus the difference of a* and b*, in tens of levels, after the shift that a light's colour makes.
APPEARANCE = ("inliers", "lightness", "chroma", "colour")
OVERLAP = 14  # pixels of a thumbnail; fewer tell nothing
WORST = 2.0  # tens of levels


def compare_looks(query: Look, candidate: Look, geometry: Geometry | None, size: int) -> list[float]:
    """APPEARANCE of two pictures. `size`: pixels of the canvas that their keypoints lie on."""
    if geometry is None:
        return [0.0] * len(APPEARANCE)
    return [float(np.log1p(geometry.inliers)), *_compare(query.thumbnail, candidate.thumbnail, geometry.matrix, size)]


def _compare(query: np.ndarray, candidate: np.ndarray, matrix: np.ndarray, size: int) -> tuple[float, float, float]:
    to_canvas = np.diag([size / THUMBNAIL, size / THUMBNAIL, 1])
    warp = np.linalg.inv(to_canvas) @ matrix @ to_canvas
    laid = cv2.warpPerspective(query, warp, (THUMBNAIL, THUMBNAIL), flags=cv2.INTER_LINEAR)
    both = (laid[..., 3] > 127) & (candidate[..., 3] > 127)
    if np.count_nonzero(both) < OVERLAP:
        return 0.0, 0.0, 0.0
    # A fit is seldom right to the pixel.
    own, other = (cv2.GaussianBlur(part[..., :3], (0, 0), 1.0)[both].astype(np.float64) for part in (laid, candidate))
    shift = own[:, 1:] - other[:, 1:]
    difference = float(np.abs(shift - np.median(shift, axis=0)).mean())
    return _correlate(own[:, :1], other[:, :1]), _correlate(own[:, 1:], other[:, 1:]), -min(difference / 10, WORST)


def _correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Zero-normalised cross-correlation of (N, C); 0 where one of them is flat."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    return float((first * second).sum() / max(np.sqrt((first**2).sum() * (second**2).sum()), 1e-3))
