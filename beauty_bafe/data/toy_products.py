"""Beauty products drawn by code: bottles, tubes, jars, pumps, lipsticks, compacts, nail polish, brushes.

Almost everything on a cosmetics shelf is a body of revolution, so one primitive draws most of it: a stack of turned
parts, each a profile of half-widths over height, shaded as a cylinder. All arithmetic is on integers, polynomials and
OpenCV's fixed-point routines, so a product looks the same to the bit on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

CANVAS = 448  # products are drawn on a square canvas of this side and shrunk when used
CENTRE = CANVAS // 2

Color = tuple[int, int, int]
Profile = Sequence[tuple[float, float]]  # (height on the canvas in pixels from the top, half-width), top to bottom

METALS: list[Color] = [(212, 175, 90), (200, 200, 206), (190, 120, 100), (35, 33, 36), (245, 245, 243)]
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


class Style(NamedTuple):
    """What a product line shares (shape, lettering, fittings) and what its variants change (colours)."""

    shape: np.random.Generator
    body: Color
    label: Color
    ink: Color
    fitting: Color
    brand: str
    word: str


def draw_product(seed: int, family: int, variant: int) -> np.ndarray:
    """A product as uint8 RGBA (CANVAS, CANVAS, 4). Variants of a family differ in their colours alone."""
    shape = np.random.default_rng((seed, family))
    kind = KINDS[int(shape.integers(len(KINDS)))]
    color = np.random.default_rng((seed, family, variant + 1))
    fitting = METALS[int(shape.integers(len(METALS)))]
    # Hues of variants are kept apart, so that near-duplicates can be told apart by a person.
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


def _turned(canvas: np.ndarray, profile: Profile, color: Color, gloss: float = 0.5, centre: float = CENTRE) -> None:
    """Paint a body of revolution: dark at the flanks, a highlight left of the middle, its width given by `profile`."""
    heights, widths = np.array(profile, np.float64).T
    top, bottom = max(0, int(heights[0])), min(CANVAS, int(heights[-1]) + 1)
    half = np.interp(np.arange(top, bottom), heights, widths)[:, None]
    across = (np.arange(CANVAS) - centre)[None, :] / np.maximum(half, 1e-6)
    inside = np.abs(across) <= 1
    canvas[top:bottom][inside] = _shade(across, color, gloss)[inside]


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


def _label(canvas: np.ndarray, style: Style, top: float, bottom: float, half: float) -> None:
    """A label round the body between two heights: a band, frame or bare lettering; it takes the body's shading along."""
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
    # The body's own light and dark, as a factor on what is printed on it.
    light = under.sum(axis=2, keepdims=True) * 256 // max(1, sum(style.body))
    printed = np.clip(print_[..., :3].astype(np.int32) * np.clip(light, 110, 290) // 256, 0, 255)
    solid = (print_[..., 3:] > 0) & (canvas[rows, columns, 3:] > 0)
    canvas[rows, columns, :3] = np.where(solid, printed, under).astype(np.uint8)


def _letter(canvas: np.ndarray, text: str, color: Color, at: float, share: float) -> None:
    """Centre `text` at the height `at` (0..1), `share` of the width wide at most."""
    height, width = canvas.shape[:2]
    font = cv2.FONT_HERSHEY_DUPLEX
    (wide, tall), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(share * width / wide, 0.28 * height / tall)
    if scale < 0.25:
        return
    thickness = 2 if scale > 0.9 else 1
    origin = (int(width / 2 - wide * scale / 2), int(height * at + tall * scale / 2))
    cv2.putText(canvas, text, origin, font, scale, (*color, 255), thickness, cv2.LINE_8)


def _shoulder(top: float, narrow: float, bottom: float, wide: float) -> list[tuple[float, float]]:
    """A rounded step from a narrow to a wide half-width (a quarter of a circle's cousin, s = 1 - (1 - u)^2)."""
    steps = np.linspace(0, 1, 9)
    return [(top + (bottom - top) * u, narrow + (wide - narrow) * (1 - (1 - u) ** 2)) for u in steps.tolist()]


def _round_base(bottom: float, wide: float, radius: float) -> list[tuple[float, float]]:
    return [
        (bottom - (2 * radius - y), w)
        for y, w in ((radius, wide), (1.6 * radius, wide - 0.25 * radius), (2 * radius, wide - radius))
    ]


def _ribs(canvas: np.ndarray, top: float, bottom: float, half: float, count: int) -> None:
    for x in np.linspace(CENTRE - half, CENTRE + half, count + 2)[1:-1].astype(int).tolist():
        stripe = canvas[int(top) : int(bottom), x : x + 1, :3]
        stripe[:] = (stripe * np.uint16(7) // 10).astype(np.uint8)


def _cap(canvas: np.ndarray, style: Style, top: float, bottom: float, half: float) -> None:
    style_of_cap = int(style.shape.integers(3))
    profile = [(top, half * (0.8 if style_of_cap == 1 else 0.96)), (top + 5, half), (bottom, half)]
    _turned(canvas, profile, style.fitting, 0.6)
    if style_of_cap == 2:
        _ribs(canvas, top + 4, bottom, half, int(style.shape.integers(6, 14)))


def _bottle(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, neck = r.uniform(62, 112), r.uniform(22, 40)
    cap_top, cap_end = 24.0, 24 + r.uniform(40, 88)
    shoulder = cap_end + r.uniform(16, 60)
    profile = [(cap_end - 2, neck), *_shoulder(cap_end + 6, neck, shoulder, wide), *_round_base(424, wide, r.uniform(4, 18))]
    _turned(canvas, profile, style.body, r.uniform(0.3, 0.7))
    _cap(canvas, style, cap_top, cap_end, neck + r.uniform(2, 14))
    _label(canvas, style, shoulder + 24, 424 - r.uniform(36, 90), wide * 0.9)


def _tube(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, foot = r.uniform(70, 105), r.uniform(38, 60)
    end = r.uniform(320, 352)
    _turned(canvas, [(30, wide), (48, wide), (140, wide * 0.96), (end, foot + 6)], style.body, 0.35)
    _ribs(canvas, 30, 46, wide, 22)
    _turned(canvas, [(end, foot), (end + 6, foot + 4), (424, foot + 2)], style.fitting, 0.6)
    _label(canvas, style, r.uniform(84, 120), r.uniform(230, 290), wide * 0.72)


def _jar(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tall = r.uniform(130, 185), r.uniform(90, 150)
    lid, top = r.uniform(46, 80), 224 - r.uniform(60, 100)
    base = top + lid + tall
    _turned(
        canvas,
        [(top + lid - 4, wide * 0.9), (top + lid + 12, wide), *_round_base(base, wide, r.uniform(10, 30))],
        style.body,
        0.5,
    )
    _cap(canvas, style, top, top + lid, wide * r.uniform(0.9, 1.02))
    _label(canvas, style, top + lid + 18, base - 16, wide * r.uniform(0.55, 0.8))


def _pump(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, neck = r.uniform(66, 110), r.uniform(24, 34)
    collar = r.uniform(120, 140)
    _turned(canvas, [(44, 9), (collar, 9)], style.fitting, 0.6)
    reach = r.uniform(54, 90)
    spout = np.array([[CENTRE - 26, 28], [CENTRE + reach, 34], [CENTRE + reach, 50], [CENTRE - 26, 56]], np.int32)
    cv2.fillPoly(canvas, [spout], (*(int(c * 0.9) for c in style.fitting), 255))
    cv2.line(canvas, (CENTRE - 24, 32), (int(CENTRE + reach - 4), 37), (*(min(255, c + 60) for c in style.fitting), 255), 3)
    _turned(canvas, [(26, 24), (32, 28), (60, 28)], style.fitting, 0.6)
    profile = [
        (collar + 20, neck),
        *_shoulder(collar + 24, neck, collar + r.uniform(46, 80), wide),
        *_round_base(424, wide, r.uniform(6, 20)),
    ]
    _turned(canvas, profile, style.body, r.uniform(0.3, 0.7))
    _turned(canvas, [(collar - 4, neck + 4), (collar + 26, neck + 6)], style.fitting, 0.6)
    _ribs(canvas, collar, collar + 26, neck + 4, 9)
    _label(canvas, style, collar + 100, 424 - r.uniform(30, 70), wide * 0.88)


def _lipstick(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tip = r.uniform(44, 66), r.uniform(30, 46)
    collar = r.uniform(190, 215)
    tip = min(tip, wide - 8)
    _turned(canvas, [*_shoulder(40, 4, 100, tip), (collar, tip)], style.body, 0.55)
    slant = r.uniform(30, 70)
    cut = np.array(
        [[0, 0], [CANVAS, 0], [CANVAS, 40 + slant * 1.6], [CENTRE + tip, 40 + slant * 1.3], [CENTRE - tip, 30], [0, 30]],
        np.int32,
    )
    cv2.fillPoly(canvas, [cut], (0, 0, 0, 0))
    _turned(canvas, [(collar, wide * 0.86), (collar + 58, wide * 0.86)], METALS[int(r.integers(3))], 0.8)
    _turned(canvas, [(collar + 56, wide), (418, wide), (424, wide - 4)], style.fitting, 0.6)
    _label(canvas, style._replace(body=style.fitting), collar + 100, 400, wide * 0.8)


def _compact(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    radius = r.uniform(104, 128)
    open_lid = r.random() < 0.5
    y = 300 if open_lid else 224
    if open_lid:
        lid = (CENTRE, int(y - radius * 1.25))
        _disc(canvas, lid, radius * 0.98, radius * 0.9, style.fitting)
        _disc(canvas, lid, radius * 0.84, radius * 0.77, (206, 218, 226))
        for shift in (-26, 2):
            start = (lid[0] + shift - 24, lid[1] + 44)
            cv2.line(canvas, start, (start[0] + 56, start[1] - 92), (238, 244, 248, 255), 9)
        _turned(canvas, [(y - radius * 0.48, 34), (y - radius * 0.3, 34)], style.fitting, 0.6)
    else:
        radius *= 1.45
    _disc(canvas, (CENTRE, y), radius, radius * (0.72 if open_lid else 1), style.fitting)
    inner = radius * 0.84
    _disc(canvas, (CENTRE, y), inner, inner * (0.72 if open_lid else 1), style.body)
    pans = int(r.integers(1, 5)) if open_lid else 1
    if pans > 1:
        for pan in range(pans):
            x = int(CENTRE + inner * 0.62 * (pan - (pans - 1) / 2) * 2 / pans)
            tint = tuple(max(0, min(255, c + 28 * (pan % 3) - 30)) for c in style.body)
            _disc(canvas, (x, y), inner * 0.62 / pans * 1.2, inner * 0.4, (tint[0], tint[1], tint[2]))
    elif not open_lid:
        _label(canvas, style, y - inner * 0.4, y + inner * 0.4, inner * 0.75)
    else:
        for ring in np.linspace(0.25, 0.85, int(r.integers(2, 6))).tolist():
            dark = tuple(int(c * 0.88) for c in style.body)
            cv2.ellipse(canvas, (CENTRE, y), (int(inner * ring), int(inner * ring * 0.72)), 0, 0, 360, (*dark, 255), 3)


def _disc(canvas: np.ndarray, centre: tuple[int, int], wide: float, tall: float, color: Color) -> None:
    """An ellipse lit from the upper left."""
    y, x = np.ogrid[:CANVAS, :CANVAS]
    u, v = (x - centre[0]) / wide, (y - centre[1]) / tall
    inside = u * u + v * v <= 1
    light = 1.04 - 0.16 * u - 0.14 * v
    rim = u * u + v * v > 0.94
    rgb = np.array(color) * np.where(rim, light * 0.82, light)[..., None]
    canvas[inside, :3] = np.clip(rgb, 0, 255).astype(np.uint8)[inside]
    canvas[inside, 3] = 255


def _polish(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, tall, neck = r.uniform(78, 130), r.uniform(120, 180), r.uniform(26, 40)
    top = 424 - tall
    _turned(
        canvas,
        [(top - 20, neck), *_shoulder(top - 12, neck, top + 26, wide), *_round_base(424, wide, r.uniform(10, 40))],
        style.body,
        0.75,
    )
    _turned(canvas, [(28, neck * r.uniform(0.6, 0.9)), (top - 14, neck + 6)], style.fitting, 0.7)
    _label(canvas, style, top + 40, 424 - 26, wide * 0.7)


def _brush(canvas: np.ndarray, style: Style) -> None:
    r = style.shape
    wide, ferrule = r.uniform(40, 96), r.uniform(20, 30)
    neck = r.uniform(160, 200)
    hair = (60, 46, 40) if r.random() < 0.5 else (236, 214, 190)
    flat = r.random() < 0.4
    head = [(30, wide), (neck, ferrule)] if flat else [*_shoulder(26, wide * 0.2, 80, wide), (neck, ferrule)]
    _turned(canvas, head, hair, 0.1)
    strands, hairy = canvas.copy(), canvas[..., 3] > 0
    for _ in range(46):
        x = r.uniform(-0.95, 0.95)
        start, end = (int(CENTRE + x * ferrule), int(neck)), (int(CENTRE + x * wide), 30)
        tint = r.uniform(0.7, 1.1)
        cv2.line(strands, start, end, (*(min(255, int(c * tint)) for c in hair), 255), 1)
    canvas[hairy] = strands[hairy]
    # The tips take the variant's colour, as a brush in use does.
    tips = canvas[:80][canvas[:80, :, 3] > 0]
    canvas[:80][canvas[:80, :, 3] > 0] = ((tips.astype(np.uint16) + np.array([*style.body, 255])) // 2).astype(np.uint8)
    _turned(canvas, [(neck, ferrule), (neck + 60, ferrule * 0.8)], METALS[int(r.integers(3))], 0.9)
    belly = ferrule * r.uniform(0.9, 1.5)
    _turned(canvas, [(neck + 58, ferrule * 0.8), (neck + 110, belly), (400, ferrule * 0.5), (426, 3)], style.body, 0.6)


KINDS: list[Callable[[np.ndarray, Style], None]] = [_bottle, _tube, _jar, _pump, _lipstick, _compact, _polish, _brush]
