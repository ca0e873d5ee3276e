"""The pictures of a query and its candidates, aligned and compared by a trained network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ..models.backbones import read_state
from ..models.precision import fastest_precision
from .alignment import align_by_appearance, rescale
from .keypoints import Detector, Keypoints, crop_to_product, make_thumbnail
from .matching import Geometry
from .pair_network import SIDE, PairNetwork, stack_pictures

# Of the logits. The lowest is close to undecided: a photograph may show a side of the package that the catalogue does not,
# which is little evidence against it (benchmarks/real.md).
LOWEST, HIGHEST = -1.0, 8.0


class Canvas(NamedTuple):
    """The keypoints of a picture, and a small copy of the canvas that they lie on.

    `pixels`: uint8 (SIDE, SIDE, 4), RGB and the mask of the product (255 everywhere if there is none).
    """

    keypoints: Keypoints
    pixels: np.ndarray

    @property
    def thumbnail(self) -> np.ndarray:
        """See LocalFeatures."""
        return make_thumbnail(self.pixels[..., :3], self.pixels[..., 3] > 127)


@dataclass(frozen=True)
class CanvasExtractor:
    """A LocalExtractor of Canvas."""

    detector: Detector

    @property
    def size(self) -> int:
        return self.detector.size

    def key(self) -> dict[str, Any]:
        return self.detector.key() | {"canvas": SIDE}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> Canvas:
        canvas, inside = crop_to_product(rgb, mask, self.size, self.detector.closer)
        product = np.full(canvas.shape[:2], 255, np.uint8) if inside is None else inside.astype(np.uint8) * 255
        small, shape = (cv2.resize(part, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for part in (canvas, product))
        return Canvas(self.detector(canvas, inside), np.dstack([small, shape]))

    def pack(self, features: Canvas) -> dict[str, np.ndarray]:
        png = cv2.imencode(".png", features.pixels)[1].ravel()  # a quarter of the size
        return {**features.keypoints._asdict(), "png": png}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> Canvas:
        pixels = cv2.imdecode(np.ascontiguousarray(arrays["png"]), cv2.IMREAD_UNCHANGED)
        assert pixels is not None
        return Canvas(Keypoints(arrays["points"], arrays["descriptors"]), pixels)


class Pair(NamedTuple):
    """A query and one of its candidates, for PairNetwork.

    `query`, `candidate`: uint8 (SIDE, SIDE, 4). `matrix`: float64 (3, 3), from the query's pixels to the candidate's.
    `inliers`: log(1 + inliers), 0 if keypoints did not determine the alignment.
    """

    query: np.ndarray
    candidate: np.ndarray
    matrix: np.ndarray
    inliers: float


def pair_up(query: Canvas, candidates: Sequence[Canvas], geometries: Sequence[Geometry | None], size: int) -> list[Pair]:
    """Align a query with each candidate, by the geometry of their keypoints or else by appearance.

    `geometries`: see `fit_geometries`. `size`: side of the keypoints' canvas, pixels.
    """
    by_appearance = align_by_appearance(query.pixels, [candidate.pixels for candidate in candidates])
    pairs = []
    for candidate, geometry, matrix in zip(candidates, geometries, by_appearance, strict=True):
        if geometry is None:
            pairs.append(Pair(query.pixels, candidate.pixels, matrix, 0.0))
        else:
            aligned = rescale(geometry.matrix, SIDE / size)
            pairs.append(Pair(query.pixels, candidate.pixels, aligned, float(np.log1p(geometry.inliers))))
    return pairs


def stack_pairs(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs of PairNetwork, the queries warped onto their candidates."""
    warped = [cv2.warpPerspective(pair.query, pair.matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR) for pair in pairs]
    inliers = torch.tensor([pair.inliers for pair in pairs], dtype=torch.float32)
    return stack_pictures(warped), stack_pictures([pair.candidate for pair in pairs]), inliers, inliers > 0


def compare_pictures(
    network: PairNetwork,
    query: Canvas,
    candidates: Sequence[Canvas],
    geometries: Sequence[Geometry | None],
    size: int,
    most: int,
) -> np.ndarray:
    """The logits of a query and its candidates, float (k,), LOWEST to HIGHEST.

    Only `most` candidates are compared: first the `most // 2` with the most inliers, then the others in their order. Those
    that are not compared get the lowest logit of those that are. `geometries`, `size`: see `pair_up`.
    """
    inliers = np.array([0 if geometry is None else geometry.inliers for geometry in geometries])
    matched = np.argsort(-inliers, kind="stable")[: most // 2]
    rows = np.concatenate([matched, np.setdiff1d(np.arange(len(inliers)), matched)])[:most]
    pairs = pair_up(query, [candidates[row] for row in rows], [geometries[row] for row in rows], size)
    found = score_pairs(network, pairs).clip(LOWEST, HIGHEST)
    logits = np.full(len(candidates), found.min())
    logits[rows] = found
    return logits


@torch.inference_mode()
def score_pairs(network: PairNetwork, pairs: Sequence[Pair]) -> np.ndarray:
    """The logits of pairs, float32 (B,)."""
    device = network.distances.device
    half = fastest_precision(device.type) == "bf16-mixed"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        logits = network(*(part.to(device) for part in stack_pairs(pairs)))
    return logits.float().cpu().numpy()


@lru_cache(maxsize=4)
def load_pair_network(file: str, _content: str) -> PairNetwork:
    """Read a network for inference; the same object for the same `_content`, a hash of the file.

    Raises ValueError if the file holds something else.
    """
    network = PairNetwork(pretrained=False)
    try:
        network.load_state_dict(read_state(Path(file)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"network='{file}' holds no such network ({' '.join(str(error).split())[:160]}); type network=FILE with a file "
            "that beauty-bafe verifier wrote"
        ) from error
    return network.eval()
