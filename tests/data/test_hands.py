from __future__ import annotations

import cv2
import numpy as np
import pytest

from beauty_bafe.data.augmentation.base import Sample, paste
from beauty_bafe.data.augmentation.hand_drawing import SKIN, _skin
from beauty_bafe.data.augmentation.hands import paste_in_hand

GREEN = (20, 200, 30)  # no skin has it


def scene(size: int = 128, box: tuple[float, float, float, float] = (0.35, 0.25, 0.6, 0.75)) -> tuple[np.ndarray, Sample]:
    """A black product, on which a shadow changes nothing, and an even canvas."""
    mask = np.zeros((size, size), np.uint8)
    left, top, right, bottom = (round(place * size) for place in box)
    cv2.rectangle(mask, (left, top), (right, bottom), 255, -1)
    return np.full((size, size, 3), GREEN, np.uint8), Sample(np.zeros((size, size, 3), np.uint8), mask)


BOXES = [
    (0.35, 0.25, 0.6, 0.75),
    (0.02, 0.03, 0.97, 0.98),
    (0.45, 0.05, 0.52, 0.95),
    (0.4, 0.4, 0.62, 0.62),
    (0.0, 0.0, 0.3, 0.5),
    (0.0, 0.0, 1.0, 1.0),
]


def test_same_generator_same_picture_and_inputs_untouched() -> None:
    canvas, product = scene()
    copy_canvas, copy_product = scene()
    first, second = (paste_in_hand(canvas, product, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(first.photo, second.photo)
    assert np.array_equal(first.mask, second.mask)
    assert np.array_equal(canvas, copy_canvas)
    assert np.array_equal(product.photo, copy_product.photo)
    assert np.array_equal(product.mask, copy_product.mask)
    assert not np.array_equal(first.photo, paste_in_hand(canvas, product, np.random.default_rng(2)).photo)


@pytest.mark.parametrize("size", [64, 224, 512])
@pytest.mark.parametrize("box", BOXES)
def test_a_hand_is_never_product_and_hides_little(size: int, box: tuple[float, float, float, float]) -> None:
    canvas, product = scene(size, box)
    plain = paste(canvas, product)
    covered = 0
    for seed in range(12):
        sample = paste_in_hand(canvas, product, np.random.default_rng(seed))
        assert sample.photo.shape == canvas.shape
        assert sample.photo.dtype == sample.mask.dtype == np.uint8
        changed = (sample.photo != plain).any(axis=2)
        assert (sample.mask[changed & (product.mask > 0)] < 255).all()
        clear = np.abs(sample.photo.astype(int) - plain).max(axis=2) > 60
        assert (sample.mask[clear] < 250).all()
        assert (sample.mask <= product.mask).all()
        assert sample.mask.sum(dtype=int) >= 0.64 * product.mask.sum(dtype=int)
        covered += sample.mask.sum(dtype=int) < 0.98 * product.mask.sum(dtype=int)
    assert covered >= 4, "fingers lie on the product in most pictures"


def test_the_arm_comes_from_outside_the_frame() -> None:
    canvas, product = scene()
    plain = paste(canvas, product)
    reaching, sides = 0, set()
    for seed in range(60):
        changed = (paste_in_hand(canvas, product, np.random.default_rng(seed)).photo != plain).any(axis=2)
        edges = {"top": changed[0], "bottom": changed[-1], "left": changed[:, 0], "right": changed[:, -1]}
        touched = {side for side, edge in edges.items() if edge.any()}
        # One piece from the frame to the product: nothing floats.
        _, pieces = cv2.connectedComponents((changed | (product.mask > 0)).astype(np.uint8))
        joined = pieces[product.mask > 0][0]
        at_frame = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
        reaching += bool(touched) and joined in at_frame
        sides |= touched
    assert reaching >= 58
    assert sides == {"top", "bottom", "left", "right"}


def test_nothing_to_hold_is_pasted_plainly() -> None:
    canvas, product = scene()
    empty = Sample(product.photo, np.zeros_like(product.mask))
    tiny = Sample(product.photo, np.zeros_like(product.mask))
    tiny.mask[60:63, 60:63] = 255
    for small in (empty, tiny):
        sample = paste_in_hand(canvas, small, np.random.default_rng(0))
        assert np.array_equal(sample.photo, paste(canvas, small))
        assert np.array_equal(sample.mask, small.mask)
        assert sample.mask is not small.mask


def test_skins_go_from_very_light_to_very_dark_and_are_never_green_or_blue() -> None:
    rng = np.random.default_rng(0)
    skins = np.array([_skin(rng) for _ in range(300)])
    lab = cv2.cvtColor((skins / 255).astype(np.float32)[None], cv2.COLOR_RGB2LAB)[0]
    assert lab[:, 0].min() < SKIN[-1, 0] + 5
    assert lab[:, 0].max() > SKIN[0, 0] - 5
    assert np.histogram(lab[:, 0], bins=5)[0].min() > 25
    assert (skins[:, 0] > skins[:, 1]).all()
    assert (skins[:, 1] > skins[:, 2]).all()
