from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from beauty_bafe.data.augmentation import camera

STEPS = [
    camera.white_balance,
    camera.tone_curve,
    camera.low_resolution,
    camera.sharpen,
    camera.motion_blur,
    camera.sensor_noise,
    camera.jpeg,
]


def scene(size: int) -> np.ndarray:
    noise = np.random.default_rng(5).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_step_changes_a_copy_by_its_generator_alone(step: Callable[..., np.ndarray], size: int) -> None:
    picture = scene(size)
    changed = 0.0
    for seed in range(6):
        first, second = (step(picture, np.random.default_rng(seed)) for _ in range(2))
        assert first.shape == picture.shape
        assert first.dtype == np.uint8
        assert np.array_equal(first, second)
        changed += float(np.abs(first.astype(int) - picture).mean())
    assert changed > 1
    assert np.array_equal(picture, scene(size))


def test_tone_keeps_the_order_of_light_and_white_balance_keeps_black() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    for seed in range(30):
        curve = camera.tone_curve(ramp, np.random.default_rng(seed)).astype(int)
        assert (np.diff(curve[:, 0, 0]) >= 0).all()
        assert np.ptp(curve) > 60
        balanced = camera.white_balance(ramp, np.random.default_rng(seed))
        assert (balanced[0] == 0).all()
        assert balanced.max() == 255, "one channel keeps its range"


def test_glare_brightens_the_product_alone() -> None:
    picture, mask = np.full((96, 96, 3), 90, np.uint8), np.zeros((96, 96), np.uint8)
    mask[20:70, 30:60] = 255
    brighter = 0
    for seed in range(20):
        shiny = camera.glare(picture, mask, np.random.default_rng(seed))
        assert np.array_equal(shiny[mask == 0], picture[mask == 0])
        assert (shiny.astype(int) >= picture.astype(int) - 1).all()  # rounding
        brighter += int((shiny[mask > 0] > 120).any())
    assert brighter > 15
    assert np.array_equal(camera.glare(picture, np.zeros_like(mask), np.random.default_rng(0)), picture)


def test_few_pixels_keep_no_fine_detail() -> None:
    stripes = np.zeros((224, 224, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: only its own size can keep them
    contrasts = [camera.low_resolution(stripes, np.random.default_rng(seed)).std() for seed in range(20)]
    assert np.median(contrasts) < 0.3 * stripes.std()


def test_noise_is_no_white_noise_and_grows_with_the_light() -> None:
    deviations = {}
    for level in (10, 200):
        flat = np.full((224, 224, 3), level, np.uint8)
        noise = np.stack([camera.sensor_noise(flat, np.random.default_rng(seed)).astype(float) - level for seed in range(8)])
        deviations[level] = noise.std()
        if level == 200:
            green = noise[..., 1] - noise[..., 1].mean(axis=(1, 2), keepdims=True)
            neighbours = (green[:, :, 1:] * green[:, :, :-1]).mean() / (green**2).mean()
            assert neighbours > 0.25
    assert deviations[200] > 1.2 * deviations[10]


def test_motion_blurs_along_one_direction() -> None:
    point = np.zeros((224, 224, 3), np.uint8)
    point[110:114, 110:114] = 255
    for seed in range(10):
        trace = np.argwhere(camera.motion_blur(point, np.random.default_rng(seed))[..., 0] > 2)
        spread = np.sqrt(np.linalg.eigvalsh(np.cov(trace.T)))
        assert np.ptp(trace, axis=0).max() < 224 / 16 + 8
        assert spread[1] >= spread[0]
