"""The augmentation published with BAFE."""

from __future__ import annotations

import albumentations as A
import cv2
import numpy as np

from .base import Sample, Surroundings, affine, paste, run


class PaperAugmentation:
    """The published augmentation, with the ranges of the authors' code.

    Rotation by one of `angles`, shift, scale, white fill; then a third each on a photograph (`blur_share` of them blurred),
    on one colour, on white; colour jitter on the result. The mask is warped with the photo, which on clean pictures equals
    the authors' thresholding after the warp and avoids its errors on near-white products.
    """

    holes = 0.0

    def __init__(
        self,
        angles: list[int],
        shift: float,
        scale: tuple[float, float],
        blur_share: float,
        jitter: tuple[float, float, float, float],
    ) -> None:
        self.blur_share = blur_share
        self.warp = A.Compose(
            [
                A.OneOf(
                    [affine(rotate=(angle, angle), scale=tuple(scale), translate_percent=(-shift, shift)) for angle in angles],
                    p=1.0,
                )
            ]
        )
        brightness, contrast, saturation, hue = jitter
        self.color = A.Compose(
            [
                A.ColorJitter(
                    brightness=(1 - brightness, 1 + brightness),
                    contrast=(1 - contrast, 1 + contrast),
                    saturation=(1 - saturation, 1 + saturation),
                    hue=(-hue, hue),
                    p=1.0,
                )
            ]
        )

    def __call__(self, photo: np.ndarray, mask: np.ndarray, surroundings: Surroundings, rng: np.random.Generator) -> Sample:
        size = photo.shape[0]
        product = run(self.warp, rng, photo, mask)
        kind = rng.integers(3)
        if kind == 0:
            canvas = surroundings.background(rng, size, (0.0, 0.0))
            if rng.random() < self.blur_share:
                canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(1, 4))
        else:
            canvas = np.full_like(photo, 255 if kind == 2 else rng.integers(0, 256, 3))
        picture = paste(canvas, product)
        return Sample(run(self.color, rng, picture).photo, product.mask)
