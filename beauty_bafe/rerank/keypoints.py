"""Keypoints of pictures: what every detector gives, and SIFT."""

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

DETAIL = 2  # a closer look is cut from a picture of so many times the canvas, so that small products stay sharp
LEAST = 0.005  # share of the picture; a smaller mask must be wrong
THUMBNAIL = 64  # pixels; what differs between the flavours of one brand is larger


class Keypoints(NamedTuple):
    """`points`: float32 (K, 2), x and y on the canvas, pixels. `descriptors`: (K, D), SIFT's uint8, learned ones int8."""

    points: np.ndarray
    descriptors: np.ndarray


class Look(NamedTuple):
    """A picture as a detector sees it.

    `thumbnail`: uint8 (THUMBNAIL, THUMBNAIL, 4), L*, a* and b* of the canvas that the keypoints lie on, and 255 on the product.
    """

    keypoints: Keypoints
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Detector(ABC):
    """Finds at most `most` keypoints, the strongest, in pictures fitted into `size` x `size` pixels.

    `foreground`: those on the product alone. `closer`: the canvas shows a window of that many times the product's longer
    side, None for the whole picture.
    """

    size: int
    most: int
    foreground: bool = False
    closer: float | None = None

    @abstractmethod
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        """uint8 (S, S, 3), S any; `inside`: bool (S, S), where keypoints may lie, heeded with `foreground`."""

    def key(self) -> dict[str, Any]:
        """Plain values that its looks depend on."""
        return asdict(self) | {"thumbnail": THUMBNAIL}

    def look(self, rgb: np.ndarray, mask: np.ndarray | None) -> Look:
        canvas, inside = look_closer(rgb, mask, self.size, self.closer)
        return Look(self(canvas, inside), _thumbnail(canvas, inside))

    def pack(self, look: Look) -> dict[str, np.ndarray]:
        return {**look.keypoints._asdict(), "thumbnail": look.thumbnail}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> Look:
        return Look(Keypoints(arrays["points"], arrays["descriptors"]), arrays["thumbnail"])


def look_closer(
    rgb: np.ndarray, mask: np.ndarray | None, size: int, closer: float | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The window of `closer` times the product's longer side, or the whole picture without a mask that can be trusted.

    uint8 (H, W, 3) and `mask`, uint8 (M, M), 255 on the product, of the letterboxed picture -> uint8 (size, size, 3) and
    where the product is, bool (size, size), None without a mask or where it is empty.
    """
    if mask is None or mask.max() <= 127:
        return letterbox(rgb, size), None
    if closer is not None:
        saliency = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() / 255
        if View(closer=closer, least=LEAST).trusts(saliency):
            window = clamp_window(product_window(saliency, closer))[0].tolist()
            return _look_through(window, letterbox(rgb, DETAIL * size), mask, size)
    return letterbox(rgb, size), cv2.resize(mask, (size, size), interpolation=cv2.INTER_LINEAR) > 127


def _thumbnail(canvas: np.ndarray, inside: np.ndarray | None) -> np.ndarray:
    product = np.full(canvas.shape[:2], 255, np.uint8) if inside is None else inside.astype(np.uint8) * 255
    rgb, small = (cv2.resize(part, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA) for part in (canvas, product))
    return np.dstack([cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB), small])


def _look_through(window: list[float], rgb: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What a window (see `product_window`) shows of a square picture and of its mask: uint8 (S, S, 3), bool (S, S)."""
    side = max(1, round(window[2] * len(rgb)))
    left, top = (round((middle + 1 - window[2]) / 2 * len(rgb)) for middle in window[:2])
    mask = cv2.resize(mask, rgb.shape[:2], interpolation=cv2.INTER_LINEAR)
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    seen, inside = (
        cv2.resize(part[top : top + side, left : left + side], (size, size), interpolation=how) for part in (rgb, mask)
    )
    return seen, inside > 127


@dataclass(frozen=True)
class Sift(Detector):
    """SIFT. `contrast`: Lowe's threshold, 0.04 as OpenCV has it; smooth products need less."""

    contrast: float = 0.04

    def key(self) -> dict[str, Any]:
        return super().key() | {"opencv": cv2.__version__}

    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        mask = inside.astype(np.uint8) if self.foreground and inside is not None else None
        sift = cv2.SIFT_create(nfeatures=self.most, contrastThreshold=self.contrast)  # type: ignore[attr-defined]
        found, descriptors = sift.detectAndCompute(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), mask)
        if not found:
            return Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
        points = np.array([point.pt for point in found], np.float32)
        # Several orientations of the last point can go beyond `most`. OpenCV's values are whole numbers up to 255.
        return Keypoints(points[: self.most], descriptors[: self.most].astype(np.uint8))


def root_sift(descriptors: np.ndarray) -> np.ndarray:
    """RootSIFT (Arandjelovic & Zisserman, CVPR 2012): uint8 (K, 128) -> float32 (K, 128) of length 1.

    >>> root_sift(np.array([[9, 16, 0, 0]], np.uint8)).tolist()  # square roots of 9/25, 16/25
    [[0.6000000238418579, 0.800000011920929, 0.0, 0.0]]
    """
    values = descriptors.astype(np.float32)
    return np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1))


def to_bytes(descriptors: np.ndarray) -> np.ndarray:
    """Directions in a quarter of the space: float (K, D) -> int8 (K, D), the largest value of each row 127 or -127."""
    largest = np.abs(descriptors).max(axis=1, keepdims=True, initial=1e-9)
    return np.round(descriptors * (127 / largest)).astype(np.int8)


def compare_by(keypoints: Keypoints) -> np.ndarray:
    """What to compare them by, float32 (K, D) of length 1: SIFT's histograms as RootSIFT, learned descriptors as they are."""
    if keypoints.descriptors.dtype == np.uint8:
        return root_sift(keypoints.descriptors)
    return unit(keypoints.descriptors.astype(np.float32)).astype(np.float32)
