from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from beauty_bafe.data.augmentation import solids
from beauty_bafe.data.augmentation.base import Sample

WAYS = [solids.as_box, solids.as_cylinder, solids.tilt, solids.as_solid]


def pack(size: int = 128, round_: bool = False) -> Sample:
    """A striped pack on white, or a striped disc."""
    photo, mask = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size), np.uint8)
    if round_:
        cv2.circle(mask, (size // 2, size // 2), size // 3, 255, -1)
    else:
        cv2.rectangle(mask, (size * 5 // 16, size // 8), (size * 11 // 16, size * 7 // 8), 255, -1)
    stripes = np.where((np.arange(size) // 6 % 2)[None, :, None] > 0, (200, 30, 30), (20, 60, 180))
    photo[:] = np.where(mask[..., None] > 0, stripes, photo)
    return Sample(photo, mask)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_solid_is_as_large_as_its_photo_and_white_around(way: Callable[..., Sample], size: int) -> None:
    product = pack(size)
    for seed in range(12):
        first, second = (way(*product, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(first.photo, second.photo)
        assert np.array_equal(first.mask, second.mask)
        assert first.photo.dtype == first.mask.dtype == np.uint8
        assert (first.photo[first.mask == 0] == 255).all()
        sides = cv2.boundingRect((first.mask > 127).astype(np.uint8))[2:]
        assert abs(max(sides) - size * 3 / 4) < size / 16, "the longer side stays"
        border = np.concatenate([first.mask[0], first.mask[-1], first.mask[:, 0], first.mask[:, -1]])
        assert not border.any(), "nothing is sliced off"
    assert np.array_equal(product.photo, pack(size).photo)
    assert np.array_equal(product.mask, pack(size).mask)


def test_points_are_seen_where_a_pinhole_camera_sees_them() -> None:
    """By rays: a point turned about y, then about x, meets the plane z = 0 on its way to the camera."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        point, (yaw, pitch) = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 2)
        x, y, z = point
        x, z = x * np.cos(yaw) - z * np.sin(yaw), x * np.sin(yaw) + z * np.cos(yaw)
        y, z = y * np.cos(pitch) - z * np.sin(pitch), y * np.sin(pitch) + z * np.cos(pitch)
        step = 4 / (4 + z)  # the camera is at (0, 0, -4)
        assert np.allclose(solids.project(point, yaw, pitch, 4.0), [x * step, y * step])


def test_a_cylinder_moves_texture_along_the_arc_and_keeps_the_outline() -> None:
    photo, mask = pack()
    for seed in range(5):
        turned = solids.as_cylinder(photo, mask, np.random.default_rng(seed))
        assert np.array_equal(turned.mask, mask)
        rng = np.random.default_rng(seed)
        turn = np.deg2rad(rng.uniform(15, 50) * rng.choice([-1, 1]))
        row, columns = 64, np.flatnonzero(mask[64])
        middle, half = columns.mean(), np.ptp(columns) / 2
        red = []
        for column in columns:  # the slow twin: nearest texture, hue alone, as light differs
            angle = np.arcsin((column - middle) / half) - turn
            red.append(photo[row, round(middle + (half - 1.5) * np.sin(angle)), 0] > 110)  # not the half-white edge
        seen = turned.photo[row, columns].astype(int)
        assert np.mean((seen[:, 0] > seen[:, 2]) == np.array(red)) > 0.85


def test_round_products_get_no_side_and_empty_masks_nothing() -> None:
    disc = pack(round_=True)
    for seed in range(10):
        seen = solids.as_solid(*disc, np.random.default_rng(seed)).mask
        hull = cv2.contourArea(cv2.convexHull(cv2.findNonZero((seen > 127).astype(np.uint8))))
        rectangle = np.prod(cv2.minAreaRect(cv2.findNonZero((seen > 127).astype(np.uint8)))[1])
        assert hull / rectangle < 0.84, "an ellipse, no box"
    empty = Sample(disc.photo, np.zeros_like(disc.mask))
    for way in WAYS:
        unchanged = way(*empty, np.random.default_rng(0))
        assert np.array_equal(unchanged.photo, empty.photo)
        assert not unchanged.mask.any()


def test_a_box_shows_a_side_beside_its_front() -> None:
    photo, mask = pack()
    wider = 0
    for seed in range(20):
        seen = solids.as_box(photo, mask, np.random.default_rng(seed))
        corners = cv2.approxPolyDP(cv2.convexHull(cv2.findNonZero((seen.mask > 127).astype(np.uint8))), 4, True)
        wider += len(corners) > 4
    assert wider > 8


def test_one_face_of_a_box_is_darker_and_a_cylinder_has_a_bright_and_a_dark_side() -> None:
    mask = pack().mask
    grey = Sample(np.where(mask[..., None] > 0, np.uint8(150), np.uint8(255)).repeat(3, axis=2), mask)
    faces = shaded = 0
    for seed in range(20):
        box = solids.as_box(*grey, np.random.default_rng(seed))
        levels = np.bincount(box.photo[..., 0][box.mask == 255], minlength=256)
        faces += (levels[148:152].sum() > 0.02 * levels.sum()) and (levels[70:140].sum() > 0.02 * levels.sum())
        row = solids.as_cylinder(*grey, np.random.default_rng(seed)).photo[64, 42:86, 0].astype(int)
        assert row.max() <= 150
        shaded += np.ptp(row) > 8
    assert faces > 15, "two faces, two lights"
    assert shaded > 6
