"""Small queries are compared with copies of the gallery's photos that are about as small, and compressed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import cv2
import numpy as np

from ..data.workers import default_workers, one_opencv_thread
from ..extraction.features import unit
from .candidates import Candidates, PictureDescriber, check_depth, similarity_of, with_depth
from .keypoints import find_window
from .local_features import LocalExtractor, open_features

T = TypeVar("T")

# Chosen on photographs of cartons that were made small (benchmarks/small.md).
SIDES = (128, 80)  # of the product in the copies that are described, pixels
KEYPOINT_SIDE = 128  # of the product in the copy whose keypoints are matched
BLUR = 0.6  # standard deviation in pixels of the copy
QUALITY = 60  # of the copy as a JPEG file
VERSION = 1  # increase it when the same photo gives another copy
BLOCK = 256  # queries whose candidates' descriptors are in memory at once


def product_share(mask: np.ndarray | None) -> float:
    """The longer side of the product as a share of the picture's, 0 to 1; 1 without a plausible mask.

    `mask`: of the letterboxed picture, uint8 (M, M), 255 on the product, or None.
    """
    window = None if mask is None else find_window(mask, 1.0)
    return 1.0 if window is None else min(1.0, float(window[0, 2]))


def small_copy(rgb: np.ndarray, mask: np.ndarray | None, side: int) -> np.ndarray:
    """A copy in which the product's longer side has at most `side` pixels: uint8 (h, w, 3). It is never enlarged.

    Like small pictures in messages or frames of a video, it is compressed (JPEG) and, if it is shrunk, slightly blurred.
    `rgb`: uint8 (H, W, 3). `mask`: see `product_share`.
    """
    scale = side / (product_share(mask) * max(rgb.shape[:2]))
    if scale < 1:
        size = [max(1, round(extent * scale)) for extent in rgb.shape[1::-1]]
        rgb = cv2.resize(cv2.GaussianBlur(rgb, (0, 0), BLUR / scale), size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))


@dataclass(frozen=True)
class SmallCopyExtractor(Generic[T]):
    """A LocalExtractor that applies `extractor` to the `small_copy` of a picture."""

    extractor: LocalExtractor[T]
    side: int = KEYPOINT_SIDE

    @property
    def size(self) -> int:
        return self.extractor.size

    def key(self) -> dict[str, Any]:
        name = type(self.extractor).__name__
        return self.extractor.key() | {"extractor": name, "sides": str(self.side), **_copy_key()}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> T:
        return self.extractor.extract(small_copy(rgb, mask, self.side), mask)

    def pack(self, features: T) -> dict[str, np.ndarray]:
        return self.extractor.pack(features)

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> T:
        return self.extractor.unpack(arrays)


@dataclass(frozen=True)
class CopyDescriptors:
    """A LocalExtractor of the descriptors of a picture's small copies: one array (len(SIDES), D) per member."""

    about: str
    describe: PictureDescriber = field(compare=False)

    @property
    def size(self) -> int:
        return self.describe.size

    def key(self) -> dict[str, Any]:
        return {"about": self.about, "size": self.size, "sides": str(SIDES), **_copy_key()}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> list[np.ndarray]:
        return self.describe([small_copy(rgb, mask, side) for side in SIDES])

    def pack(self, features: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {f"{number}": vectors.astype(np.float16) for number, vectors in enumerate(features)}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [arrays[name].astype(np.float32) for name in sorted(arrays, key=int)]


@dataclass(frozen=True)
class SmallCopies:
    """Compare small queries with small copies of the gallery's photos; all others keep their answers.

    A query is small if its product's longer side has fewer than `below` pixels. Its first `depth` candidates are sorted by
    the cosine between the query and the mean descriptor of the photo and of its copies, in which the product has SIDES
    pixels; the others follow. Verification then matches keypoints with those of a copy; other steps use the photo. Copies are
    described when they are first needed, and then cached.

    Raises ValueError for a depth or `below` under 1, if it is not the first step, or if the gallery's pictures are not files.
    """

    depth: int
    below: int

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if self.below < 1:
            raise ValueError(f"small_copies.below={self.below}: type a side in pixels, 1 or more, or leave out small_copies")

    def __call__(self, candidates: Candidates) -> Candidates:
        if candidates.rescored:
            raise ValueError("small_copies must be the first step, as in rerank=[small_copies,sift_verified]")
        candidates = with_depth(candidates, self.depth)
        ranking = candidates.ranking
        # The same whichever other queries are in the batch.
        scores, positions = similarity_of(candidates, ranking.positions.shape[1]).copy(), ranking.positions.copy()
        with ThreadPoolExecutor(default_workers()) as threads:
            small = self._find_small(candidates, threads)
            rows = np.flatnonzero(small)
            for start in range(0, len(rows), BLOCK):
                some = rows[start : start + BLOCK]
                found = self._compare(candidates.take(some), threads)
                order = np.argsort(-found, axis=1, kind="stable")
                first = slice(0, found.shape[1])
                positions[some, first] = np.take_along_axis(positions[some, first], order, axis=1)
                scores[some, first] = np.take_along_axis(found, order, axis=1)
        scores = np.minimum.accumulate(scores, axis=1)
        return replace(candidates, ranking=replace(ranking, positions=positions, scores=scores), rescored=True, small=small)

    def _find_small(self, candidates: Candidates, threads: ThreadPoolExecutor) -> np.ndarray:
        """Whether each query is small, bool (Q,)."""
        context, masks = candidates.needed_context, candidates.queries.masks
        number = {name: row for row, name in enumerate(context.queries.ids)}

        def is_small(row: int) -> bool:
            share = product_share(None if masks is None else masks[row])
            # Decoded at a fraction of its size only if the product is still larger than the limit.
            rgb = context.queries.read(number[candidates.ranking.query_ids[row]], math.ceil(self.below / share)).rgb
            return share * max(rgb.shape[:2]) < self.below

        with one_opencv_thread:
            return np.array(list(threads.map(is_small, range(len(candidates.ranking.query_ids)))), bool)

    def _compare(self, candidates: Candidates, threads: ThreadPoolExecutor) -> np.ndarray:
        """The new similarity of each query's first candidates, float32 (Q, depth)."""
        context, ranking = candidates.needed_context, candidates.ranking
        if context.describe is None:
            raise ValueError(
                "small_copies needs the networks that described the gallery; search with Gallery.answer or Retriever, which "
                "pass them on"
            )
        positions = ranking.positions[:, : self.depth]
        unique, place = np.unique(positions, return_inverse=True)
        names = [ranking.gallery_ids[position] for position in unique]
        extractor = CopyDescriptors(context.describe.about, context.describe)
        described = map(open_features(context, extractor).load(names, threads), names)
        members = [np.concatenate(parts) for parts in zip(*described, strict=True)]
        copies = unit(context.describe.combine(members)).reshape(len(names), len(SIDES), -1).sum(axis=1)
        mean = unit(unit(candidates.vectors(self.depth)) + copies[place.reshape(positions.shape)])
        return np.einsum("qd,qkd->qk", unit(candidates.queries.vectors), mean).astype(np.float32)


def _copy_key() -> dict[str, Any]:
    return {"blur": BLUR, "quality": QUALITY, "copy": VERSION, "opencv": cv2.__version__}
