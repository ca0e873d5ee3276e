"""Dense verification: a trained network compares the aligned pictures of a query and its first candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from ..manifest import digest
from ..models.backbones import read_state
from ..models.precision import fastest_precision, pick_device
from .alignment import align_by_appearance, rescale
from .candidates import Candidates
from .evidence import EvidenceReranker
from .keypoints import Detector, Keypoints, crop_to_product
from .local_features import score_candidates
from .matching import Matcher, fit_geometry
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


def pair_up(query: Canvas, candidates: Sequence[Canvas], matcher: Matcher, size: int) -> list[Pair]:
    """Align a query with each candidate, by keypoints or else by appearance. `size`: side of the keypoints' canvas, pixels."""
    matches = matcher(query.keypoints, [candidate.keypoints for candidate in candidates], size)
    by_appearance = align_by_appearance(query.pixels, [candidate.pixels for candidate in candidates])
    pairs = []
    for candidate, (rows, columns), matrix in zip(candidates, matches, by_appearance, strict=True):
        geometry = fit_geometry(query.keypoints.points[rows], candidate.keypoints.points[columns])
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


@dataclass(frozen=True)
class DenseVerification(EvidenceReranker):
    """Score each query's first candidates by similarity + weight x agreement: the logit of a PairNetwork, LOWEST to HIGHEST.

    Only the first `compared` candidates are compared; the others have the lowest agreement of these. `network`: FILE written
    by `beauty-bafe verifier`. Raises ValueError if it is missing or of another network.
    """

    detector: Detector
    matcher: Matcher
    compared: int
    network: str | None = None
    kinds = ("agreement",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compared < 1:
            raise ValueError(f"compared={self.compared}: type how many of each query's first candidates to compare, 1 or more")
        if self.network is None:
            raise ValueError(
                "rerank.dense_verified.network=null: type the FILE that beauty-bafe verifier wrote, as in "
                "rerank.dense_verified.network=VERIFIER/verifier.safetensors"
            )
        if not Path(self.network).is_file():
            raise ValueError(f"rerank.dense_verified.network='{self.network}' is not a file; beauty-bafe verifier writes one")
        _ = self._network

    @cached_property
    def source(self) -> str:
        """A hash of the network, see `build_parts`."""
        return digest(Path(str(self.network)).read_bytes())

    @cached_property
    def _network(self) -> PairNetwork:
        return load_pair_network(str(self.network), self.source).to(pick_device("auto"))

    def evidence(self, candidates: Candidates) -> np.ndarray:
        return score_candidates(candidates, self.depth, CanvasExtractor(self.detector), self._score)

    def _score(self, query: Canvas, candidates: Sequence[Canvas]) -> np.ndarray:
        pairs = pair_up(query, candidates[: self.compared], self.matcher, self.detector.size)
        agreement = score_pairs(self._network, pairs).clip(LOWEST, HIGHEST)
        return np.pad(agreement, (0, len(candidates) - len(pairs)), constant_values=agreement.min())[:, None]


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

    Raises ValueError if the file holds another network.
    """
    network = PairNetwork(pretrained=False)
    try:
        network.load_state_dict(read_state(Path(file)))
    except RuntimeError as error:
        raise ValueError(
            f"'{file}' holds another network ({str(error).splitlines()[-1].strip()[:200]}); type a file that beauty-bafe "
            "verifier wrote"
        ) from error
    return network.eval()
