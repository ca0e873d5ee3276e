"""Alignment of two pictures by their appearance, where keypoints give none: every rotation, at a few scales."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SMALL = 32  # side in pixels of the pictures that are compared
TURNS = range(0, 360, 15)  # degrees
SCALES = (0.8, 1.0, 1.25)
SHAPE_WEIGHT = 0.7  # of the mask, relative to the colours inside it


def align_by_appearance(query: np.ndarray, candidates: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rotation about the centre, with a scale, after which the query is most similar to each candidate.

    uint8 (S, S, 4) each, RGB and mask of the product. Returns float64 (3, 3) each, from the query's pixels to the candidate's.
    The similarity is the correlation of L*, a*, b* inside the masks, and of the masks.
    """
    centre = ((SMALL - 1) / 2, (SMALL - 1) / 2)
    maps = [cv2.getRotationMatrix2D(centre, float(turn), scale) for turn in TURNS for scale in SCALES]
    small = _shrink(query)
    turned = np.stack([cv2.warpAffine(small, matrix, (SMALL, SMALL), flags=cv2.INTER_LINEAR) for matrix in maps])
    best = (_standardize(turned) @ _standardize(np.stack([_shrink(part) for part in candidates])).T).argmax(axis=0)
    return [rescale(np.vstack([maps[row], [0, 0, 1]]), len(query) / SMALL) for row in best]


def rescale(matrix: np.ndarray, zoom: float) -> np.ndarray:
    """A map between pictures, float64 (3, 3), for the same pictures at `zoom` times the size.

    Pixel coordinates are those of their centres, as in OpenCV.
    """
    larger = np.array([[zoom, 0, (zoom - 1) / 2], [0, zoom, (zoom - 1) / 2], [0, 0, 1]])
    return larger @ matrix @ np.linalg.inv(larger)


def _shrink(picture: np.ndarray) -> np.ndarray:
    small = cv2.resize(picture, (SMALL, SMALL), interpolation=cv2.INTER_AREA)
    return np.dstack([cv2.cvtColor(small[..., :3], cv2.COLOR_RGB2LAB), small[..., 3]])


def _standardize(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 4) -> float32 (N, D) of length 1: colours less their mean inside the mask, and the mask less its mean."""
    colours, masks = pictures[..., :3].astype(np.float32), pictures[..., 3:].astype(np.float32) / 255
    mean = (colours * masks).sum(axis=(1, 2), keepdims=True) / np.maximum(masks.sum(axis=(1, 2), keepdims=True), 1e-3)
    inside, shape = (colours - mean) * masks, masks - masks.mean(axis=(1, 2), keepdims=True)
    rows = np.concatenate([_unit(inside), SHAPE_WEIGHT * _unit(shape)], axis=1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _unit(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(len(values), -1)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-3)
