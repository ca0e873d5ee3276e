"""A shop's shelf as a background: boards, price tags, and rows of other products, several of each."""

from __future__ import annotations

import cv2
import numpy as np

from ..backgrounds import random_color
from .base import Sample, Surroundings, paste

KINDS = 4  # maximum number of different products on a shelf; each requires loading its photo


def draw_shelf(size: int, surroundings: Surroundings, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB (size, size, 3): one to four boards with rows of products of the catalogue, slightly from the side."""
    rows = int(rng.integers(1, 5))
    wall = np.array(random_color(rng), np.float32) * rng.uniform(0.2, 0.9)
    canvas: np.ndarray = np.full((size, size, 3), wall, np.uint8)
    board, rail = (np.array(random_color(rng), np.uint8).tolist() for _ in range(2))
    kinds = [upright for _ in range(int(rng.integers(1, KINDS + 1))) if (upright := _trim(surroundings.product(rng)))]
    pitch = size / rows
    thick = max(2, int(pitch * rng.uniform(0.03, 0.1)))
    start = -pitch * rng.uniform(0, 0.6)  # the frame cuts a row
    for row in range(rows + 1):
        top, floor = int(start + row * pitch), int(start + (row + 1) * pitch) - thick
        canvas = _fill_row(canvas, kinds, top, floor, rng)
        _darken_below(canvas, max(top, 0), int(pitch * 0.4))
        cv2.rectangle(canvas, (0, floor), (size, floor + thick), board, -1)
        if rng.random() < 0.7:
            _tags(canvas, floor, thick, rail, rng)
    tilt = rng.uniform(-0.12, 0.12, (4, 2)) * size
    corners = np.array([[0, 0], [size, 0], [size, size], [0, size]], np.float32)
    warp = cv2.getPerspectiveTransform(corners, (corners + tilt).astype(np.float32))
    canvas = cv2.warpPerspective(canvas, warp, (size, size), borderMode=cv2.BORDER_REFLECT)
    if rng.random() < 0.5:  # the camera is focused on the product in front
        canvas = cv2.GaussianBlur(canvas, (0, 0), size * rng.uniform(0.003, 0.015))
    return cv2.convertScaleAbs(canvas, alpha=rng.uniform(0.6, 1.4))


def _trim(product: Sample) -> Sample | None:
    left, top, width, height = cv2.boundingRect(product.mask)
    window = (slice(top, top + height), slice(left, left + width))
    return Sample(product.photo[window], product.mask[window]) if min(width, height) > 2 else None


def _fill_row(canvas: np.ndarray, kinds: list[Sample], top: int, floor: int, rng: np.random.Generator) -> np.ndarray:
    """Products side by side from left to right, two to six of one kind, then of the next; sometimes a gap."""
    size, room = canvas.shape[0], floor - top
    if not kinds or room < 8 or floor <= 0:
        return canvas
    at = -int(room * rng.random())
    while at < size:
        kind = kinds[int(rng.integers(len(kinds)))]
        height, width = kind.mask.shape
        tall = room * rng.uniform(0.6, 0.98)
        scale = min(tall / height, 1.5 * room / width)
        side = (max(2, int(width * scale)), max(2, int(height * scale)))
        small = Sample(*(cv2.resize(part, side, interpolation=cv2.INTER_AREA) for part in kind))
        gap = int(side[0] * rng.uniform(0.0, 0.12)) + 1
        for _ in range(int(rng.integers(2, 7))):
            canvas = _place(canvas, small, at, floor - side[1] - int(rng.integers(0, 2)))
            at += side[0] + gap
            if at >= size:
                break
        if rng.random() < 0.15:
            at += side[0]
    return canvas


def _place(canvas: np.ndarray, product: Sample, left: int, top: int) -> np.ndarray:
    """Paste with the corner at (left, top), in place; parts beyond the canvas are cropped."""
    size = canvas.shape[0]
    height, width = product.mask.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
    if x0 < x1 and y0 < y1:
        part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        canvas[y0:y1, x0:x1] = paste(canvas[y0:y1, x0:x1], Sample(product.photo[part], product.mask[part]))
    return canvas


def _darken_below(canvas: np.ndarray, top: int, depth: int) -> None:
    """The shadow of the board above, in place."""
    part = canvas[top : top + depth]
    if len(part):
        fade = np.linspace(0.35, 1, len(part), dtype=np.float32)[:, None, None]
        part[:] = (part * fade).astype(np.uint8)


def _tags(canvas: np.ndarray, floor: int, thick: int, rail: list[int], rng: np.random.Generator) -> None:
    """Price tags on a rail along the board's front, with bars as digits, in place."""
    size = canvas.shape[0]
    height = max(3, int(thick * rng.uniform(1.0, 2.2)))
    cv2.rectangle(canvas, (0, floor), (size, floor + height), rail, -1)
    colour = [(250, 250, 245), (250, 220, 60), (225, 50, 40)][int(rng.integers(3))]
    step = max(6, int(size * rng.uniform(0.1, 0.3)))
    for left in range(int(rng.integers(step)) - step, size, step):
        wide = int(step * rng.uniform(0.4, 0.8))
        cv2.rectangle(canvas, (left, floor), (left + wide, floor + height), colour, -1)
        for line in range(1, 3):
            y = floor + line * height // 3
            cv2.line(canvas, (left + wide // 8, y), (left + wide * 5 // 8, y), (40, 40, 40), max(1, height // 8))
