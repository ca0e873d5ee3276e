"""Re-ranking by local features: SIFT as the hybrid paper counts it, and any keypoints with a geometric check."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from threadpoolctl import threadpool_limits

from ..data.catalog import Catalog, stamp
from ..data.foreground import find_foreground
from ..data.photos import VERSION as MASKS
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..data.workers import default_workers, one_opencv_thread
from ..process import HeldSetting
from .features import PREPROCESSING
from .keypoints import Detector, Keypoints
from .manifest import digest, locked
from .matching import Matcher, count_inliers, count_matches
from .rerank import Candidates, SearchContext, reorder, with_depth
from .store import Picture, Store

log = logging.getLogger("beauty_bafe")

one_torch_thread = HeldSetting(torch.get_num_threads, torch.set_num_threads, 1)
SHARD = 512  # gallery pictures a file
WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of log(1 + inliers) beside a likeness of at most 1


@dataclass(frozen=True)
class MatchCount:
    """The hybrid paper's: each query's first `depth` answers by the number of SIFT matches, ties by their distance.

    Answers without a match keep their order behind the others.
    """

    depth: int
    ratio: float
    detector: Detector

    def __call__(self, found: Candidates) -> Candidates:
        found = with_depth(found, self.depth)
        return reorder(found, _look(found, self.depth, self.detector, self._score))

    def _score(self, query: Keypoints, candidates: Sequence[Keypoints]) -> np.ndarray:
        counts = [count_matches(query, candidate, self.ratio) for candidate in candidates]
        # SIFT distances stay below 1000, so that no distance outweighs a match.
        return np.array([count + (1 - min(distance, 999) / 1000 if count else 0) for count, distance in counts])


@dataclass(frozen=True)
class Verification:
    """Likeness + `weight` x log(1 + inliers) among each query's first `depth` answers: geometry beside appearance.

    With `detector.foreground` the keypoints are the product's: of the query by its predicted mask, of a catalogue photo by
    its plain backdrop. `weight` None: the one that finds gallery pictures best from street views of themselves. `every_turn`:
    the query is matched upright and turned by 90, 180 and 270 degrees, and the most inliers count, for keypoints that bear
    little rotation.
    """

    depth: int
    detector: Detector
    matcher: Matcher
    weight: float | None
    every_turn: bool = False

    def learned(self, practice: Candidates) -> Verification:
        if self.weight is not None:
            return self
        practice = with_depth(practice, self.depth)
        return replace(self, weight=choose_weight(practice, self._evidence(practice)))

    def __call__(self, found: Candidates) -> Candidates:
        if self.weight is None:
            raise ValueError(
                "the weight of geometry is learned from street views of the gallery's photos, and there are none; "
                "type a number (rerank.sift_verified.weight=0.05), or rehearsal.views=384 where the photos have plain backdrops"
            )
        found = with_depth(found, self.depth)
        return reorder(found, _likeness(found, self.depth) + self.weight * self._evidence(found))

    def _evidence(self, found: Candidates) -> np.ndarray:
        return _look(found, self.depth, self.detector, self._score, 4 if self.every_turn else 1)

    def _score(self, query: Keypoints, candidates: Sequence[Keypoints]) -> np.ndarray:
        pairs = zip(candidates, self.matcher(query, candidates, self.detector.size), strict=True)
        return np.log1p([count_inliers(query.points[rows], other.points[columns]) for other, (rows, columns) in pairs])


def _likeness(found: Candidates, depth: int) -> np.ndarray:
    """Scores of each query's first answers, float (Q, depth), up to 1; inner products where the index gives distances."""
    if found.index.metric == "ip":
        return found.ranking.scores[:, :depth]
    rows = enumerate(found.queries.vectors)
    return np.stack([found.vectors(depth, slice(row, row + 1))[0] @ query for row, query in rows])


def choose_weight(practice: Candidates, evidence: np.ndarray) -> float:
    """The weight of WEIGHTS under which pictures find themselves soonest: the smallest within one standard error of the best.

    Of mean 1 / rank, differences paired by picture. The smallest, as a street view drawn from a photo matches it better than
    a picture taken elsewhere would. `practice`: queries named after the gallery picture they were drawn from. `evidence`:
    float (Q, depth).
    """
    ranking, depth = practice.ranking, evidence.shape[1]
    likeness = _likeness(practice, depth)
    own = np.array([[ranking.gallery_ids[place] for place in row[:depth]] for row in ranking.positions])
    hit = own == np.array(ranking.query_ids)[:, None]
    found = np.empty((len(WEIGHTS), len(hit)))
    for row, weight in enumerate(WEIGHTS):
        order = np.argsort(-(likeness + weight * evidence), axis=1, kind="stable")
        ranked = np.take_along_axis(hit, order, axis=1)
        found[row] = np.where(ranked.any(axis=1), 1 / (1 + ranked.argmax(axis=1)), 0)
    worse = found[found.mean(axis=1).argmax()] - found
    error = worse.std(axis=1) / max(len(hit), 1) ** 0.5
    chosen = int((worse.mean(axis=1) <= error + 1e-9).argmax())
    log.info(
        f"geometry weighs {WEIGHTS[chosen]}: {len(hit)} gallery pictures found from their own street views at mean 1/rank "
        f"{found[chosen].mean():.3f}, without it {found[0].mean():.3f}"
    )
    return WEIGHTS[chosen]


