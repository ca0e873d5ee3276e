"""The product's mask in a catalogue photo, and whether that mask can be trusted."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import cv2
import numpy as np

from .pictures import Picture

# Distances are in CIE Lab as OpenCV's 8-bit scale gives it (L 0..255, a and b centred on 128).
NOISE_FLOOR = 6.0  # JPEG ringing on plain white stays below this
RING, RING_FACTOR = 2, 2.5  # within so many pixels of the backdrop, for JPEG ringing, the tolerance is multiplied by this
MAX_NOISE = 3.0  # a backdrop that varies more than this is not plain
LIGHTNESS_STEP = 3.0  # a soft shadow changes by less than this from pixel to pixel; a product's edge by more
SHADOW_DEPTH = 70.0  # how much darker than the backdrop a soft shadow may get
MIN_AREA, MAX_AREA = 0.005, 0.95
HOLE_EDGE, HOLE_NOISE = (
    48,
    10,
)  # of 255: a hole's pixels differ less than the first from the backdrop, most of them less than the second
MIN_HOLE = 0.002  # share of the picture
# A pack's hull fills this share of its bounding rectangle (a disc fills 0.79). If white parts of a pack are taken for the
# backdrop, a share of the hull within these bounds is left (above, the mask is complete), and this share of its outline.
PACK_RECTANGLE, PACK_LEFT, PACK_OUTLINE = 0.92, (0.55, 0.95), 0.7
PACK_RIM = 75.0  # colours around a missing part are pale; the gap between two bottles is real
MIN_UNIFORM_BORDER = 0.6  # products may touch the border, a scene fills most of it


class Foreground(NamedTuple):
    """`mask`: uint8 (H, W), 255 on the product. `trusted`: good enough for training; `reason`: why not, "" if trusted."""

    mask: np.ndarray
    trusted: bool
    reason: str


def find_foreground(picture: Picture) -> Foreground:
    """Everything that is not connected to the picture's border through the backdrop's colour.

    The backdrop (white, off-white or any plain colour, JPEG-noisy, softly shaded) is modelled as a plane of colour fitted
    to the border; soft shadows belong to it as long as they are smooth and have its hue. White parts inside
    the product stay foreground, unlike in the paper's rule `mean(R, G, B) < 255`, and so do those of white packs. In a file
    with alpha, the alpha channel is the mask.
    """
    rgb, alpha = picture
    height, width = rgb.shape[:2]
    if min(height, width) < 16:
        return Foreground(np.zeros((height, width), np.uint8), False, f"{width} x {height} pixels are too few")
    if alpha is not None:
        return _judge(np.where(alpha > 127, 255, 0).astype(np.uint8), 1.0)

    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(np.float32)
    border = np.zeros((height, width), bool)
    ring = max(2, min(height, width) // 64)
    border[:ring] = border[-ring:] = border[:, :ring] = border[:, -ring:] = True
    backdrop, noise = _fit_backdrop(lab, border)
    difference = lab - backdrop
    distance = np.sqrt((difference * difference).sum(axis=2))
    tolerance = max(NOISE_FLOOR, 3.0 * noise)
    close = distance < tolerance
    uniform = float(close[border].mean())

    chroma = np.hypot(difference[..., 1], difference[..., 2])
    darker = -difference[..., 0]
    lightness = cv2.GaussianBlur(lab[..., 0], (0, 0), 1.0)
    slope = np.hypot(cv2.Sobel(lightness, cv2.CV_32F, 1, 0, scale=0.125), cv2.Sobel(lightness, cv2.CV_32F, 0, 1, scale=0.125))
    shadow = (chroma < tolerance) & (darker > 0) & (darker < SHADOW_DEPTH) & (slope < LIGHTNESS_STEP)
    plain = _connected_to(border & close, close | shadow)
    # JPEG ringing is stronger along edges, but reaches only a few pixels.
    near = cv2.dilate(plain.astype(np.uint8), np.ones((2 * RING + 1, 2 * RING + 1), np.uint8)) > 0
    plain |= near & (distance < RING_FACTOR * tolerance)
    return _judge(_complete_pack(_tidy(~plain), distance), uniform)


def find_holes(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Enclosed regions of the backdrop's colour: holes (in a handle), or parts that look like one (a white label), bool (H, W).

    `photo`: uint8 (H, W, 3), `mask`: uint8 (H, W), 255 on the product. One picture cannot distinguish the two; regions with
    gradual edges (glossy highlights) are neither.
    """
    outside = photo[::4, ::4][mask[::4, ::4] == 0]  # every sixteenth pixel is enough
    if not len(outside):
        return np.zeros(mask.shape, bool)
    backdrop = np.median(outside, axis=0)
    distance = reduce(cv2.max, cv2.split(cv2.absdiff(photo, np.append(backdrop, 0.0))))
    similar = ((distance < HOLE_EDGE) & (mask > 127)).view(np.uint8)
    count, labels = cv2.connectedComponents(similar, connectivity=4)
    if count == 1:
        return np.zeros(mask.shape, bool)
    area, same = (np.bincount(some, minlength=count) for some in (labels.ravel(), labels[distance < HOLE_NOISE]))
    holes = (area > MIN_HOLE * mask.size) & (same > 0.5 * area)
    holes[0] = False
    return holes[labels]


