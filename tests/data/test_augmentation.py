from __future__ import annotations

import albumentations as A
import cv2
import numpy as np
import pytest
from hydra.utils import instantiate

from beauty_bafe.data.augmentation import Augmentation, Sample, Surroundings, street

SIZE = 96


def product(color: tuple[int, int, int] = (40, 70, 160)) -> Sample:
    photo, mask = np.full((SIZE, SIZE, 3), 255, np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    cv2.rectangle(mask, (30, 20), (66, 76), 255, -1)
    photo[mask > 0] = color
    return Sample(photo, mask)


def green(rng: np.random.Generator, size: int, zoom: tuple[float, float] = (0.4, 1.0)) -> np.ndarray:
    return np.full((size, size, 3), (20, 200, 30), np.uint8)


SURROUNDINGS = Surroundings(green, lambda _: product((200, 40, 40)))


@pytest.fixture(params=["paper", "street"])
def augmentation(request: pytest.FixtureRequest, configure) -> Augmentation:
    return instantiate(configure("train", f"augmentation={request.param}").augmentation)


def run(augmentation: Augmentation, seed: int) -> Sample:
    return augmentation(*product(), SURROUNDINGS, np.random.default_rng(seed))


def test_same_generator_same_picture_and_inputs_untouched(augmentation: Augmentation) -> None:
    original, copy = product(), product()
    first = augmentation(*original, SURROUNDINGS, np.random.default_rng(1))
    np.random.seed(99)  # the global state must not matter
    A.Compose([A.HorizontalFlip()])(image=original.photo)
    second = augmentation(*original, SURROUNDINGS, np.random.default_rng(1))
    assert np.array_equal(first.photo, second.photo)
    assert np.array_equal(first.mask, second.mask)
    assert np.array_equal(original.photo, copy.photo)
    assert np.array_equal(original.mask, copy.mask)
    assert not np.array_equal(first.photo, run(augmentation, 2).photo)


def test_shapes_and_masks_are_sensible(augmentation: Augmentation) -> None:
    areas = []
    for seed in range(40):
        sample = run(augmentation, seed)
        assert sample.photo.shape == (SIZE, SIZE, 3)
        assert sample.photo.dtype == sample.mask.dtype == np.uint8
        assert sample.mask.shape == (SIZE, SIZE)
        areas.append((sample.mask > 127).mean())
    assert 0.03 < np.mean(areas) < 0.5
    assert np.std(areas) > 0.02


def test_paper_mask_lies_on_the_product(configure) -> None:
    augmentation = instantiate(configure("train", "augmentation=paper", "augmentation.jitter=[0,0,0,0]").augmentation)
    for seed in range(30):
        sample = run(augmentation, seed)
        inside = sample.photo[sample.mask == 255].astype(int)
        if len(inside):
            assert np.abs(np.median(inside, axis=0) - (40, 70, 160)).max() <= 3


def test_paper_draws_thirds_and_five_angles(configure) -> None:
    augmentation = instantiate(configure("train", "augmentation=paper", "augmentation.jitter=[0,0,0,0]").augmentation)
    kinds, angles = {"photo": 0, "white": 0, "colour": 0}, set()
    for seed in range(300):
        sample = run(augmentation, seed)
        outside = np.median(sample.photo[sample.mask == 0], axis=0)
        kind = "white" if (outside > 253).all() else "photo" if np.abs(outside - (20, 200, 30)).max() < 4 else "colour"
        kinds[kind] += 1
        contours, _ = cv2.findContours((sample.mask > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        (_, _), (width, height), angle = cv2.minAreaRect(max(contours, key=cv2.contourArea))
        touches = sample.mask[[0, -1]].any() or sample.mask[:, [0, -1]].any()
        if not touches:
            assert 0.45 * 57 < max(width, height) < 1.25 * 57, "scale 0.5 to 1.2"
            angles.add(round(angle / 45) * 45 % 90)
            assert min(abs(angle % 45), 45 - angle % 45) < 4
    assert angles == {0, 45}
    assert all(70 < count < 130 for count in kinds.values()), kinds


def test_street_hides_part_of_the_product_at_times(configure) -> None:
    always = instantiate(configure("train", "augmentation.occlusion=1", "augmentation.bars=0").augmentation)
    never = instantiate(configure("train", "augmentation.occlusion=0", "augmentation.bars=0").augmentation)
    smaller = 0
    for seed in range(40):
        covered, free = run(always, seed).mask, run(never, seed).mask
        assert covered.sum(dtype=int) >= 0.6 * free.sum(dtype=int)
        smaller += covered.sum(dtype=int) < free.sum(dtype=int)
    assert smaller > 8


def test_street_bars_are_white_and_no_product(configure) -> None:
    augmentation = instantiate(configure("train", "augmentation.bars=1").augmentation)
    for seed in range(10):
        sample = run(augmentation, seed)
        rows = (sample.photo == 255).all(axis=(1, 2))
        columns = (sample.photo == 255).all(axis=(0, 2))
        assert rows[0] != columns[0]
        assert sample.mask[rows].sum() == 0
        assert sample.mask[:, columns].sum() == 0


@pytest.mark.parametrize("key", ["hand", "solid", "shelf", "camera.glare", *(f"camera.{name}" for name in street.CAMERA)])
def test_every_probability_is_its_functions(key: str, configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 the function makes every picture, at 0 none."""
    name = key.rpartition(".")[2]
    calls = 0

    def count(function):
        def counting(*arguments):
            nonlocal calls
            calls += 1
            return function(*arguments)

        return counting

    if name in street.CAMERA:
        monkeypatch.setitem(street.CAMERA, name, count(street.CAMERA[name]))
    else:
        attribute = {"hand": "paste_in_hand", "solid": "as_solid", "shelf": "draw_shelf"}.get(name, name)
        monkeypatch.setattr(street, attribute, count(getattr(street, attribute)))
    for probability in (1, 0):
        calls = 0
        kind = instantiate(configure("train", f"augmentation.{key}={probability}").augmentation)
        for seed in range(5):
            run(kind, seed)
        assert calls == 5 * probability


def test_a_misspelt_camera_step_is_answered(configure) -> None:
    with pytest.raises(Exception, match=r"unknown or missing key 'blur'; its keys are exactly glare, colour, defocus, motion"):
        instantiate(configure("train", "+augmentation.camera.blur=0.5").augmentation)


@pytest.mark.parametrize(("key", "value"), [("hand", 1.5), ("bars", -0.1), ("camera.glare", 30), ("camera.jpeg", -1)])
def test_a_probability_out_of_range_is_answered(key: str, value: float, configure) -> None:
    with pytest.raises(Exception, match=rf"augmentation.{key}={value}: type a share from 0 to 1"):
        instantiate(configure("train", f"augmentation.{key}={value}").augmentation)