def _present(context: SearchContext | None) -> SearchContext:
    if context is None:
        raise ValueError("local features need the pictures of gallery and queries; this search has descriptors alone")
    return context


def _look(
    found: Candidates,
    depth: int,
    detector: Detector,
    score: Callable[[Keypoints, Sequence[Keypoints]], np.ndarray],
    turns: int = 1,
) -> np.ndarray:
    """`score(query, its first answers)` of every query, float (Q, depth), the best of so many quarter turns; on all cores."""
    context, ranking = _present(found.context), found.ranking
    positions = ranking.positions[:, :depth]
    _paths(context.gallery, (ranking.gallery_ids[place] for place in np.unique(positions)))
    gallery = _GalleryKeypoints(context, detector)
    rows = {name: row for row, name in enumerate(context.queries.ids)}

    def look(row: int) -> np.ndarray:
        rgb = context.queries.read(rows[ranking.query_ids[row]], detector.size).rgb
        mask = None if found.queries.masks is None else found.queries.masks[row]
        candidates = [gallery[ranking.gallery_ids[place]] for place in positions[row]]
        scores = []
        for turn in range(turns):
            turned = (None if part is None else np.ascontiguousarray(np.rot90(part, turn)) for part in (rgb, mask))
            scores.append(score(detector.look(*turned), candidates))  # type: ignore[arg-type]
        return np.max(scores, axis=0)

    # Each query keeps a core busy; products that took all cores for one query would wait for each other.
    with ThreadPoolExecutor(default_workers()) as threads, threadpool_limits(1), one_opencv_thread, one_torch_thread:
        gallery.describe([ranking.gallery_ids[place] for place in np.unique(positions)], threads)
        what, start = f"{len(positions)} queries with {positions.shape[1]} answers each", time.perf_counter()
        looked = list(track(threads.map(look, range(len(positions))), f"matching {what}", total=len(positions)))
        log.info(f"matched {what}: {len(positions) / (time.perf_counter() - start):.1f} queries a second")
        return np.array(looked)


def _paths(catalog: Catalog, names: Iterable[str]) -> dict[str, Path]:
    """Where these pictures lie. Raises ValueError for one that is not a file."""
    paths = dict(zip(catalog.ids, catalog.paths, strict=True))
    if missing := [name for name in names if name not in paths]:
        raise ValueError(
            f"local features need the gallery's pictures as files, and '{missing[0]}' was given as pixels; "
            "give its path, or rerank=none"
        )
    return paths


class _GalleryKeypoints:
    """Keypoints of gallery pictures by id, described by `describe`, kept on disk, read through memory maps."""

    def __init__(self, context: SearchContext, detector: Detector) -> None:
        self.detector = detector
        self.paths = dict(zip(context.gallery.ids, context.gallery.paths, strict=True))
        self.pictures: dict[str, Picture] = {name: (name, stamp(path)) for name, path in self.paths.items()}
        key = detector.key() | {"preprocessing": PREPROCESSING, "masks": MASKS}
        where = str(next(iter(self.paths.values())).parent)  # galleries do not push each other out
        self.folder = context.folder / f"{type(detector).__name__.lower()}-{digest(where, *map(str, key.values()))}"
        self.key = key

    def __getitem__(self, name: str) -> Keypoints:
        row = self.store.row(self.pictures[name])
        count = int(row["counts"])
        return Keypoints(row["points"][:count], row["descriptors"][:count])

    def describe(self, names: Sequence[str], threads: ThreadPoolExecutor) -> None:
        """Make what is not there yet, a shard at a time, and map the keypoints of `names`."""
        with locked([self.folder]):
            self.store = Store(self.folder, self.key)
            self.store.begin(list(self.pictures.values()), {})
            self._make(names, threads)
            self.store.map(self.pictures[name] for name in names)

    def _make(self, names: Sequence[str], threads: ThreadPoolExecutor) -> None:
        new = [name for name in names if self.pictures[name] not in self.store]
        if not new:
            return
        done = iter(track(threads.map(self._describe, new), f"local features of {len(new)} gallery pictures", total=len(new)))
        for start in range(0, len(new), SHARD):
            part = new[start : start + SHARD]
            found = [next(done) for _ in part]
            arrays: dict[str, np.ndarray] = {"counts": np.array([len(keypoints.points) for keypoints in found])}
            for name in Keypoints._fields:
                parts = [getattr(keypoints, name) for keypoints in found]
                arrays[name] = np.zeros((len(part), arrays["counts"].max(), parts[0].shape[1]), parts[0].dtype)
                for row, values in enumerate(parts):
                    arrays[name][row, : len(values)] = values
            self.store.append([self.pictures[name] for name in part], arrays, {})
        next(done, None)  # lets the progress bar end

    def _describe(self, name: str) -> Keypoints:
        try:
            picture = read_picture(self.paths[name], self.detector.size)
        except UnreadablePicture as error:
            raise ValueError(
                f"local features need the gallery's pictures, and '{self.paths[name]}' cannot be read ({error}); "
                "put it back, or type rerank=none"
            ) from error
        product = find_foreground(picture)
        # A photo without a plain backdrop keeps all of its keypoints.
        return self.detector.look(picture.rgb, letterbox(product.mask, self.detector.size, fill=0) if product.trusted else None)
