"""Components of drawn products: solids of revolution, discs, caps, labels with lettering.

All arithmetic uses integers, polynomials and OpenCV's fixed-point routines, so that products are bit-identical on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

CANVAS = 448  # products are drawn on a square canvas of this side and shrunk when used
CENTRE = CANVAS // 2

Color = tuple[int, int, int]
Profile = Sequence[tuple[float, float]]  # (height on the canvas in pixels from the top, half-width), top to bottom

METALS: list[Color] = [(212, 175, 90), (200, 200, 206), (190, 120, 100), (35, 33, 36), (245, 245, 243)]


class Style(NamedTuple):
    """The properties shared by a product line (shape, lettering, fittings) and those of its variants (colours)."""

    shape: np.random.Generator
    body: Color
    label: Color
    ink: Color
    fitting: Color
    brand: str
    word: str


def turned(canvas: np.ndarray, profile: Profile, color: Color, gloss: float = 0.5, centre: float = CENTRE) -> None:
    """Draw a solid of revolution: darker at the sides, with a highlight left of the middle; `profile` gives its width."""
    heights, widths = np.array(profile, np.float64).T
    top, bottom = max(0, int(heights[0])), min(CANVAS, int(heights[-1]) + 1)
    half = np.interp(np.arange(top, bottom), heights, widths)[:, None]
    reach = int(widths.max()) + 1
    left, right = max(0, int(centre) - reach), min(CANVAS, int(centre) + reach + 1)
    across = (np.arange(left, right) - centre)[None, :] / np.maximum(half, 1e-6)
    inside = np.abs(across) <= 1
    canvas[top:bottom, left:right][inside] = _shade(across[inside], color, gloss)


def _shade(across: np.ndarray, color: Color, gloss: float) -> np.ndarray:
    """RGBA of a cylinder's surface at -1..1 across it."""
    t = np.clip(across, -1, 1)
    diffuse = 1.02 - 0.18 * t - 0.42 * t * t * t * t
    streak = np.clip(1 - np.square((t + 0.48) / 0.2), 0, 1) ** 2 + 0.4 * np.clip(1 - np.square((t - 0.7) / 0.1), 0, 1)
    rgb = np.array(color) * diffuse[..., None]
    rgb = rgb + (255 - rgb) * (gloss * streak)[..., None]
    shaded = np.full((*across.shape, 4), 255, np.uint8)
    shaded[..., :3] = np.clip(rgb, 0, 255).astype(np.uint8)
    return shaded


