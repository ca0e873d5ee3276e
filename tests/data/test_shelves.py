from __future__ import annotations

import cv2
import numpy as np
import pytest

from beauty_bafe.data.augmentation import shelves
from beauty_bafe.data.augmentation.base import Sample, Surroundings
from beauty_bafe.data.augmentation.shelves import draw_shelf


def red(_: np.random.Generator) -> Sample:
    photo, mask = np.full((96, 96, 3), 255, np.uint8), np.zeros((96, 96), np.uint8)
    cv2.rectangle(mask, (36, 16), (60, 80), 255, -1)
    photo[mask > 0] = (230, 10, 200)
    return Sample(photo, mask)


def nothing(_: np.random.Generator) -> Sample:
    return Sample(np.full((96, 96, 3), 255, np.uint8), np.zeros((96, 96), np.uint8))


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("product", [red, nothing])
def test_any_size_and_product(size: int, product) -> None:
    surroundings = Surroundings(lambda *_: None, product)  # type: ignore[arg-type]  # a shelf needs no photograph
    first, second = (draw_shelf(size, surroundings, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw_shelf(size, surroundings, np.random.default_rng(4)))


def test_a_product_stands_there_several_times() -> None:
    surroundings = Surroundings(lambda *_: None, red)  # type: ignore[arg-type]
    counts = []
    for seed in range(20):
        shelf = draw_shelf(224, surroundings, np.random.default_rng(seed)).astype(int)
        purple = (np.minimum(shelf[..., 0], shelf[..., 2]) > 2 * shelf[..., 1] + 20).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(purple)
        counts.append(int((stats[1:, cv2.CC_STAT_AREA] > 30).sum()))
    assert np.median(counts) >= 4


def test_price_tags_hang_on_most_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings = Surroundings(lambda *_: None, nothing)  # type: ignore[arg-type]
    monkeypatch.setattr(shelves, "random_color", lambda _: (90, 110, 130))  # of wall, board and rail: blue, no tag is
    tagged = 0
    for seed in range(20):
        shelf = draw_shelf(224, surroundings, np.random.default_rng(seed)).astype(int)
        tagged += (shelf[..., 0] > shelf[..., 2] + 4).any()
    assert 8 < tagged < 20, "white tags are not counted"
