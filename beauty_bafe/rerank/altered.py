"""Altered copies of a catalogue photo: products that look alike, as other flavours of one brand do."""

from __future__ import annotations

import cv2
import numpy as np

MIN_PRODUCT = 50  # pixels; smaller products are not altered
RECOLOUR = 0.35  # share of copies in which one colour is replaced by another
OTHER_PRODUCT = 0.7  # share of the others in which the regions show parts of another product instead of another colour
VISIBLE, MIN_VISIBLE = 25, 0.03  # change of L*, a*, b* in levels, summed, and the share of the product where it is reached


def alter(picture: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A copy of a product with another colour, or with one or two regions from `other`, another product, or in another colour.

    uint8 (S, S, 4) each, RGB and mask; the mask stays as it is. None if the product is small, or the change hardly visible.
    The idea is that of CutPaste (Li et al., CVPR 2021), which pastes parts of pictures to learn what is anomalous.
    """
    inside = picture[..., 3] > 127
    rows, columns = np.nonzero(inside)
    if len(rows) < MIN_PRODUCT:
        return None
    lab = cv2.cvtColor(picture[..., :3], cv2.COLOR_RGB2LAB).astype(np.float32)
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    recolour = rng.random() < RECOLOUR
    if recolour:
        place = rng.integers(len(rows))
        distance = np.linalg.norm((lab - lab[rows[place], columns[place]]) * [0.5, 1, 1], axis=-1)
        region = np.clip(1.5 - distance / rng.uniform(12, 30), 0, 1).astype(np.float32)
    else:
        region = _draw_regions(picture.shape[0], box, rng)
    region = (cv2.GaussianBlur(region, (0, 0), 0.8) * inside)[..., None]
    if not recolour and rng.random() < OTHER_PRODUCT:
        replacement = _stretch(other, box, picture.shape[0])
    else:
        replacement = _recolour(lab, rng)
    if replacement is None:
        return None
    rgb = (picture[..., :3] * (1 - region) + replacement * region).astype(np.uint8)
    change = np.abs(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(np.float32) - lab).sum(axis=-1)
    if (change[inside] > VISIBLE).mean() < MIN_VISIBLE:
        return None
    return np.dstack([rgb, picture[..., 3]])


def _draw_regions(size: int, box: tuple[slice, slice], rng: np.random.Generator) -> np.ndarray:
    """One or two rectangles, bands or ellipses around places in a bounding box: float32 (size, size), 0 or 1."""
    region = np.zeros((size, size), np.float32)
    height, width = (part.stop - part.start for part in box)
    for _ in range(rng.integers(1, 3)):
        half_width, half_height = rng.uniform(0.1, 0.4) * width, rng.uniform(0.06, 0.25) * height
        if rng.random() < 0.3:
            half_width = width
        x, y = rng.uniform(box[1].start, box[1].stop), rng.uniform(box[0].start, box[0].stop)
        if rng.random() < 0.5:
            corners = (int(x - half_width), int(y - half_height)), (int(x + half_width), int(y + half_height))
            cv2.rectangle(region, *corners, 1.0, -1)
        else:
            axes = max(2, int(half_width)), max(2, int(half_height))
            cv2.ellipse(region, (int(x), int(y)), axes, float(rng.integers(180)), 0, 360, 1.0, -1)
    return region


def _recolour(lab: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shift = rng.normal(size=2)
    shift *= rng.uniform(25, 70) / np.linalg.norm(shift)
    moved = lab + np.array([rng.normal() * 15, *shift], np.float32)
    return cv2.cvtColor(np.clip(moved, 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)


def _stretch(other: np.ndarray, box: tuple[slice, slice], size: int) -> np.ndarray | None:
    """Another product, stretched to a bounding box; None if it is too small."""
    rows, columns = np.nonzero(other[..., 3] > 127)
    if len(rows) < MIN_PRODUCT:
        return None
    height, width = (part.stop - part.start for part in box)
    cut = other[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, :3]
    canvas = np.zeros((size, size, 3), np.uint8)
    canvas[box] = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA)
    return canvas
