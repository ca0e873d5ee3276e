"""Small queries: compared with copies of the gallery's photos that are as small, and compressed as small pictures are."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import cv2
import numpy as np
import torch

from ..data.workers import default_workers
from ..extraction.features import unit
from ..models.views import product_window
from .candidates import Candidates, PictureDescriber, check_depth, reorder, similarity_of, with_depth
from .local_features import LocalExtractor, open_features

T = TypeVar("T")

# Chosen on photographs of cartons that were made small (benchmarks/real.md, "Small pictures").
SIDES = (128, 80)  # of the product in the copies that are described, pixels
KEYPOINT_SIDE = 128  # of the product in the copy whose keypoints are matched
BLUR = 0.6  # standard deviation in pixels of the copy
QUALITY = 60  # of the copy as a JPEG file
BLOCK = 256  # queries whose candidates' descriptors are in memory at once


def product_side(rgb: np.ndarray, mask: np.ndarray | None) -> float:
    """The longer side of the product in pixels; of the picture if `mask` is None or empty.

    `rgb`: uint8 (H, W, 3). `mask`: of the letterboxed picture, uint8 (M, M), 255 on the product.
    """
    longer = float(max(rgb.shape[:2]))
    if mask is None or mask.max() <= 127:
        return longer
    saliency = torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() / 255
    return longer * min(1.0, float(product_window(saliency, 1.0)[0, 2]))


def small_copy(rgb: np.ndarray, mask: np.ndarray | None, side: int) -> np.ndarray:
    """A copy in which the product's longer side has `side` pixels, or fewer if it has fewer in `rgb`: uint8 (h, w, 3).

    It is blurred, shrunk and compressed as JPEG, like small pictures in messages or frames of a video. See `product_side`.
    """
    scale = side / product_side(rgb, mask)
    if scale < 1:
        size = [max(1, round(extent * scale)) for extent in rgb.shape[1::-1]]
        rgb = cv2.resize(cv2.GaussianBlur(rgb, (0, 0), BLUR / scale), size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))


@dataclass(frozen=True)
class OfSmallCopy(Generic[T]):
    """A LocalExtractor that extracts from the `small_copy` of a picture what `extractor` extracts from the picture."""

    extractor: LocalExtractor[T]
    side: int = KEYPOINT_SIDE

    @property
    def size(self) -> int:
        return self.extractor.size

    def key(self) -> dict[str, Any]:
        name = type(self.extractor).__name__
        return self.extractor.key() | {"extractor": name, "copy": self.side, "blur": BLUR, "quality": QUALITY}

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
    size: int
    describe: PictureDescriber = field(compare=False)

    def key(self) -> dict[str, Any]:
        return {"about": self.about, "sides": str(SIDES), "size": self.size, "blur": BLUR, "quality": QUALITY}

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
    the cosine to the mean of three descriptors: of the photo and of its copies with products of SIDES pixels. Later steps
    match keypoints with a copy too (Verification). Copies are described when they are first needed, and then cached.

    Raises ValueError for a depth or side below 1, after another re-ranking, or if the gallery's pictures are not files.
    """

    depth: int
    below: int

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if self.below < 1:
            raise ValueError(f"below={self.below}: type a side in pixels, 1 or more, or leave out small_copies")

    def __call__(self, candidates: Candidates) -> Candidates:
        if candidates.rescored:
            raise ValueError("small_copies replaces the scores; type it first, as in rerank=[small_copies,sift_verified]")
        candidates = with_depth(candidates, self.depth)
        with ThreadPoolExecutor(default_workers()) as threads:
            small = self._find_small(candidates, threads)
            candidates, rows = replace(candidates, small=small), np.flatnonzero(small)
            if not len(rows):
                return candidates
            similarity = similarity_of(candidates, self.depth).copy()
            for start in range(0, len(rows), BLOCK):
                some = rows[start : start + BLOCK]
                similarity[some] = self._compare(candidates.take(some), threads)
        return reorder(candidates, similarity)

    def _find_small(self, candidates: Candidates, threads: ThreadPoolExecutor) -> np.ndarray:
        """Whether each query is small, bool (Q,)."""
        context, masks = candidates.needed_context, candidates.queries.masks
        number = {name: row for row, name in enumerate(context.queries.ids)}

        def find_side(row: int) -> float:
            # Large pictures are decoded at a fraction of their size, which is still over twice the limit.
            rgb = context.queries.read(number[candidates.ranking.query_ids[row]], self.below).rgb
            return product_side(rgb, None if masks is None else masks[row])

        return np.array(list(threads.map(find_side, range(len(candidates.ranking.query_ids))))) < self.below

    def _compare(self, candidates: Candidates, threads: ThreadPoolExecutor) -> np.ndarray:
        """The new similarity of each query's first candidates, float (Q, depth)."""
        context, ranking = candidates.needed_context, candidates.ranking
        if context.describe is None:
            raise ValueError("small_copies needs the networks that described the gallery; search it as a Gallery or Retriever")
        positions = ranking.positions[:, : self.depth]
        unique, place = np.unique(positions, return_inverse=True)
        names = [ranking.gallery_ids[position] for position in unique]
        extractor = CopyDescriptors(context.describe.about, context.describe.size, context.describe)
        described = map(open_features(context, extractor).load(names, threads), names)
        members = [unit(np.concatenate(parts)) for parts in zip(*described, strict=True)]
        copies = unit(context.describe.combine(members)).reshape(len(names), len(SIDES), -1).sum(axis=1)
        mean = unit(unit(candidates.vectors(self.depth)) + copies[place.reshape(positions.shape)])
        return np.einsum("qd,qkd->qk", unit(candidates.queries.vectors), mean)
