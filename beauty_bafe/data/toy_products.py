"""Beauty products drawn by code: bottles, tubes, jars, pumps, lipsticks, compacts, nail polish, brushes.

Almost all cosmetics are solids of revolution: a stack of parts, each a profile of half-widths over height.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from .toy_shapes import CANVAS, CENTRE, METALS, Color, Style, cap, disc, label, ribs, round_base, shoulder, turned

BRANDS = [
    "AURA",
    "Belle",
    "CORAL",
    "Dune",
    "ELIA",
    "Fleur",
    "GLOW",
    "Haze",
    "IRIS",
    "Jolie",
    "KIRA",
    "Lumi",
    "MOSS",
    "Nova",
    "ONYX",
]
WORDS = [
    "cream",
    "serum",
    "tonic",
    "balm",
    "mist",
    "rose",
    "oil",
    "milk",
    "gel",
    "matte",
    "night",
    "day",
    "pure",
    "silk",
    "SPF 30",
]


def draw_product(seed: int, family: int, variant: int) -> np.ndarray:
    """A product as uint8 RGBA (CANVAS, CANVAS, 4). Variants of a family differ only in their colours."""
    shape = np.random.default_rng((seed, family))
    kind = KINDS[int(shape.integers(len(KINDS)))]
    color = np.random.default_rng((seed, family, variant + 1))
    fitting = METALS[int(shape.integers(len(METALS)))]
    # Hues of variants are kept apart, so that a person can distinguish near-duplicates.
    hue = (int(shape.integers(180)) + 57 * variant + int(color.integers(-12, 13))) % 180
    body = _hsv(hue, int(color.integers(40, 230)), int(color.integers(120, 250)))
    label, ink = ((250, 249, 245), (40, 38, 42)) if shape.random() < 0.6 else ((45, 42, 48), (238, 226, 196))
    brand, word = BRANDS[int(shape.integers(len(BRANDS)))], WORDS[int(shape.integers(len(WORDS)))]
    canvas = np.zeros((CANVAS, CANVAS, 4), np.uint8)
    kind(canvas, Style(shape, body, label, ink, fitting, brand, word))
    return canvas


def _hsv(hue: int, saturation: int, value: int) -> Color:
    red, green, blue = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def _bottle(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, neck = r.uniform(62, 112), r.uniform(22, 40)
    cap_top, cap_end = 24.0, 24 + r.uniform(40, 88)
    sloped = cap_end + r.uniform(16, 60)
    profile = [(cap_end - 2, neck), *shoulder(cap_end + 6, neck, sloped, wide), *round_base(424, wide, r.uniform(4, 18))]
    turned(canvas, profile, style.body, r.uniform(0.3, 0.7))
    cap(canvas, style, cap_top, cap_end, neck + r.uniform(2, 14))
    label(canvas, style, sloped + 24, 424 - r.uniform(36, 90), wide * 0.9)


def _tube(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, foot = r.uniform(70, 105), r.uniform(38, 60)
    end = r.uniform(320, 352)
    turned(canvas, [(30, wide), (48, wide), (140, wide * 0.96), (end, foot + 6)], style.body, 0.35)
    ribs(canvas, 30, 46, wide, 22)
    turned(canvas, [(end, foot), (end + 6, foot + 4), (424, foot + 2)], style.fitting, 0.6)
    label(canvas, style, r.uniform(84, 120), r.uniform(230, 290), wide * 0.72)


def _jar(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tall = r.uniform(130, 185), r.uniform(90, 150)
    lid, top = r.uniform(46, 80), 224 - r.uniform(60, 100)
    base = top + lid + tall
    turned(
        canvas,
        [(top + lid - 4, wide * 0.9), (top + lid + 12, wide), *round_base(base, wide, r.uniform(10, 30))],
        style.body,
        0.5,
    )
    cap(canvas, style, top, top + lid, wide * r.uniform(0.9, 1.02))
    label(canvas, style, top + lid + 18, base - 16, wide * r.uniform(0.55, 0.8))


def _pump(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, neck = r.uniform(66, 110), r.uniform(24, 34)
    collar = r.uniform(120, 140)
    turned(canvas, [(44, 9), (collar, 9)], style.fitting, 0.6)
    reach = r.uniform(54, 90)
    spout = np.array([[CENTRE - 26, 28], [CENTRE + reach, 34], [CENTRE + reach, 50], [CENTRE - 26, 56]], np.int32)
    cv2.fillPoly(canvas, [spout], (*(int(c * 0.9) for c in style.fitting), 255))
    cv2.line(canvas, (CENTRE - 24, 32), (int(CENTRE + reach - 4), 37), (*(min(255, c + 60) for c in style.fitting), 255), 3)
    turned(canvas, [(26, 24), (32, 28), (60, 28)], style.fitting, 0.6)
    profile = [
        (collar + 20, neck),
        *shoulder(collar + 24, neck, collar + r.uniform(46, 80), wide),
        *round_base(424, wide, r.uniform(6, 20)),
    ]
    turned(canvas, profile, style.body, r.uniform(0.3, 0.7))
    turned(canvas, [(collar - 4, neck + 4), (collar + 26, neck + 6)], style.fitting, 0.6)
    ribs(canvas, collar, collar + 26, neck + 4, 9)
    label(canvas, style, collar + 100, 424 - r.uniform(30, 70), wide * 0.88)


def _lipstick(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tip = r.uniform(44, 66), r.uniform(30, 46)
    collar = r.uniform(190, 215)
    tip = min(tip, wide - 8)
    turned(canvas, [*shoulder(40, 4, 100, tip), (collar, tip)], style.body, 0.55)
    slant = r.uniform(30, 70)
    cut = np.array(
        [[0, 0], [CANVAS, 0], [CANVAS, 40 + slant * 1.6], [CENTRE + tip, 40 + slant * 1.3], [CENTRE - tip, 30], [0, 30]],
        np.int32,
    )
    cv2.fillPoly(canvas, [cut], (0, 0, 0, 0))
    turned(canvas, [(collar, wide * 0.86), (collar + 58, wide * 0.86)], METALS[int(r.integers(3))], 0.8)
    turned(canvas, [(collar + 56, wide), (418, wide), (424, wide - 4)], style.fitting, 0.6)
    label(canvas, style._replace(body=style.fitting), collar + 100, 400, wide * 0.8)


def _compact(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    radius = r.uniform(104, 128)
    open_lid = r.random() < 0.5
    y = 300 if open_lid else 224
    if open_lid:
        lid = (CENTRE, int(y - radius * 1.25))
        disc(canvas, lid, radius * 0.98, radius * 0.9, style.fitting)
        disc(canvas, lid, radius * 0.84, radius * 0.77, (206, 218, 226))
        for shift in (-26, 2):
            start = (lid[0] + shift - 24, lid[1] + 44)
            cv2.line(canvas, start, (start[0] + 56, start[1] - 92), (238, 244, 248, 255), 9)
        turned(canvas, [(y - radius * 0.48, 34), (y - radius * 0.3, 34)], style.fitting, 0.6)
    else:
        radius *= 1.45
    disc(canvas, (CENTRE, y), radius, radius * (0.72 if open_lid else 1), style.fitting)
    inner = radius * 0.84
    disc(canvas, (CENTRE, y), inner, inner * (0.72 if open_lid else 1), style.body)
    pans = int(r.integers(1, 5)) if open_lid else 1
    if pans > 1:
        for pan in range(pans):
            x = int(CENTRE + inner * 0.62 * (pan - (pans - 1) / 2) * 2 / pans)
            tint = tuple(max(0, min(255, c + 28 * (pan % 3) - 30)) for c in style.body)
            disc(canvas, (x, y), inner * 0.62 / pans * 1.2, inner * 0.4, (tint[0], tint[1], tint[2]))
    elif not open_lid:
        label(canvas, style, y - inner * 0.4, y + inner * 0.4, inner * 0.75)
    else:
        for ring in np.linspace(0.25, 0.85, int(r.integers(2, 6))).tolist():
            dark = tuple(int(c * 0.88) for c in style.body)
            cv2.ellipse(canvas, (CENTRE, y), (int(inner * ring), int(inner * ring * 0.72)), 0, 0, 360, (*dark, 255), 3)


def _polish(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tall, neck = r.uniform(78, 130), r.uniform(120, 180), r.uniform(26, 40)
    top = 424 - tall
    turned(
        canvas,
        [(top - 20, neck), *shoulder(top - 12, neck, top + 26, wide), *round_base(424, wide, r.uniform(10, 40))],
        style.body,
        0.75,
    )
    turned(canvas, [(28, neck * r.uniform(0.6, 0.9)), (top - 14, neck + 6)], style.fitting, 0.7)
    label(canvas, style, top + 40, 424 - 26, wide * 0.7)


def _brush(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, ferrule = r.uniform(40, 96), r.uniform(20, 30)
    neck = r.uniform(160, 200)
    hair = (60, 46, 40) if r.random() < 0.5 else (236, 214, 190)
    flat = r.random() < 0.4
    head = [(30, wide), (neck, ferrule)] if flat else [*shoulder(26, wide * 0.2, 80, wide), (neck, ferrule)]
    turned(canvas, head, hair, 0.1)
    strands, hairy = canvas.copy(), canvas[..., 3] > 0
    for _ in range(46):
        x = r.uniform(-0.95, 0.95)
        start, end = (int(CENTRE + x * ferrule), int(neck)), (int(CENTRE + x * wide), 30)
        tint = r.uniform(0.7, 1.1)
        cv2.line(strands, start, end, (*(min(255, int(c * tint)) for c in hair), 255), 1)
    canvas[hairy] = strands[hairy]
    # The tips have the variant's colour, like a used brush.
    tips = canvas[:80][canvas[:80, :, 3] > 0]
    canvas[:80][canvas[:80, :, 3] > 0] = ((tips.astype(np.uint16) + np.array([*style.body, 255])) // 2).astype(np.uint8)
    turned(canvas, [(neck, ferrule), (neck + 60, ferrule * 0.8)], METALS[int(r.integers(3))], 0.9)
    belly = ferrule * r.uniform(0.9, 1.5)
    turned(canvas, [(neck + 58, ferrule * 0.8), (neck + 110, belly), (400, ferrule * 0.5), (426, 3)], style.body, 0.6)


KINDS: list[Callable[[np.ndarray, Style], None]] = [_bottle, _tube, _jar, _pump, _lipstick, _compact, _polish, _brush]