def label(canvas: np.ndarray, style: Style, top: float, bottom: float, half: float) -> None:
    """A label around the body between two heights: a band, frame or plain lettering, with the body's shading."""
    rows = slice(int(top), int(bottom))
    columns = slice(int(CENTRE - half), int(CENTRE + half))
    height, width = int(bottom) - int(top), columns.stop - columns.start
    if height < 12 or width < 20:
        return
    under = canvas[rows, columns, :3].astype(np.int32)
    print_ = np.zeros((height, width, 4), np.uint8)
    layout = int(style.shape.integers(4))
    ink: Color = style.ink
    if layout == 0:
        print_[:] = (*style.label, 255)
    elif layout == 1:
        cv2.rectangle(print_, (width // 12, 2), (width - width // 12 - 1, height - 3), (*style.label, 255), -1)
        cv2.rectangle(print_, (width // 12 + 4, 6), (width - width // 12 - 5, height - 7), (*style.ink, 255), 1)
    elif layout == 2:
        axes = (int(width * 0.42), int(height * 0.46))
        cv2.ellipse(print_, (width // 2, height // 2), axes, 0, 0, 360, (*style.label, 255), -1, cv2.LINE_8)
    else:
        dark = sum(style.body) < 330
        ink = (250, 246, 236) if dark else (44, 40, 46)
    _letter(print_, style.brand, ink, 0.40, 0.74)
    _letter(print_, style.word, ink, 0.64, 0.5)
    for line in range(int(style.shape.integers(0, 4))):
        y, reach = int(height * (0.74 + 0.06 * line)), int(width * style.shape.uniform(0.12, 0.3))
        cv2.line(print_, (width // 2 - reach, y), (width // 2 + reach, y), (*ink, 255), 1)
    # The body's shading, as a factor on the print.
    light = under.sum(axis=2, keepdims=True) * 256 // max(1, sum(style.body))
    printed = np.clip(print_[..., :3].astype(np.int32) * np.clip(light, 110, 290) // 256, 0, 255)
    solid = (print_[..., 3:] > 0) & (canvas[rows, columns, 3:] > 0)
    canvas[rows, columns, :3] = np.where(solid, printed, under).astype(np.uint8)


def _letter(canvas: np.ndarray, text: str, color: Color, at: float, share: float) -> None:
    """Centre `text` at the height `at` (0..1), with at most `share` of the width."""
    height, width = canvas.shape[:2]
    font = cv2.FONT_HERSHEY_DUPLEX
    (wide, tall), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(share * width / wide, 0.28 * height / tall)
    if scale < 0.25:
        return
    thickness = 2 if scale > 0.9 else 1
    origin = (int(width / 2 - wide * scale / 2), int(height * at + tall * scale / 2))
    cv2.putText(canvas, text, origin, font, scale, (*color, 255), thickness, cv2.LINE_8)


def shoulder(top: float, narrow: float, bottom: float, wide: float) -> list[tuple[float, float]]:
    """A rounded step from a narrow to a wide half-width: s = 1 - (1 - u)^2."""
    steps = np.linspace(0, 1, 9)
    return [(top + (bottom - top) * u, narrow + (wide - narrow) * (1 - (1 - u) ** 2)) for u in steps.tolist()]


def round_base(bottom: float, wide: float, radius: float) -> list[tuple[float, float]]:
    return [
        (bottom - (2 * radius - y), w)
        for y, w in ((radius, wide), (1.6 * radius, wide - 0.25 * radius), (2 * radius, wide - radius))
    ]


def ribs(canvas: np.ndarray, top: float, bottom: float, half: float, count: int) -> None:
    for x in np.linspace(CENTRE - half, CENTRE + half, count + 2)[1:-1].astype(int).tolist():
        stripe = canvas[int(top) : int(bottom), x : x + 1, :3]
        stripe[:] = (stripe * np.uint16(7) // 10).astype(np.uint8)


def cap(canvas: np.ndarray, style: Style, top: float, bottom: float, half: float) -> None:
    style_of_cap = int(style.shape.integers(3))
    profile = [(top, half * (0.8 if style_of_cap == 1 else 0.96)), (top + 5, half), (bottom, half)]
    turned(canvas, profile, style.fitting, 0.6)
    if style_of_cap == 2:
        ribs(canvas, top + 4, bottom, half, int(style.shape.integers(6, 14)))


def disc(canvas: np.ndarray, centre: tuple[int, int], wide: float, tall: float, color: Color) -> None:
    """An ellipse, lit from the upper left."""
    top, left = (max(0, int(middle - half) - 1) for middle, half in zip(centre[::-1], (tall, wide), strict=True))
    y, x = np.ogrid[top : min(CANVAS, int(centre[1] + tall) + 2), left : min(CANVAS, int(centre[0] + wide) + 2)]
    u, v = (x - centre[0]) / wide, (y - centre[1]) / tall
    inside = u * u + v * v <= 1
    light = 1.04 - 0.16 * u - 0.14 * v
    rim = u * u + v * v > 0.94
    rgb = np.array(color) * np.where(rim, light * 0.82, light)[..., None]
    part = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
    part[inside, :3] = np.clip(rgb, 0, 255).astype(np.uint8)[inside]
    part[inside, 3] = 255
