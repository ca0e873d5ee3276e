"""Classical descriptors of whole pictures, as poolings of the picture itself (`map: picture`), with or without its mask.

Every function takes `pictures`, uint8 (B, 3, S, S), and `weight`, float (B, 1, S, S) in 0..1 or None, and returns float32
(B, C). They run on the CPU, one picture at a time, by OpenCV, scikit-image and faiss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
import torch
from torch import Tensor

from ..data.images import Pictures
from ..data.pictures import UnreadablePicture, letterbox
from ..data.places import absolute
from ..extraction.features import unit
from ..extraction.members import Member
from ..extras import explain
from ..index.faiss_index import kmeans
from ..index.memory_index import save_npy
from ..manifest import digest, replace_file
from ..rerank.keypoints import Sift, root_sift

log = logging.getLogger("beauty_bafe")

LEARNED_FROM = 2000  # gallery pictures, evenly spread, that a vocabulary is learned from
CANVAS = 224  # their side, pixels


def _of_each_picture(describe: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """Make describe(rgb uint8 (S, S, 3), weight float32 (S, S) or None) a function of batches."""

    @torch.compiler.disable
    @wraps(describe)
    def of_batch(pictures: Tensor, weight: Tensor | None = None, **settings: float) -> Tensor:
        rgb = pictures.permute(0, 2, 3, 1).cpu().numpy()
        weights = [None] * len(rgb) if weight is None else weight[:, 0].float().cpu().numpy()
        rows = [describe(np.ascontiguousarray(picture), share, **settings) for picture, share in zip(rgb, weights, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(pictures.device)

    return of_batch


@_of_each_picture
def lab_histogram(rgb: np.ndarray, weight: np.ndarray | None, bins: int = 8) -> np.ndarray:
    """Joint CIE Lab histogram with `bins` per channel, square-rooted: inner products are Bhattacharyya coefficients.

    >>> white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    >>> vector = lab_histogram(white, bins=2)[0]
    >>> vector.tolist()  # all in one cell: light, a and b in the upper half
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB).astype(int) * bins // 256
    cell = (lab[..., 0] * bins + lab[..., 1]) * bins + lab[..., 2]
    return _root_histogram(cell, weight, bins**3)


@_of_each_picture
def lbp(rgb: np.ndarray, weight: np.ndarray | None, radii: Sequence[int] = (1, 2, 3)) -> np.ndarray:
    """Uniform, rotation-invariant local binary patterns of 8 neighbours at each radius (Ojala et al., TPAMI 2002).

    A histogram of the 10 patterns per radius, square-rooted.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    patterns = [_skimage().local_binary_pattern(grey, 8, radius, "uniform").astype(int) for radius in radii]
    return np.concatenate([_root_histogram(pattern, weight, 10) for pattern in patterns])


@_of_each_picture
def hog(rgb: np.ndarray, weight: np.ndarray | None, cells: int = 7, orientations: int = 9) -> np.ndarray:
    """Histograms of oriented gradients in `cells` x `cells` (Dalal & Triggs, CVPR 2005); with a weight, w x + (1 - w) white."""
    if weight is not None:
        rgb = (rgb * weight[..., None] + 255 * (1 - weight[..., None])).astype(np.uint8)
    side = rgb.shape[0] // cells
    return _skimage().hog(rgb, orientations, (side, side), (2, 2), channel_axis=-1)


def _skimage() -> Any:
    """scikit-image's features. Raises ImportError saying how to install it."""
    try:
        from skimage import feature
    except ImportError as error:
        raise ImportError(explain(error)) from error
    return feature


