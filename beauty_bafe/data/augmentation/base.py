"""Types and helper functions of augmentations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import albumentations as A
import cv2
import numpy as np


class Sample(NamedTuple):
    """`photo`: uint8 (S, S, 3). `mask`: uint8 (S, S), 0 to 255, soft at edges."""

    photo: np.ndarray
    mask: np.ndarray


class Surroundings(NamedTuple):
    """Backgrounds and other products for a composite; both are sampled with the given generator.

    `background(rng, size, zoom)` returns uint8 (size, size, 3), `product(rng)` another product of the catalogue.
    """

    background: Callable[..., np.ndarray]
    product: Callable[[np.random.Generator], Sample]


def draw_other(rng: np.random.Generator, index: int, count: int) -> int:
    """A random index below `count` other than `index`; `index` if it is the only one."""
    return (index + 1 + int(rng.integers(max(1, count - 1)))) % count


class Augmentation(Protocol):
    """`holes`: the share of pictures, 0 to 1, for which its input mask should exclude the regions of `find_holes`."""

    holes: float

    def __call__(self, photo: np.ndarray, mask: np.ndarray, surroundings: Surroundings, rng: np.random.Generator) -> Sample: ...


def affine(**ranges: object) -> A.Affine:
    """A.Affine that fills the photo with white and the mask with 0."""
    return A.Affine(**ranges, fill=255, fill_mask=0, mask_interpolation=cv2.INTER_LINEAR, p=1.0)


def run(transform: A.Compose, rng: np.random.Generator, photo: np.ndarray, mask: np.ndarray | None = None) -> Sample:
    """Apply an albumentations pipeline seeded from `rng`, as otherwise all workers draw the same numbers (2.0.8)."""
    transform.set_random_state(rng, random.Random(int(rng.integers(2**31))))
    if mask is None:
        return Sample(transform(image=photo)["image"], np.empty(0, np.uint8))
    result = transform(image=photo, mask=mask)
    return Sample(result["image"], result["mask"])


def paste(canvas: np.ndarray, product: Sample) -> np.ndarray:
    """Blend the product over a canvas, uint8 (S, S, 3), with its mask as alpha; returns a new picture."""
    left, top, width, height = cv2.boundingRect(product.mask)
    window = (slice(top, top + height), slice(left, left + width))
    weight = product.mask[window][..., None].astype(np.uint16)
    canvas = canvas.copy()
    canvas[window] = (product.photo[window] * weight + canvas[window] * (255 - weight) + 127) // 255
    return canvas
