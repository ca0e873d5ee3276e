"""Backgrounds that products are pasted on: a user's photographs, or procedural scenes of noise and shapes."""

from __future__ import annotations

from collections import OrderedDict

import cv2
import numpy as np

from .catalog import Catalog
from .pictures import read_picture
from .places import Place

BACKGROUND_LONGEST = 640  # photographs are kept at up to twice this on the longer side, so that crops have detail
CACHED_PHOTOS = 128  # decoded once per worker; at 864 x 540 px that is about 180 MB, at 1280 x 960 px 470 MB


class Backgrounds:
    """Samples square crops of a catalogue's photographs, or procedural scenes if there is no catalogue."""

    def __init__(self, photos: Catalog | None) -> None:
        self.photos = photos
        self._cache: OrderedDict[Place, np.ndarray] = OrderedDict()

    def __call__(self, rng: np.random.Generator, size: int, zoom: tuple[float, float] = (0.4, 1.0)) -> np.ndarray:
        """A crop of a random photograph, uint8 (size, size, 3); `zoom`: range of its side as a share of the shorter side.

        The side is at least `size`, so that a zoom of (0, 0) crops `size` pixels without scaling.
        """
        if self.photos is None:
            return procedural_background(rng, size)
        photo = self._read(self.photos.paths[int(rng.integers(len(self.photos)))])
        short = min(photo.shape[:2])
        side = min(short, max(size, round(short * rng.uniform(*zoom))))
        top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
        crop = photo[top : top + side, left : left + side]
        return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)

    def _read(self, path: Place) -> np.ndarray:
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        photo = read_picture(path, BACKGROUND_LONGEST).rgb
        share = 2 * BACKGROUND_LONGEST / max(photo.shape)
        if share < 1:
            width, height = (max(1, round(extent * share)) for extent in photo.shape[1::-1])
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        self._cache[path] = photo
        if len(self._cache) > CACHED_PHOTOS:
            self._cache.popitem(last=False)
        return photo


def procedural_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A cluttered scene: coloured noise, then stripes, tiles or a horizon, then scattered shapes; uint8 (size, size, 3)."""
    canvas = _noise(rng, size)
    pattern = rng.integers(4)
    if pattern == 0:
        canvas = _stripes(rng, canvas)
    elif pattern == 1:
        canvas = _tiles(rng, canvas)
    elif pattern == 2:
        horizon = int(size * rng.uniform(0.3, 0.7))
        canvas[horizon:] = _noise(rng, size)[horizon:]
    for _ in range(int(rng.integers(0, 14))):
        _scatter(rng, canvas)
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), size * rng.uniform(0.002, 0.015))
    return canvas


def random_color(rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour of any hue, with low saturation more likely than high; RGB 0..255."""
    hsv = np.array([[[rng.integers(180), int(255 * rng.random() ** 1.5), int(60 + 195 * rng.random())]]], np.uint8)
    red, green, blue = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Two or three colours mixed by noise of several scales; sums are of integers, so that they are equal on every machine."""
    total = np.zeros((size, size), np.int32)
    for octave in range(4):
        cells = int(rng.integers(2, 5)) << octave
        grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR).astype(np.int32) >> octave
    share = (total * 256 // (255 + 127 + 63 + 31)).clip(0, 255)[..., None]
    first, second = (np.array(random_color(rng), np.int32) for _ in range(2))
    if rng.random() < 0.3:  # hard-edged patches instead of a gradient
        share = (share // 64) * 85
    return ((first * (255 - share) + second * share) // 255).astype(np.uint8)


def _stripes(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    size = canvas.shape[0]
    color, width = random_color(rng), int(size * rng.uniform(0.01, 0.06)) + 1
    direction = rng.integers(-size, size, 2)
    layer = canvas.copy()
    gap = width * int(rng.integers(2, 5))
    for offset in range(-2 * size, 3 * size, gap):
        start = (offset, -size)
        end = (offset + int(direction[0]), 2 * size)
        cv2.line(layer, start, end, color, width, cv2.LINE_AA)
    return cv2.addWeighted(canvas, 0.5, layer, 0.5, 0)


def _tiles(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    size = canvas.shape[0]
    side = int(size * rng.uniform(0.08, 0.3))
    color, joint = random_color(rng), max(1, side // int(rng.integers(8, 30)))
    for position in range(int(rng.integers(side)), size, side):
        canvas[:, position : position + joint] = color
        canvas[position : position + joint] = color
    return canvas


def _scatter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    size = canvas.shape[0]
    color = random_color(rng)
    centre = rng.integers(0, size, 2)
    extent = size * rng.uniform(0.03, 0.25)
    kind = rng.integers(3)
    if kind == 0:
        axes = (int(extent), int(extent * rng.uniform(0.2, 1)))
        cv2.ellipse(canvas, centre.tolist(), axes, float(rng.integers(180)), 0, 360, color, -1, cv2.LINE_AA)
    elif kind == 1:
        corners = centre + rng.integers(-int(extent) - 1, int(extent) + 2, (int(rng.integers(3, 6)), 2))
        cv2.fillPoly(canvas, [corners.astype(np.int32)], color, cv2.LINE_AA)
    else:
        end = centre + rng.integers(-size // 2, size // 2, 2)
        cv2.line(canvas, centre.tolist(), end.tolist(), color, max(1, int(extent * 0.15)), cv2.LINE_AA)
