"""Keypoint detectors: the base class, cropping to the product, and SIFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from ..data.pictures import letterbox
from ..extraction.features import unit
from ..models.views import View, clamp_window, product_window

OVERSAMPLE = 2  # crops are taken from a picture of this many times the canvas, so that small products stay sharp
MIN_MASK_AREA = 0.005  # share of the picture; smaller masks are not trusted
THUMBNAIL = 64  # side in pixels; enough to show the differences between flavours of one brand


class Keypoints(NamedTuple):
    """`points`: float32 (K, 2), x and y on the canvas, pixels. `descriptors`: (K, D), uint8 for SIFT, int8 if learned."""

    points: np.ndarray
    descriptors: np.ndarray


class LocalFeatures(NamedTuple):
    """The keypoints of a picture, and a thumbnail of the canvas that they lie on.

    `thumbnail`: uint8 (THUMBNAIL, THUMBNAIL, 4), channels L*, a*, b* and the product mask (255 on the product).
    """

    keypoints: Keypoints
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Detector(ABC):
    """Detects the `most` strongest keypoints, or fewer, in pictures letterboxed to `size` x `size` pixels.

    `foreground`: keep only keypoints on the product. `closer`: crop to a square window around the product, with a side of
    this many times its longer side; None: use the whole picture.
    """

    size: int
    most: int
    foreground: bool = False
    closer: float | None = None

    @abstractmethod
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        """uint8 (S, S, 3), any S; `inside`: bool (S, S), where keypoints are allowed, used only with `foreground`."""

    def key(self) -> dict[str, Any]:
        """Plain values that the features depend on."""
        return asdict(self) | {"thumbnail": THUMBNAIL}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> LocalFeatures:
        canvas, inside = crop_to_product(rgb, mask, self.size, self.closer)
        return LocalFeatures(self(canvas, inside), make_thumbnail(canvas, inside))

    def pack(self, features: LocalFeatures) -> dict[str, np.ndarray]:
        return {**features.keypoints._asdict(), "thumbnail": features.thumbnail}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> LocalFeatures:
        return LocalFeatures(Keypoints(arrays["points"], arrays["descriptors"]), arrays["thumbnail"])


def crop_to_product(
    rgb: np.ndarray, mask: np.ndarray | None, size: int, closer: float | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Crop to a window of `closer` times the product's longer side; without a plausible mask, keep the whole picture.

    `rgb`: uint8 (H, W, 3). `mask`: of the letterboxed picture, uint8 (M, M), 255 on the product. Returns the canvas, uint8
    (size, size, 3), and where the product is, bool (size, size), or None if there is no mask or it is empty.
    """
    if mask is None or mask.max() <= 127:
        return letterbox(rgb, size), None
    if closer is not None and (window := find_window(mask, closer)) is not None:
        return _crop_window(clamp_window(window)[0].tolist(), letterbox(rgb, OVERSAMPLE * size), mask, size)
    return letterbox(rgb, size), cv2.resize(mask, (size, size), interpolation=cv2.INTER_LINEAR) > 127


def find_window(mask: np.ndarray, closer: float) -> torch.Tensor | None:
    """The `product_window` of a mask, uint8 (M, M): float (1, 3); None if the mask is not plausible."""
    saliency = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() / 255
    return product_window(saliency, closer) if View(closer=closer, least=MIN_MASK_AREA).trusts(saliency) else None


def make_thumbnail(canvas: np.ndarray, inside: np.ndarray | None) -> np.ndarray:
    """The thumbnail of LocalFeatures. `canvas`: uint8 (S, S, 3); `inside`: bool (S, S), None for everywhere."""
    product = np.full(canvas.shape[:2], 255, np.uint8) if inside is None else inside.astype(np.uint8) * 255
    rgb, small = (cv2.resize(part, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA) for part in (canvas, product))
    return np.dstack([cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB), small])


def _crop_window(window: list[float], rgb: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Crop a square picture and its mask to a window (see `product_window`): uint8 (size, size, 3), bool (size, size)."""
    side = max(1, round(window[2] * len(rgb)))
    left, top = (round((middle + 1 - window[2]) / 2 * len(rgb)) for middle in window[:2])
    mask = cv2.resize(mask, rgb.shape[:2], interpolation=cv2.INTER_LINEAR)
    method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    canvas, inside = (
        cv2.resize(part[top : top + side, left : left + side], (size, size), interpolation=method) for part in (rgb, mask)
    )
    return canvas, inside > 127


@dataclass(frozen=True)
class Sift(Detector):
    """SIFT. `contrast`: the contrast threshold, 0.04 by default as in OpenCV; smooth products need a lower one."""

    contrast: float = 0.04

    def key(self) -> dict[str, Any]:
        return super().key() | {"opencv": cv2.__version__}

    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        mask = inside.astype(np.uint8) if self.foreground and inside is not None else None
        sift = cv2.SIFT_create(nfeatures=self.most, contrastThreshold=self.contrast)  # type: ignore[attr-defined]
        detected, descriptors = sift.detectAndCompute(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), mask)
        if not detected:
            return Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
        points = np.array([point.pt for point in detected], np.float32)
        # OpenCV may return more than `most`, as a point can have several orientations. Its values are integers up to 255.
        return Keypoints(points[: self.most], descriptors[: self.most].astype(np.uint8))


def root_sift(descriptors: np.ndarray) -> np.ndarray:
    """RootSIFT (Arandjelovic & Zisserman, CVPR 2012): uint8 (K, 128) -> float32 (K, 128) of length 1.

    >>> root_sift(np.array([[9, 16, 0, 0]], np.uint8)).tolist()  # square roots of 9/25, 16/25
    [[0.6000000238418579, 0.800000011920929, 0.0, 0.0]]
    """
    values = descriptors.astype(np.float32)
    return np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1))


def quantize(descriptors: np.ndarray) -> np.ndarray:
    """Quantise to int8, a quarter of the size: float (K, D) -> int8 (K, D), each row scaled to a largest value of +-127."""
    largest = np.abs(descriptors).max(axis=1, keepdims=True, initial=1e-9)
    return np.round(descriptors * (127 / largest)).astype(np.int8)


def normalized_descriptors(keypoints: Keypoints) -> np.ndarray:
    """Descriptors for matching, float32 (K, D) of length 1: RootSIFT for SIFT, otherwise L2-normalised."""
    if keypoints.descriptors.dtype == np.uint8:
        return root_sift(keypoints.descriptors)
    return unit(keypoints.descriptors.astype(np.float32)).astype(np.float32)
