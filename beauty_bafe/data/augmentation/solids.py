"""Rotate a catalogue photo in 3D: as a box with a synthetic side, as a cylinder, or as a flat picture.

Every function takes photo, uint8 RGB (S, S, 3), and mask, uint8 (S, S), of a product on white, and a generator, and returns
a Sample of the same size, in which the product's longer side is about as long as before.
"""

from __future__ import annotations

import cv2
import numpy as np

from .base import Sample

RECTANGULAR = 0.85  # least share of its bounding box that a pack fills; an ellipse fills 0.79
UPRIGHT = 1.3  # height / width; wider products are rarely cylinders with a vertical axis
EDGE = 0.01  # of the canvas: width of a product's outline that is mixed with the white backdrop
NEAR, FAR = 1.3, 4.0  # distance of the camera, in lengths of the product


def as_solid(photo: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
    """As a box if the product is about rectangular, as a cylinder if it is upright, otherwise as a tilted picture."""
    left, top, width, height = cv2.boundingRect(mask)
    if min(width, height) < 8:
        return Sample(photo.copy(), mask.copy())
    filled = cv2.countNonZero(mask[top : top + height, left : left + width]) / (width * height)
    if filled > RECTANGULAR and rng.random() < 0.8:
        return as_box(photo, mask, rng)
    # The backdrop between two bottles or in a handle would be rotated onto the product.
    pieces = np.count_nonzero(np.diff((mask > 127).astype(np.int8), axis=1, prepend=0) == 1, axis=1)
    upright = height > UPRIGHT * width and pieces.max() == 1
    return tilt(*(as_cylinder(photo, mask, rng) if upright and rng.random() < 0.7 else Sample(photo, mask)), rng)


def as_box(photo: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
    """The product is the front of a box, rotated by 10 to 60 degrees about the vertical axis and up to 25 about the horizontal.

    The visible side has a synthetic texture, and one of the two faces is darker.
    """
    left, top, width, height = cv2.boundingRect(mask)
    if min(width, height) < 2:
        return Sample(photo.copy(), mask.copy())
    yaw, pitch = np.deg2rad(rng.uniform(10, 60) * rng.choice([-1, 1])), np.deg2rad(rng.uniform(-25, 25))
    depth = width * rng.uniform(0.3, 1.0)
    x, y, z = width / 2, height / 2, depth / 2
    front = np.array([[-x, -y, -z], [x, -y, -z], [x, y, -z], [-x, y, -z]])
    # Rotated to the right (yaw > 0), the box shows its left side, whose far edge is on the left.
    edge = -x if yaw > 0 else x
    near, far = (np.array([[edge, -y, level], [edge, y, level]]) for level in (-z, z))
    order = (far[0], near[0], near[1], far[1]) if yaw > 0 else (near[0], far[0], far[1], near[1])
    distance = rng.uniform(NEAR, FAR) * max(width, height, depth)
    faces = project(np.stack([front, np.stack(order)]), yaw, pitch, distance)
    faces = _fit(faces, photo.shape[0], max(width, height))

    window = (slice(top, top + height), slice(left, left + width))
    side = _synthesize_side(photo[window], max(2, round(depth)), rng)
    lights = rng.permutation([1.0, rng.uniform(0.5, 0.9)])
    canvas, shape = np.full_like(photo, 255), np.zeros_like(mask)
    pieces = [(side, np.full(side.shape[:2], 255, np.uint8)), (photo[window], mask[window])]
    for (texture, cut), corners, light in zip(pieces, faces[::-1], lights, strict=True):
        lit = cv2.convertScaleAbs(texture, alpha=light)
        face = _warp(lit, cut, corners, photo.shape[0])
        weight = face.mask[..., None].astype(np.uint16)
        canvas = ((face.photo * weight + canvas * (255 - weight) + 127) // 255).astype(np.uint8)
        shape = cv2.max(shape, face.mask)
    return Sample(canvas, shape)


def as_cylinder(photo: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
    """The product rotated about its vertical axis by 15 to 50 degrees, row by row, with the same outline.

    The pixel at u = sin(angle), -1 to 1 across a row, is that of the photo at sin(angle - turn); beyond the edge the unknown
    texture is mirrored. Surfaces that face away from the light are darker.
    """
    turn, light = np.deg2rad(rng.uniform(15, 50) * rng.choice([-1, 1])), np.deg2rad(rng.uniform(-60, 60))
    inside = mask > 127
    rows = np.flatnonzero(inside.any(axis=1))
    if not len(rows):
        return Sample(photo.copy(), mask.copy())
    size = mask.shape[0]
    starts, ends = inside[rows].argmax(axis=1), size - inside[rows, ::-1].argmax(axis=1)
    middle, half = (starts + ends - 1) / 2, np.maximum((ends - starts - 1) / 2, 0.5)
    u = np.clip((np.arange(size) - middle[:, None]) / half[:, None], -1, 1)
    angle = np.arcsin(u)
    # Beyond 90 degrees, a row's outermost pixel, mixed with the backdrop, would be stretched into a white streak.
    reach = np.maximum(half - max(1.5, EDGE * size), 0)
    source = (middle[:, None] + reach[:, None] * np.sin(angle - turn)).astype(np.float32)
    lines = np.repeat(rows[:, None], size, axis=1).astype(np.float32)
    seen = cv2.remap(photo, source, lines, cv2.INTER_LINEAR)
    depth = rng.uniform(0, 0.5)
    seen = seen * (1 - depth * (1 - np.cos(angle - light)) / 2)[..., None]
    canvas = photo.copy()
    canvas[rows] = np.where(inside[rows][..., None], seen, photo[rows]).astype(np.uint8)
    return Sample(canvas, mask.copy())


def tilt(photo: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Sample:
    """The flat picture rotated by up to 45 degrees about the vertical axis and 30 about the horizontal."""
    left, top, width, height = cv2.boundingRect(mask)
    if min(width, height) < 2:
        return Sample(photo.copy(), mask.copy())
    yaw, pitch = np.deg2rad(rng.uniform(-45, 45)), np.deg2rad(rng.uniform(-30, 30))
    x, y = width / 2, height / 2
    face = np.array([[[-x, -y, 0], [x, -y, 0], [x, y, 0], [-x, y, 0]]])
    corners = _fit(project(face, yaw, pitch, rng.uniform(NEAR, FAR) * max(width, height)), photo.shape[0], max(width, height))
    window = (slice(top, top + height), slice(left, left + width))
    face_seen = _warp(photo[window], mask[window], corners[0], photo.shape[0])
    weight = face_seen.mask[..., None].astype(np.uint16)
    white = (face_seen.photo * weight + 255 * (255 - weight) + 127) // 255
    return Sample(white.astype(np.uint8), face_seen.mask)


def project(points: np.ndarray, yaw: float, pitch: float, distance: float) -> np.ndarray:
    """Points (..., 3), x to the right, y down, z away, rotated about y, then about x (radians), and projected: (..., 2).

    The pinhole camera is at `distance` in front of the origin, with a focal length that keeps the scale in the origin's plane.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    about_y = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    cos, sin = np.cos(pitch), np.sin(pitch)
    about_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    turned = points @ (about_x @ about_y).T
    return turned[..., :2] * (distance / (distance + turned[..., 2:]))


def _fit(faces: np.ndarray, size: int, longest: float) -> np.ndarray:
    """Corners (F, 4, 2) centred on the canvas and scaled so that their longest extent is `longest`."""
    low, high = faces.min(axis=(0, 1)), faces.max(axis=(0, 1))
    return (faces - (low + high) / 2) * (min(longest, size - 4) / (high - low).max()) + size / 2


def _warp(texture: np.ndarray, cut: np.ndarray, corners: np.ndarray, size: int) -> Sample:
    """Warp a face's texture and mask, (h, w), to four corners, clockwise from the top left."""
    height, width = cut.shape
    source = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    matrix = cv2.getPerspectiveTransform(source, corners.astype(np.float32))
    photo = cv2.warpPerspective(texture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return Sample(photo, cv2.warpPerspective(cut, matrix, (size, size), flags=cv2.INTER_LINEAR))


def _synthesize_side(front: np.ndarray, depth: int, rng: np.random.Generator) -> np.ndarray:
    """A texture for the side of a pack, uint8 (H, depth, 3): the front squeezed, or its colours with small print."""
    height = front.shape[0]
    if rng.random() < 0.5:
        return cv2.resize(front[:, ::-1] if rng.random() < 0.5 else front, (depth, height), interpolation=cv2.INTER_AREA)
    column = np.median(front[:, front.shape[1] // 4 : -front.shape[1] // 4 or None], axis=1, keepdims=True)
    smooth = cv2.blur(column.astype(np.float32), (1, max(1, height // 12)))
    side = np.repeat(smooth.clip(0, 255).astype(np.uint8).reshape(height, 1, 3), depth, axis=1)
    ink = [20, 20, 20] if side.mean() > 110 else [235, 235, 235]
    line = max(1, height // 80)
    for top in range(int(height * rng.uniform(0.1, 0.5)), int(height * rng.uniform(0.6, 0.95)), max(3, 3 * line)):
        if rng.random() < 0.8:
            start = int(depth * 0.1)
            cv2.line(side, (start, top), (start + int(depth * rng.uniform(0.2, 0.8)), top), ink, line)
    return side
