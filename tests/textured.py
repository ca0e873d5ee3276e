"""Products with many keypoints, and how another camera sees them."""

from __future__ import annotations

import cv2
import numpy as np

SIZE = 200


def textured(seed: int, blocks: int = 40) -> np.ndarray:
    """A white canvas with a product of random blocks in its middle, uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for _ in range(blocks):
        x, y = rng.integers(40, 140, 2).tolist()
        cv2.rectangle(
            canvas, (x, y), (x + int(rng.integers(6, 30)), y + int(rng.integers(6, 30))), rng.integers(0, 200, 3).tolist(), -1
        )
    return canvas


HOMOGRAPHY = np.array([[0.8, -0.25, 40], [0.3, 0.75, -5], [2e-4, -3e-4, 1]])


def warped(picture: np.ndarray) -> np.ndarray:
    return cv2.warpPerspective(picture, HOMOGRAPHY, (SIZE, SIZE), borderValue=(255, 255, 255))
