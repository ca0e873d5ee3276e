"""Rendering of hands: shaded tubes of flesh and cloth, drawn in a window of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from ..backgrounds import random_color

DRAWN_SIDE = 144  # pixels: larger hands are drawn at this size and enlarged, to limit the cost
# CIELAB of human skin from very light to very dark, about evenly spaced as on the Fitzpatrick scale.
SKIN = np.array([[80, 10, 17], [73, 13, 20], [66, 15, 23], [56, 16, 25], [44, 15, 21], [30, 11, 14]], np.float32)
STEPS, CAP = 12, 7  # points along a finger's axis and around its tip: enough for a round shape at DRAWN_SIDE
# A cubic Bezier curve at those points, as weights of its four control points.
_T = np.linspace(0, 1, STEPS)[:, None]
BEZIER = np.hstack([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3])
TANGENT = np.gradient(BEZIER, axis=0)
TURN = np.linspace(0, np.pi, CAP + 2)[1:-1, None]
# Radii from root to tip, in finger widths: thicker at the joints.
FINGER = np.interp(_T[:, 0], np.linspace(0, 1, 8), [0.56, 0.55, 0.5, 0.52, 0.49, 0.5, 0.47, 0.4])
THUMB = np.interp(_T[:, 0], np.linspace(0, 1, 9), [1.3, 1.2, 0.95, 0.74, 0.64, 0.6, 0.64, 0.6, 0.46])
INDEX = np.interp(_T[:, 0], [0, 0.2, 0.4, 1], [0.9, 0.72, 0.54, 0.42])
TIP = np.interp(_T[:, 0], [0, 0.3, 0.7, 1], [0.45, 0.52, 0.5, 0.42])
PALM = np.interp(_T[:, 0], np.linspace(0, 1, 5), [1.4, 1.75, 2.1, 2.2, 2.0])
FLESH, SLEEVE, BAND, NAIL = range(4)
SUBPIXEL = 4  # fractional bits of OpenCV's drawing coordinates


class Part(NamedTuple):
    """A tube of flesh or cloth, in finger widths; x points from the hand into the product, 0 is the product's edge.

    `spine`: (4, 2), control points of its axis from root to tip. `radii`: (STEPS,). `joined`: share of its length, from
    the root, that has no outline. `nail`: sideways shift of the nail, None without one.
    """

    spine: Sequence[tuple[float, float] | np.ndarray]
    radii: np.ndarray
    front: bool = False
    joined: float = 1.0
    nail: float | None = None
    wrinkles: bool = False
    kind: int = FLESH


class Grip(NamedTuple):
    """Pose of the hand: `edge` (x, y) in pixels, `axes` (2, 2), rows x and y of the hand, `unit` a finger's width in pixels.

    `width`: of the product along x, in finger widths.
    """

    edge: np.ndarray
    axes: np.ndarray
    unit: float
    width: float


class Drawing:
    """Parts drawn in their bounding window. `whole`, `front`: masks of all parts and of those in front, uint8 (h, w)."""

    def __init__(self, parts: list[Part], grip: Grip, size: int) -> None:
        self.parts = parts
        outlines = _outlines(parts) @ grip.axes * grip.unit + grip.edge
        low = np.clip(np.floor(outlines.min(axis=(0, 1))), 0, size - 8).astype(int)
        high = np.clip(np.ceil(outlines.max(axis=(0, 1))), low + 8, size).astype(int)
        self.window = (slice(low[1], high[1]), slice(low[0], high[0]))
        self.size = (int(high[0] - low[0]), int(high[1] - low[1]))
        self.scale = min(1.0, DRAWN_SIDE / max(self.size))
        self.drawn_size = (max(4, round(self.size[0] * self.scale)), max(4, round(self.size[1] * self.scale)))
        self.unit = grip.unit * self.scale
        self.lines = np.rint((outlines - low) * (self.scale * 2**SUBPIXEL)).astype(np.int32)
        self.drawn_front, whole = self._empty(), self._empty()
        for part, line in zip(parts, self.lines, strict=True):
            cv2.fillPoly(whole, [line], 255, cv2.LINE_AA, SUBPIXEL)
            if part.front:
                cv2.fillPoly(self.drawn_front, [line], 255, cv2.LINE_AA, SUBPIXEL)
        self.whole, self.front = self._enlarge(whole), self._enlarge(self.drawn_front)

    def shadow(self, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Opacity of the shadow that the front parts cast on the product, uint8 (h, w)."""
        dx, dy = -light * self.unit * rng.uniform(0.05, 0.25)
        moved = cv2.warpAffine(self.drawn_front, np.array([[1, 0, dx], [0, 1, dy]], np.float32), self.drawn_size)
        soft = _soften(moved, self.unit * rng.uniform(0.1, 0.3))
        return self._enlarge(cv2.convertScaleAbs(soft, alpha=rng.uniform(0.3, 0.7)))

    def paint(self, held: np.ndarray, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The hand's colours in the window, uint8 (h, w, 3); `held`: the product's mask there."""
        body, dark, kinds = self._empty(), self._empty(), self._empty()
        thin = max(1, round(0.08 * self.unit))
        for part, line in zip(self.parts, self.lines, strict=True):
            skipped = int(part.joined * STEPS)
            edge = [line[skipped : 2 * STEPS + CAP - skipped]]
            if len(edge[0]):
                cv2.polylines(dark, edge, False, 80, max(2, round(0.4 * self.unit)), cv2.LINE_AA, SUBPIXEL)
            for layer, value in ((body, 255), (dark, 0), (kinds, part.kind)):
                cv2.fillPoly(layer, [line], value, cv2.LINE_8, SUBPIXEL)
            if len(edge[0]):  # a gap in `body` makes each finger round
                cv2.polylines(body, edge, False, 0, 1, cv2.LINE_8, SUBPIXEL)
                cv2.polylines(dark, edge, False, 90, thin, cv2.LINE_AA, SUBPIXEL)
            self._add_details(part, line, dark, kinds, rng)
        # The product's shadow on the palm behind it.
        behind = _soften(cv2.resize(held, self.drawn_size, interpolation=cv2.INTER_AREA), 0.4 * self.unit)
        behind = cv2.multiply(behind, 255 - self.drawn_front, scale=0.45 / 255)
        dark = cv2.max(_soften(dark, 0.06 * self.unit), behind)
        depth = cv2.distanceTransform(body, cv2.DIST_L2, 3)
        height, arch = (_dome(depth, radius * self.unit) for radius in (0.55, 1.7))
        height = _soften(height + arch, 0.13 * self.unit)
        lit = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=-light[0]) + cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=-light[1])
        uneven = rng.normal(0, (9, 4), (5, 5, 2)) + np.linspace(rng.normal(0, 14), 0, 5)[:, None, None] * (1, 0)
        noise, flush = cv2.split(cv2.resize(uneven.astype(np.float32), self.drawn_size, interpolation=cv2.INTER_CUBIC))
        lit = lit / (8 + np.abs(lit))  # 8: the sum of Sobel's weights; keeps steep sides from becoming black
        tone = (118 + noise) - lit * rng.uniform(45, 95) + arch * (22 / self.unit) - dark * np.float32(0.7)
        tone = cv2.merge([cv2.convertScaleAbs(np.maximum(level, 25)) for level in (tone + flush, tone, tone - flush)])
        gain = rng.uniform(0.75, 1.15) * (1 + rng.uniform(-0.06, 0.13) * np.array([1, 0, -1]))
        skin = _skin(rng)
        nail = skin * 0.75 + np.array([250, 205, 195]) * 0.25 if rng.random() < 0.85 else np.array(random_color(rng))
        color = cv2.LUT(tone, _ramp(skin * gain))
        for kind, base in ((SLEEVE, np.array(random_color(rng))), (BAND, np.array(random_color(rng))), (NAIL, nail * gain)):
            chosen = (kinds == kind).astype(np.uint8) * 255
            if chosen.any():
                color = blend(color, cv2.LUT(tone, _ramp(base)), cv2.blur(chosen, (3, 3)))
        return self._enlarge(color)

    def _add_details(self, part: Part, line: np.ndarray, dark: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> None:
        """Wrinkles over the joints, folds of a sleeve, a ring, the nail."""
        left, right = line[:STEPS].astype(float), line[2 * STEPS + CAP - 1 : STEPS + CAP - 1 : -1].astype(float)
        marks = [0.36, 0.62, 0.66, 0.7] if part.wrinkles else rng.uniform(0, 0.3, 5) if part.kind == SLEEVE else []
        for mark in marks:
            at = mark * (STEPS - 1)
            ends = [side[int(at)] + (side[int(at) + 1] - side[int(at)]) * (at % 1) for side in (left, right)]
            inset = rng.uniform(0.1, 0.3, 2)
            stroke = [ends[0] + (ends[1] - ends[0]) * inset[0], ends[1] + (ends[0] - ends[1]) * inset[1]]
            cv2.polylines(dark, [np.rint(stroke).astype(np.int32)], False, int(rng.integers(30, 80)), 1, cv2.LINE_AA, SUBPIXEL)
        if part.radii is FINGER and rng.random() < 0.05:  # a ring
            ring = np.rint([(side[4] + side[5]) / 2 for side in (left, right)]).astype(np.int32)
            cv2.polylines(kinds, [ring], False, BAND, max(1, round(0.25 * self.unit)), cv2.LINE_8, SUBPIXEL)
        if part.nail is None:
            return
        middle, before = (left[-1] + right[-1]) / 2, (left[-3] + right[-3]) / 2
        forward = (middle - before) / (np.hypot(*(middle - before)) + 1e-6)
        finger = self.unit * 2**SUBPIXEL
        centre = middle - forward * 0.08 * finger + np.array([-forward[1], forward[0]]) * part.nail * finger
        box = (np.rint(centre).astype(int).tolist(), (round(0.36 * finger), round(0.3 * finger)))
        angle = float(np.rad2deg(np.arctan2(forward[1], forward[0])))
        cv2.ellipse(kinds, *box, angle, 0, 360, NAIL, -1, cv2.LINE_8, SUBPIXEL)
        cv2.ellipse(dark, *box, angle, 90, 270, 50, 1, cv2.LINE_AA, SUBPIXEL)

    def _empty(self) -> np.ndarray:
        return np.zeros(self.drawn_size[::-1], np.uint8)

    def _enlarge(self, layer: np.ndarray) -> np.ndarray:
        return layer if self.scale == 1 else cv2.resize(layer, self.size, interpolation=cv2.INTER_LINEAR)


def _outlines(parts: list[Part]) -> np.ndarray:
    """The tubes' outlines in finger widths: left side, tip, right side, root; (N, 2 * STEPS + 2 * CAP, 2)."""
    spines = np.array([part.spine for part in parts])
    axis, along = BEZIER @ spines, TANGENT @ spines
    along /= np.sqrt((along**2).sum(axis=2, keepdims=True)) + 1e-6
    along *= np.stack([part.radii for part in parts])[..., None]
    side = along[..., ::-1] * (-1, 1)
    tip = axis[:, -1:] + side[:, -1:] * np.cos(TURN) + along[:, -1:] * np.sin(TURN)
    blunt = np.array([part.kind == FLESH for part in parts])[:, None, None]  # a cuff is cut straight
    root = axis[:, :1] - side[:, :1] * np.cos(TURN) - along[:, :1] * np.sin(TURN) * blunt
    return np.concatenate([axis + side, tip, (axis - side)[:, ::-1], root], axis=1)


def _soften(layer: np.ndarray, sigma: float) -> np.ndarray:
    """Approximate Gaussian blur by two box filters, whose cost does not grow with `sigma`."""
    side = max(3, round(np.sqrt(6 * sigma**2 + 1)) | 1)
    return cv2.blur(cv2.blur(layer, (side, side)), (side, side))


def _dome(depth: np.ndarray, radius: float) -> np.ndarray:
    """Height of a round surface with this radius, `depth` pixels inside its outline."""
    rest = 1 - np.minimum(depth * np.float32(1 / radius), 1)
    return cv2.sqrt(1 - rest * rest) * np.float32(radius)


def _skin(rng: np.random.Generator) -> np.ndarray:
    """A random skin colour in white light, RGB 0 to 255."""
    place = rng.uniform(0, len(SKIN) - 1)
    lab = np.array([np.interp(place, np.arange(len(SKIN)), column) for column in SKIN.T]) + rng.uniform(-1, 1, 3) * (3, 3, 4)
    return cv2.cvtColor(lab.astype(np.float32)[None, None], cv2.COLOR_LAB2RGB)[0, 0] * 255


def _ramp(base: np.ndarray) -> np.ndarray:
    """Lookup table from a tone of 0 to 255 to a colour, uint8 (256, 1, 3): `base` in the middle; shadows keep red longest."""
    tone = np.linspace(0, 2, 256)[:, None]
    low = base * np.minimum(tone, 1) ** np.array([0.8, 1.05, 1.15])
    high = (255 - base) * 0.55 * np.clip(tone - 1, 0, 1) ** 1.5
    return np.clip(low + high, 0, 255).astype(np.uint8).reshape(256, 1, 3)


def blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha.astype(np.float32)
    return cv2.blendLinear(np.ascontiguousarray(below), above, 255 - weight, weight)