def _fit_backdrop(lab: np.ndarray, border: np.ndarray) -> tuple[np.ndarray, float]:
    """A plane a + bx + cy per Lab channel through the border's pixels, fitted three times without outliers."""
    height, width = border.shape
    ys, xs = np.nonzero(border)
    design = np.stack([np.ones_like(xs), xs / width - 0.5, ys / height - 0.5], axis=1).astype(np.float32)
    values = lab[ys, xs]
    inlier = np.linalg.norm(values - np.median(values, axis=0), axis=1) < 30
    plane = np.zeros((3, 3), np.float32)
    plane[0] = np.median(values, axis=0)
    noise = 0.0
    for _ in range(3):
        # A plane fitted to only one side would extrapolate poorly to the others.
        if inlier.mean() > 0.5:
            plane = np.linalg.lstsq(design[inlier], values[inlier], rcond=None)[0]
        residual = np.linalg.norm(values - design @ plane, axis=1)
        noise = float(np.median(residual)) * 1.5
        inlier = residual < max(NOISE_FLOOR, 3 * noise)
    x = np.arange(width, dtype=np.float32)[None, :, None] / width - 0.5
    y = np.arange(height, dtype=np.float32)[:, None, None] / height - 0.5
    return plane[0] + x * plane[1] + y * plane[2], min(noise, MAX_NOISE)


def _connected_to(seed: np.ndarray, passable: np.ndarray) -> np.ndarray:
    """The parts of `passable` that touch `seed`: bool (H, W)."""
    count, labels = cv2.connectedComponents(passable.astype(np.uint8), connectivity=4)
    keep = np.zeros(count, bool)
    keep[np.unique(labels[seed])] = True
    keep[0] = False
    return keep[labels]


def _tidy(mask: np.ndarray) -> np.ndarray:
    """Drop specks (dust, JPEG rings) under 0.05 % of the picture; uint8 0 or 255."""
    _count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] >= max(4, 0.0005 * mask.size)
    keep[0] = False
    return np.where(keep[labels], 255, 0).astype(np.uint8)


def _complete_pack(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The convex hull if it is that of a pack with missing white parts, else the unchanged mask; uint8 0 or 255.

    `distance`: of each pixel's colour to the backdrop, Lab.
    """
    points = cv2.findNonZero(mask)
    if points is None:
        return mask
    hull = cv2.convexHull(points)
    area, rectangle = cv2.contourArea(hull), float(np.prod(cv2.minAreaRect(hull)[1]))
    if area < PACK_RECTANGLE * rectangle or not PACK_LEFT[0] * area < len(points) < PACK_LEFT[1] * area:
        return mask
    whole = cv2.fillConvexPoly(np.zeros_like(mask), hull, 255)
    outline = cv2.drawContours(np.zeros_like(mask), [hull], -1, 255, 1)
    near = cv2.dilate(mask, np.ones((5, 5), np.uint8))
    seen = cv2.countNonZero(cv2.bitwise_and(outline, near)) / cv2.countNonZero(outline)
    missing = cv2.morphologyEx(cv2.subtract(whole, mask), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    rim = (cv2.dilate(missing, np.ones((7, 7), np.uint8)) > 0) & (mask > 0)
    if seen < PACK_OUTLINE or not rim.any() or np.median(distance[rim]) > PACK_RIM:
        return mask
    return np.asarray(whole)


def _judge(mask: np.ndarray, uniform: float) -> Foreground:
    area = float((mask > 0).mean())
    reason = ""
    if uniform < MIN_UNIFORM_BORDER:
        reason = f"no plain backdrop: {uniform:.0%} of the border has one colour, {MIN_UNIFORM_BORDER:.0%} needed"
    elif not MIN_AREA <= area <= MAX_AREA:
        reason = f"the product covers {area:.1%} of the picture, {MIN_AREA:.1%} to {MAX_AREA:.0%} expected"
    return Foreground(mask, not reason, reason)