class Vlad:
    """VLAD of RootSIFT (Jegou et al., CVPR 2010; intra-normalised, Arandjelovic & Zisserman, CVPR 2013): (B, 128 `words`).

    For every visual word, the sum of the differences to it of the descriptors nearest to it, scaled to length 1. A weight
    multiplies each keypoint's difference. The vocabulary is learned from gallery pictures and kept beside their features.
    """

    def __init__(self, words: int, keypoints: int) -> None:
        self.words, self.keypoints = words, keypoints
        self.detector = Sift(CANVAS, keypoints)
        self.vocabulary: np.ndarray | None = None

    def __str__(self) -> str:
        learned = "none" if self.vocabulary is None else digest(self.vocabulary.tobytes())
        return f"vlad(words={self.words}, keypoints={self.keypoints}, vocabulary={learned})"

    @torch.compiler.disable
    def __call__(self, pictures: Tensor, weight: Tensor | None = None) -> Tensor:
        return _of_each_picture(self._describe)(pictures, weight)

    def _describe(self, rgb: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        if self.vocabulary is None:
            raise ValueError("VLAD has no vocabulary yet; build or open a gallery first, which learns it")
        points, sift = self.detector(rgb)
        total = np.zeros((self.words, 128), np.float32)
        if not len(points):
            return total.ravel()
        descriptors = root_sift(sift)
        nearest = (descriptors @ self.vocabulary.T - np.square(self.vocabulary).sum(axis=1) / 2).argmax(axis=1)
        shares = np.ones(len(points), np.float32)
        if weight is not None:
            x, y = np.minimum(points.astype(int), weight.shape[0] - 1).T
            shares = weight[y, x]
        np.add.at(total, nearest, (descriptors - self.vocabulary[nearest]) * shares[:, None])
        return unit(total).ravel()

    def fit(self, pictures: Pictures) -> None:
        """Cluster the RootSIFT descriptors of some of the pictures. Raises ValueError if there are too few."""
        found = []
        for row in np.unique(np.linspace(0, len(pictures) - 1, LEARNED_FROM).astype(int)):
            try:
                rgb = pictures.read(int(row), CANVAS).rgb
            except UnreadablePicture:
                continue  # reported when the gallery is described
            found.append(root_sift(self.detector(letterbox(rgb, CANVAS)).descriptors))
        descriptors = np.concatenate(found) if found else np.zeros((0, 128), np.float32)
        if len(descriptors) < self.words:
            raise ValueError(
                f"{len(descriptors)} SIFT descriptors in {len(found)} gallery pictures are too few for {self.words} words; "
                "lower pooling.function.words or leave VLAD out"
            )
        log.info(f"VLAD: learning {self.words} words from {len(descriptors)} descriptors of {len(found)} gallery pictures")
        self.vocabulary = kmeans(descriptors, self.words)

    def save(self, file: Path) -> None:
        replace_file(file, partial(save_npy, np.asarray(self.vocabulary)))

    def load(self, file: Path) -> None:
        self.vocabulary = np.load(file)


@runtime_checkable
class LearnedPooling(Protocol):
    """A pooling function that is learned from a gallery before it is used; an ensemble has the same three methods."""

    def fit(self, pictures: Pictures) -> Any: ...

    def save(self, file: Path) -> None: ...

    def load(self, file: Path) -> Any: ...


def load_or_fit(members: Sequence[Member], pictures: Pictures | None, source: str, kept: Path | None, features: Path) -> None:
    """Load what learned poolings need from `kept` or `features` if it was learned before, otherwise fit them to `pictures`.

    `source`: where the pictures come from, which identifies the file in `features`. A changed catalogue keeps what was
    learned, so that stored descriptors stay valid.
    """
    for number, pooling in enumerate(_learned(members)):
        file = features / f"vocabulary-{digest(str(pooling), absolute(source))}.npy"
        if kept is not None:
            file = _beside_index(kept, number)
        if file.is_file():
            pooling.load(file)
        elif pictures is not None:
            pooling.fit(pictures)
            file.parent.mkdir(parents=True, exist_ok=True)
            pooling.save(file)


def save_learned(members: Sequence[Member], folder: Path) -> None:
    """Write what poolings have learned beside an index, for later queries."""
    for number, pooling in enumerate(_learned(members)):
        pooling.save(_beside_index(folder, number))


def _learned(members: Sequence[Member]) -> list[LearnedPooling]:
    functions: list[object] = [member.pooling.function for member in members]
    return list(dict.fromkeys(function for function in functions if isinstance(function, LearnedPooling)))


def _beside_index(folder: Path, number: int) -> Path:
    return folder / f"vocabulary{number}.npy"


def _root_histogram(cell: np.ndarray, weight: np.ndarray | None, size: int) -> np.ndarray:
    counts = np.bincount(cell.ravel(), None if weight is None else weight.ravel(), size)
    return np.sqrt(counts / max(float(counts.sum()), 1e-12))
