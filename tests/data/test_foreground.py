from __future__ import annotations

import cv2
import numpy as np
import pytest

from beauty_bafe.data.backgrounds import procedural_background
from beauty_bafe.data.foreground import find_foreground, find_holes
from beauty_bafe.data.pictures import Picture
from beauty_bafe.data.toy_products import draw_product

SIZE = 200


def product_on(backdrop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A blue product with a pure white label, and its true mask."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    cv2.rectangle(mask, (60, 40), (140, 170), 255, -1)
    rgb = backdrop.copy()
    rgb[mask > 0] = (40, 70, 160)
    rgb[90:130, 75:125] = 255
    return rgb, mask


def iou(mask: np.ndarray, true: np.ndarray) -> float:
    both, either = (mask > 0) & (true > 0), (mask > 0) | (true > 0)
    return both.sum() / either.sum()


def shaded() -> np.ndarray:
    ramp = np.linspace(255, 225, SIZE).astype(np.uint8)
    return np.repeat(np.repeat(ramp[:, None, None], SIZE, axis=1), 3, axis=2)


BACKDROPS = {
    "white": np.full((SIZE, SIZE, 3), 255, np.uint8),
    "off-white": np.full((SIZE, SIZE, 3), (248, 244, 238), np.uint8),
    "coloured": np.full((SIZE, SIZE, 3), (120, 190, 150), np.uint8),
    "shaded": shaded(),
}


@pytest.mark.parametrize("name", BACKDROPS)
@pytest.mark.parametrize("quality", [None, 50])
def test_products_on_plain_backdrops(name: str, quality: int | None) -> None:
    rgb, true = product_on(BACKDROPS[name])
    if quality:
        rgb = cv2.imdecode(cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    result = find_foreground(Picture(rgb, None))
    assert result.trusted, result.reason
    assert iou(result.mask, true) > (0.97 if quality is None else 0.93)
    assert result.mask[110, 100] == 255, "the white label is part of the product"


def test_a_white_pack_keeps_the_corners_that_the_backdrop_eats() -> None:
    photo, true = np.full((SIZE, SIZE, 3), 255, np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    cv2.rectangle(true, (60, 30), (140, 170), 255, -1)
    photo[true > 0] = (40, 70, 160)
    torn = photo.copy()
    torn[55:115, 95:141] = (225, 225, 230)
    torn[60:110, 105:141] = 255  # pale print that runs into white at the pack's edge
    assert iou(find_foreground(Picture(torn, None)).mask, true) > 0.98
    for gap in (slice(30, 171), slice(30, 140)):  # two bottles; a U
        apart, cut = photo.copy(), true.copy()
        apart[gap, 90:110], cut[gap, 90:110] = 255, 0
        assert iou(find_foreground(Picture(apart, None)).mask, cut) > 0.98
    stand, legs = np.full_like(photo, 255), np.zeros_like(true)  # pale and angular, but too little of its outline is seen
    for box in ((20, 60, 50, 140), (150, 60, 180, 140), (50, 85, 150, 115)):
        cv2.rectangle(legs, box[:2], box[2:], 255, -1)
    stand[legs > 0] = (225, 215, 190)
    assert iou(find_foreground(Picture(stand, None)).mask, legs) > 0.95
    disc = np.full_like(photo, 255)
    cv2.circle(disc, (100, 100), 60, (40, 70, 160), -1)
    disc[95:105, 100:170] = 255  # nobody knows whether a round product has a notch
    assert not find_foreground(Picture(disc, None)).mask[100, 150]


def test_soft_shadow_is_backdrop() -> None:
    rgb, true = product_on(BACKDROPS["white"])
    soft = cv2.GaussianBlur(np.roll(true, 12, axis=0), (0, 0), 12)[..., None] / 255.0
    rgb = np.where(true[..., None] > 0, rgb, (rgb * (1 - 0.3 * soft)).astype(np.uint8))
    result = find_foreground(Picture(rgb, None))
    assert result.trusted
    assert iou(result.mask, true) > 0.9


@pytest.mark.parametrize("name", ["white", "off-white", "coloured"])
def test_holes_are_enclosed_and_of_the_backdrops_colour(name: str) -> None:
    rgb, true = product_on(BACKDROPS[name])
    rgb[90:130, 75:125] = BACKDROPS[name][90:130, 75:125]
    for y in range(140, 165):  # a spot that shades off
        rgb[y, 70:130] = np.linspace(BACKDROPS[name][y, 70], (40, 70, 160), 60)
    rgb[50:53, 70:73] = 255  # a speck
    expected = np.zeros((SIZE, SIZE), bool)
    expected[90:130, 75:125] = True
    holes = find_holes(rgb, true)
    assert np.array_equal(holes, expected)
    assert not find_holes(rgb, np.full_like(true, 255)).any(), "no backdrop, no colour to compare with"


def test_alpha_brings_its_own_mask() -> None:
    alpha = np.zeros((SIZE, SIZE), np.uint8)
    alpha[50:150, 50:150] = 255
    result = find_foreground(Picture(procedural_background(np.random.default_rng(0), SIZE), alpha))
    assert result.trusted
    assert np.array_equal(result.mask, np.where(alpha > 127, 255, 0))


@pytest.mark.parametrize(
    ("rgb", "reason"),
    [
        (np.full((SIZE, SIZE, 3), 255, np.uint8), "covers 0.0%"),
        (np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), "no plain backdrop"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels are too few"),
    ],
)
def test_what_cannot_be_trusted_says_why(rgb: np.ndarray, reason: str) -> None:
    result = find_foreground(Picture(rgb, None))
    assert not result.trusted
    assert reason in result.reason


def test_scenes_are_mostly_refused() -> None:
    scenes = [procedural_background(np.random.default_rng(seed), SIZE) for seed in range(40)]
    assert sum(find_foreground(Picture(scene, None)).trusted for scene in scenes) < 14


def test_toy_products_against_their_true_masks() -> None:
    scores = []
    for family in range(20):
        rgba = cv2.resize(draw_product(5, family, 0), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        alpha = rgba[..., 3:].astype(np.float32) / 255
        rgb = (rgba[..., :3] * alpha + np.float32(252) * (1 - alpha)).astype(np.uint8)
        scores.append(iou(find_foreground(Picture(rgb, None)).mask, np.where(rgba[..., 3] > 127, 255, 0)))
    assert np.mean(scores) > 0.95
    assert min(scores) > 0.7, "white fittings may melt into the backdrop, no more than that"
