"""Products with many keypoints, and how another camera sees them; and a plain one with its mask."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from beauty_bafe.rerank.dense import Pair
from beauty_bafe.rerank.pair_network import SIDE

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


def scene(size: int, top: int, left: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey picture with a product of four differently coloured quarters, and its mask."""
    picture, mask = torch.full((1, 3, size, size), 90, dtype=torch.uint8), torch.zeros(1, 1, size, size)
    quarters = torch.tensor([[10, 60], [120, 200]], dtype=torch.uint8).repeat_interleave(height // 2, 0)
    picture[..., top : top + height, left : left + width] = quarters.repeat_interleave(width // 2, 1)
    mask[..., top : top + height, left : left + width] = 1
    return picture, mask


def product(seed: int) -> np.ndarray:
    """A product of random blocks and its mask, uint8 (SIDE, SIDE, 4)."""
    picture = textured(seed)
    mask = (picture.min(axis=2) < 255).astype(np.uint8) * 255
    return cv2.resize(np.dstack([picture, mask]), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def pair(query: np.ndarray, candidate: np.ndarray, inliers: float = 0.0) -> Pair:
    return Pair(query, candidate, np.eye(3), inliers)
