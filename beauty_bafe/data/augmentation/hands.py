"""A human hand that holds a product, drawn partly behind and partly in front of it, as in phone photos from shops."""

from __future__ import annotations

import cv2
import numpy as np

from .base import Sample, paste
from .hand_drawing import BAND, FINGER, FLESH, INDEX, PALM, SLEEVE, STEPS, THUMB, TIP, Drawing, Grip, Part, blend

MAX_HIDDEN = 0.36  # share of the product that the fingers may cover
MIN_PIXELS = 60  # of the product; smaller ones have no edge to grip


def paste_in_hand(canvas: np.ndarray, product: Sample, rng: np.random.Generator) -> Sample:
    """Paste a product on a canvas, uint8 (S, S, 3), held by a drawn hand; the mask is the visible part of the product.

    `product` has the canvas's size. At most MAX_HIDDEN of it is covered. A product that is too small is pasted without a hand.
    """
    size = canvas.shape[0]
    shrink = max(1, size // 40)  # a rough outline of the mask is enough
    points = cv2.findNonZero((product.mask[::shrink, ::shrink] > 127).astype(np.uint8))
    if points is None or len(points) * shrink**2 < MIN_PIXELS or len(points) < 8:
        return Sample(paste(canvas, product), product.mask.copy())
    grip = _find_grip(points * shrink, size, rng)
    total = product.mask.sum(dtype=np.int64)
    for attempt in range(4):
        parts = [part for part in _pose(grip, size, rng) if attempt < 3 or not part.front]
        hand = Drawing(parts, grip, size)
        visible = product.mask.copy()
        visible[hand.window] = cv2.multiply(visible[hand.window], 255 - hand.front, scale=1 / 255)
        if visible.sum(dtype=np.int64) >= (1 - MAX_HIDDEN) * total:
            break
        grip = grip._replace(unit=grip.unit * 0.78, width=grip.width / 0.78)
    light = rng.normal((0, -0.8), 0.6)  # its direction: mostly from above
    light /= np.hypot(*light) + 1e-6
    held = product.mask[hand.window]
    color = hand.paint(held, light, rng)
    shadow = cv2.multiply(hand.shadow(light, rng), held, scale=1 / 255)
    picture = canvas.copy()
    picture[hand.window] = blend(picture[hand.window], color, hand.whole)
    picture = paste(picture, product)
    shaded = cv2.multiply(picture[hand.window], cv2.merge([255 - shadow] * 3), scale=1 / 255)
    picture[hand.window] = blend(shaded, color, hand.front)
    return Sample(picture, visible)


def _find_grip(points: np.ndarray, size: int, rng: np.random.Generator) -> Grip:
    """Grip across the product's narrow side more often than at its ends, and from above less often than otherwise."""
    (centre_x, centre_y), (width, height), angle = cv2.minAreaRect(points)
    if width > height:
        angle, width, height = angle + 90, height, width
    centre = np.array([centre_x, centre_y])
    turns, weights = [], []
    for turn, preference in ((0, 1.0), (180, 1.0), (90, 0.3), (270, 0.3)):
        theta = np.deg2rad(angle + turn)
        into = np.array([np.cos(theta), np.sin(theta)])
        edge = centre - into * (width if turn % 180 == 0 else height) / 2
        room = min(edge[0], edge[1], size - edge[0], size - edge[1]) / size
        turns.append(angle + turn)
        weights.append(preference * (0.12 + np.clip(room, 0, 0.3)) * (1.3 - into[1] if into[1] < 0.3 else 0.5))
    theta = np.deg2rad(turns[rng.choice(4, p=np.array(weights) / sum(weights))] + rng.uniform(-22, 22))
    x = np.array([np.cos(theta), np.sin(theta)])
    y = np.array([-x[1], x[0]])
    if (y[1] < 0) == (rng.random() < 0.85):  # the thumb is mostly above the fingers
        y = -y
    unit = float(np.clip(rng.uniform(0.2, 0.33) * max(width, 0.4 * height), 0.035 * size, 0.17 * size))
    offsets = points.reshape(-1, 2) - centre
    along, across = offsets @ x, offsets @ y
    row = rng.uniform(-0.28, 0.28) * (across.max() - across.min())
    near = along[np.abs(across - row) < max(unit, 3)]
    near = near if len(near) else along
    edge = centre + x * near.min() + y * row
    edge = np.clip(edge, 0.02 * size, 0.98 * size)
    return Grip(edge, np.stack([x, y]), unit, float(near.max() - near.min()) / unit)


def _pose(grip: Grip, size: int, rng: np.random.Generator) -> list[Part]:
    """The hand's parts in drawing order; the forearm extends beyond the frame."""
    wrist = np.array([rng.uniform(-5.0, -3.8), rng.uniform(-0.4, 1.2)])
    # The forearm points away from the product, mostly downwards: the arm is below the phone.
    out = grip.axes @ (np.array([0, rng.uniform(0, 0.9)]) - grip.axes[0] + rng.normal(0, 0.3, 2))
    out[0] = min(out[0], -0.35)
    out /= np.hypot(*out)

    def forearm(start: float, end: float, thick: float, kind: int = FLESH) -> Part:
        radii = np.interp(np.linspace(start, end, STEPS), [-1, 0.5, 8], [1.3, 1.4, 2.1]) * thick
        return Part([wrist + out * far for far in np.linspace(start, end, 4)], radii, joined=0.0, kind=kind)

    reach = 2.5 * size / grip.unit
    low = rng.uniform(0.0, 0.5)
    # Behind a slender product the palm ends early, so that fingers and not the palm appear at its far side.
    slender = grip.width < 3.5
    palm = [tuple(wrist), (-3.2, 0.4 + low), (-1.4, low), (min(1.4, 0.6 * grip.width - 1.6), -0.2)]
    parts = [forearm(-0.8, reach, 1.0)._replace(joined=1.0), Part(palm, PALM)]
    if rng.random() < 0.35:
        parts.append(forearm(rng.uniform(0.2, 3.0), reach, rng.uniform(1.15, 1.45), SLEEVE))
    elif rng.random() < 0.2:
        parts.append(forearm(0.8, rng.uniform(1.3, 2.0), 1.05, BAND))
    kind = rng.random()
    if kind < 0.27:  # fingers in front, thumb behind
        if rng.random() < 0.6:
            parts.append(Part([(-3, -0.6), (-1.6, -2.2), (-0.6, -2.9), (1.2, -3.2)], THUMB, joined=0.5))
        count, lean, long = int(rng.integers(1, 5)), rng.uniform(-0.35, 0.35), rng.uniform(1.5, 2.7)
        for index in range(count):
            y = (index - (count - 1) / 2) * 1.04
            end = long * (0.9, 1.0, 0.94, 0.74)[index] + rng.uniform(-0.12, 0.12)
            spine = [(-1.9, 0.95 * y), (-0.5, y - 0.3 * lean), (0.4 * end, y), (end, 0.93 * y + lean * end * 0.5)]
            parts.append(Part(spine, FINGER, True, 0.1, 0.0, True))
        return parts
    knuckle = [(-2.4, -0.9), (-1.2, -2.3 - low), (0.2, -2.5), (min(grip.width, 4.5) * 0.9, -2.2)]
    parts.append(Part(knuckle, INDEX, joined=0.3, wrinkles=True))
    far = min(grip.width + rng.uniform(-0.5, 0.9), 4.5)
    for index in range(3 if slender else 0):
        spine = [(-0.8, 0.9 * index - 0.6), (0.4, 1.03 * index - 0.9), (0.8 * far, 1.03 * index - 1), (far, 0.95 * index - 0.8)]
        parts.append(Part(spine, FINGER, joined=0.15))
    if 1.2 < grip.width < 6 and rng.random() < 0.45:  # fingertips come around the far edge
        lean = rng.uniform(-0.3, 0.3)
        for index in range(int(rng.integers(1, 5))):
            y, end = (index - 1.5) * 1.04, rng.uniform(0.6, 1.1) * min(1.0, grip.width / 3)
            spine = [(grip.width + 0.15 - far * end, y + far**2 * lean * end) for far in (0, 0.3, 0.7, 1)]
            parts.append(Part(spine, TIP, True, 0.0, 0.0))
    if kind < 0.9:  # thumb across the front, or up along the edge
        long, theta = rng.uniform(1.4, 2.7), np.deg2rad(rng.uniform(-80, 20))
        tip = (long * np.cos(theta) + 0.1, long * np.sin(theta) + 0.1)
        spine = [(-3.3, 1.1), (-1.4, 0.5), (0.35 * tip[0] - 0.1, 0.35 * tip[1] + rng.uniform(-0.35, 0.35)), tip]
        parts.append(Part(spine, THUMB, True, 0.42, rng.uniform(-0.15, 0.15), True))
    return parts
