"""Street views: phone photos from a street or a shop."""

from __future__ import annotations

from collections.abc import Mapping

import albumentations as A
import cv2
import numpy as np

from ..backgrounds import procedural_background, random_color
from .base import Sample, Surroundings, affine, paste, run
from .camera import glare, jpeg, low_resolution, motion_blur, sensor_noise, sharpen, tone_curve, white_balance
from .hands import paste_in_hand
from .shelves import draw_shelf
from .solids import as_solid

# In the order of a phone's image pipeline; the probabilities are in conf/augmentation/street.yaml.
CAMERA = {
    "motion": motion_blur,
    "white_balance": white_balance,
    "tone": tone_curve,
    "noise": sensor_noise,
    "low_resolution": low_resolution,
    "sharpen": sharpen,
    "jpeg": jpeg,
}


class StreetAugmentation:
    """Simulates phone photos from a street or a shop: rotated products, hands, shelves, lighting and camera effects.

    Probabilities and ranges are set in conf/augmentation/street.yaml; `scale` is the factor on the catalogue photo,
    `turn` the maximum rotation in degrees to either side, `zoom` the visible share of a background photograph.
    Raises ValueError for shares and probabilities outside 0..1 and for a key of `camera` that is unknown or missing.
    """

    def __init__(
        self,
        scale: tuple[float, float],
        shift: float,
        turn: float,
        perspective: float,
        solid: float,
        hand: float,
        zoom: tuple[float, float],
        holes: float,
        shelf: float,
        photo_share: float,
        clutter: float,
        occlusion: float,
        shadow: float,
        light: float,
        bars: float,
        camera: Mapping[str, float],
    ) -> None:
        self.zoom = (zoom[0], zoom[1])
        self.holes, self.photo_share = holes, photo_share
        self.solid, self.hand, self.shelf = solid, hand, shelf
        unknown = sorted(camera.keys() ^ {*CAMERA, "glare", "colour", "defocus"})
        if unknown:
            raise ValueError(
                f"augmentation.camera has an unknown or missing key '{unknown[0]}'; "
                f"its keys are exactly glare, colour, defocus, {', '.join(CAMERA)}"
            )
        shares = {"solid": solid, "hand": hand, "holes": holes, "shelf": shelf, "photo_share": photo_share}
        shares |= {"clutter": clutter, "occlusion": occlusion, "shadow": shadow, "light": light, "bars": bars}
        for key, share in (shares | {f"camera.{name}": share for name, share in camera.items()}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"augmentation.{key}={share}: type a share from 0 to 1")
        self.camera = dict(camera)
        self.clutter, self.occlusion = clutter, occlusion
        self.shadow, self.light, self.bars = shadow, light, bars
        self.warp = A.Compose(
            [
                # fit_output keeps the whole product in view; without it the warp would crop its sides.
                A.Perspective(scale=(0.02, perspective), fit_output=True, fill=255, mask_interpolation=cv2.INTER_LINEAR, p=0.6),
                affine(rotate=(-turn, turn), scale=tuple(scale), translate_percent=(-shift, shift), shear=(-8, 8)),
            ]
        )
        self.small_warp = A.Compose(
            [affine(rotate=(-180, 180), scale=(0.15, 0.4), translate_percent=(-0.45, 0.45), shear=(-8, 8))]
        )
        self.product_color = A.Compose([A.RandomBrightnessContrast(0.2, 0.2, p=0.6), A.RandomGamma((75, 130), p=0.3)])
        self.colour = A.Compose(
            [A.ColorJitter(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.7, 1.3), hue=(-0.04, 0.04), p=1.0)]
        )
        self.defocus = A.Compose([A.OneOf([A.GaussianBlur(sigma_limit=(0.4, 2.0)), A.Defocus(radius=(1, 3))], p=1.0)])

    def __call__(self, photo: np.ndarray, mask: np.ndarray, surroundings: Surroundings, rng: np.random.Generator) -> Sample:
        canvas = self._background(photo.shape[0], surroundings, rng)
        for _ in range(int(rng.integers(1, 4)) if rng.random() < self.clutter else 0):
            canvas = self._paste_shaded(canvas, run(self.small_warp, rng, *surroundings.product(rng)), rng)

        # A catalogue photo's edge is mixed with its white backdrop; eroding it avoids a halo.
        cut = cv2.erode(mask, np.ones((3, 3), np.uint8)) if rng.random() < 0.5 else mask
        photo, cut = as_solid(photo, cut, rng) if rng.random() < self.solid else Sample(photo, cut)
        warped = run(self.warp, rng, photo, cut)
        product = Sample(run(self.product_color, rng, warped.photo).photo, warped.mask)
        if rng.random() < self.camera["glare"]:
            product = Sample(glare(*product, rng), product.mask)
        if rng.random() < self.hand:
            canvas, mask = paste_in_hand(canvas, product, rng)
        else:
            canvas, mask = self._paste_shaded(canvas, product, rng), product.mask

        if rng.random() < self.occlusion:
            canvas, mask = self._occlude(canvas, mask, surroundings, rng)
        if rng.random() < self.light:
            canvas = _tilt_light(canvas, rng)
        canvas = self._photograph(canvas, rng)
        if rng.random() < self.bars:
            canvas, mask = _letterbox_bars(canvas, mask, rng)
        return Sample(canvas, mask)

    def _photograph(self, canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Effects of lens, sensor and software, in this order."""
        if rng.random() < self.camera["colour"]:
            canvas = run(self.colour, rng, canvas).photo
        if rng.random() < self.camera["defocus"]:
            canvas = run(self.defocus, rng, canvas).photo
        for name, step in CAMERA.items():
            if rng.random() < self.camera[name]:
                canvas = step(canvas, rng)
        return canvas

    def _background(self, size: int, surroundings: Surroundings, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.shelf:
            return draw_shelf(size, surroundings, rng)
        kind = rng.random()
        if kind < self.photo_share:
            canvas = surroundings.background(rng, size, self.zoom)
        elif kind < self.photo_share + 0.75 * (1 - self.photo_share):
            canvas = procedural_background(rng, size)
        else:
            canvas = np.full((size, size, 3), random_color(rng), np.uint8)
        if rng.random() < 0.5:
            canvas = np.ascontiguousarray(np.rot90(canvas, int(rng.integers(4))))
        if rng.random() < 0.25:
            canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 3))
        return canvas

    def _paste_shaded(self, canvas: np.ndarray, product: Sample, rng: np.random.Generator) -> np.ndarray:
        """Paste, sometimes with a soft shadow to one side."""
        if rng.random() < self.shadow:
            size = canvas.shape[0]
            dx, dy = rng.integers(-size // 16, size // 16 + 1, 2).tolist()
            # At a quarter of the size, as blurring removes finer detail and is the slowest step here.
            small = cv2.resize(product.mask, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
            shift = np.array([[1, 0, dx / 4], [0, 1, dy / 4]], np.float32)
            soft = cv2.GaussianBlur(cv2.warpAffine(small, shift, small.shape[::-1]), (0, 0), rng.uniform(0.01, 0.05) * size / 4)
            keep = cv2.resize(255 - cv2.convertScaleAbs(soft, alpha=rng.uniform(0.2, 0.7)), (size, size))
            canvas = cv2.multiply(canvas, cv2.merge([keep] * 3), scale=1 / 255)
        return paste(canvas, product)

    def _occlude(
        self, canvas: np.ndarray, mask: np.ndarray, surroundings: Surroundings, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cover part of the product with another product or a plain shape, unless that would hide over 40 % of it."""
        size = canvas.shape[0]
        if rng.random() < 0.5:
            cover = run(self.small_warp, rng, *surroundings.product(rng))
        else:
            shape = np.zeros((size, size), np.uint8)
            centre = rng.integers(0, size, 2).tolist()
            axes = (int(size * rng.uniform(0.05, 0.3)), int(size * rng.uniform(0.03, 0.1)))
            cv2.ellipse(shape, centre, axes, float(rng.integers(180)), 0, 360, 255, -1, cv2.LINE_AA)
            cover = Sample(np.full_like(canvas, random_color(rng)), shape)
        visible = (mask.astype(np.uint16) * (255 - cover.mask) // 255).astype(np.uint8)
        if visible.sum(dtype=np.int64) < 0.6 * mask.sum(dtype=np.int64):
            return canvas, mask
        return paste(canvas, cover), visible


def _tilt_light(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brighter towards one corner, darker towards the opposite one."""
    gains = rng.uniform(0.55, 1.3, (2, 2)).astype(np.float32)
    field = cv2.resize(gains, canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return np.clip(canvas * field[..., None], 0, 255).astype(np.uint8)


def _letterbox_bars(canvas: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """White bars on two sides, as in a letterboxed photo that is not square."""
    size = canvas.shape[0]
    inner = int(size * rng.uniform(0.55, 0.9))
    start, axis = (size - inner) // 2, int(rng.integers(2))
    outside = np.ones(size, bool)
    outside[start : start + inner] = False
    canvas, mask = canvas.copy(), mask.copy()
    window = (slice(None), outside) if axis else (outside, slice(None))
    canvas[window] = 255
    mask[window] = 0
    return canvas, mask
