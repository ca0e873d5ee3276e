"""Re-ranking by keypoints: the hybrid paper's count of matches, and geometric verification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..index.ranking import Evidence
from ..manifest import digest
from ..models.precision import pick_device
from .appearance import APPEARANCE, compare_appearance, contrast_candidates
from .candidates import Candidates, check_depth, reorder, with_depth
from .dense import Canvas, CanvasExtractor, compare_pictures, load_pair_network
from .evidence import EvidenceReranker
from .keypoints import Detector, LocalFeatures
from .local_features import score_candidates
from .matching import Geometry, Matcher, count_matches, fit_geometries
from .pair_network import PairNetwork
from .small_copies import SmallCopyExtractor


@dataclass(frozen=True)
class MatchCount:
    """Sort each query's first `depth` candidates by the number of SIFT matches, ties by their distance (the hybrid paper).

    Candidates without a match keep their order, after the others. Raises ValueError for a depth below 1.
    """

    depth: int
    ratio: float
    detector: Detector

    def __post_init__(self) -> None:
        check_depth(self.depth)

    def __call__(self, candidates: Candidates) -> Candidates:
        candidates = with_depth(candidates, self.depth)
        return reorder(candidates, score_candidates(candidates, self.depth, self.detector, self._score)[..., 0])

    def _score(self, query: LocalFeatures, candidates: Sequence[LocalFeatures]) -> np.ndarray:
        counts = [count_matches(query.keypoints, candidate.keypoints, self.ratio) for candidate in candidates]
        # SIFT distances are below 1000, so a distance never outweighs a match.
        return np.array([[count + (1 - min(distance, 999) / 1000 if count else 0)] for count, distance in counts])


@dataclass(frozen=True)
class Verification(EvidenceReranker):
    """Geometric verification, and the similarity of the pictures once aligned by the geometry: see APPEARANCE.

    Pairwise evidence, for probabilities: minus the other candidate's log(1 + inliers), since an unknown variant of a product
    matches several of its variants; and the contrast of both candidates, see `contrast_candidates`. With `every_turn`, there is
    no contrast, as the candidates may be aligned with the query in different orientations.

    With `detector.foreground`, only keypoints on the product are used: it is located by the predicted mask in queries and by
    the plain backdrop in catalogue photos. `every_turn`: match the query rotated by 0, 90, 180 and 270 degrees and use the
    rotation with the most inliers, for descriptors that are not rotation-invariant.

    `network`: FILE written by `beauty-bafe verifier`; further evidence is then its `agreement`: the logit of a PairNetwork for
    the aligned pictures, computed for `compared` candidates (see `compare_pictures`). Probabilities are computed from all
    evidence but a candidate's own inliers, which only count against the others, unless a later step or a fusion of rankings
    replaces the scores.

    Raises ValueError for `compared` below 1, if the file is missing or holds something else, or for `every_turn` with a
    network.
    """

    detector: Detector
    matcher: Matcher
    every_turn: bool = False
    network: str | None = None
    compared: int = 8

    @property
    def kinds(self) -> tuple[str, ...]:
        return APPEARANCE if self.network is None else (*APPEARANCE, "agreement")

    @property
    def pairwise(self) -> tuple[str, ...]:
        return "inliers of others", "contrast"

    @property
    def absolute(self) -> tuple[str, ...]:
        # Drawn street views have more inliers than photographs, for which probabilities learned from them would be wrong.
        return tuple(kind for kind in self.kinds if kind != "inliers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compared < 1:
            raise ValueError(f"compared={self.compared}: type how many candidates to compare by the network, 1 or more")
        if self.network is not None:
            if not Path(self.network).is_file():
                raise ValueError(
                    f"network='{self.network}' is not a file; type network=FILE with a file that beauty-bafe verifier wrote, "
                    "or network=null"
                )
            if self.every_turn:
                raise ValueError(
                    "every_turn=true matches a query four times, and the network would compare other candidates each time; "
                    "type every_turn=false, or network=null"
                )
            _ = self._pair_network

    @cached_property
    def source(self) -> str | None:
        """A hash of the network, see `build_parts`; None without one."""
        return None if self.network is None else digest(Path(self.network).read_bytes())

    @cached_property
    def _pair_network(self) -> PairNetwork:
        return load_pair_network(str(self.network), str(self.source)).to(pick_device("auto"))

    def evidence(self, candidates: Candidates) -> Evidence:
        if self.network is None:
            turns, copies = 4 if self.every_turn else 1, SmallCopyExtractor(self.detector)
            found = score_candidates(candidates, self.depth, self.detector, self._score, turns, copies)
        else:
            extractor = CanvasExtractor(self.detector)
            copies_of_canvas = SmallCopyExtractor(extractor)
            found = score_candidates(candidates, self.depth, extractor, self._score_with_network, 1, copies_of_canvas)
        single, contrast = np.split(found, [len(self.kinds)], axis=-1)
        pairwise = np.empty((*contrast.shape, 2), np.float32)
        pairwise[..., 0] = -single[:, None, :, self.kinds.index("inliers")]
        pairwise[..., 1] = np.nan if self.every_turn else contrast
        return Evidence(single, pairwise)

    def _score(self, query: LocalFeatures, candidates: Sequence[LocalFeatures]) -> np.ndarray:
        """The `kinds` of each candidate and its contrast with each one, float (k, kinds + k)."""
        _, appearance, contrast = self._align(query, candidates)
        return np.column_stack([appearance, contrast])

    def _score_with_network(self, query: Canvas, candidates: Sequence[Canvas]) -> np.ndarray:
        geometries, appearance, contrast = self._align(query, candidates)
        size, most = self.detector.size, self.compared
        agreement = compare_pictures(self._pair_network, query, candidates, geometries, size, most)
        return np.column_stack([appearance, agreement, contrast])

    def _align(
        self, query: LocalFeatures | Canvas, candidates: Sequence[LocalFeatures | Canvas]
    ) -> tuple[list[Geometry | None], np.ndarray, np.ndarray]:
        """The geometry of each pair, its APPEARANCE, float (k, 4), and the contrast of the candidates, (k, k)."""
        keypoints, size = [candidate.keypoints for candidate in candidates], self.detector.size
        geometries = fit_geometries(query.keypoints, keypoints, self.matcher, size)
        own, others = query.thumbnail, [candidate.thumbnail for candidate in candidates]
        pairs = zip(others, geometries, strict=True)
        appearance = np.array([compare_appearance(own, other, geometry, size) for other, geometry in pairs])
        return geometries, appearance, contrast_candidates(own, others, geometries, size)
