"""Re-ranking by local features: SIFT as the hybrid paper counts it, and RootSIFT with a geometric check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple

import cv2
import numpy as np
from rich.progress import track
from threadpoolctl import threadpool_limits

from ..data.augmentation import Augmentation
from ..data.backgrounds import Backgrounds
from ..data.catalog import open_catalog, stamp
from ..data.foreground import find_foreground
from ..data.photos import VERSION as MASKS
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..data.rehearsal import draw_street_views
from ..data.workers import default_workers
from .features import PREPROCESSING
from .manifest import digest, locked
from .rerank import Found, Scene, reorder, with_depth
from .store import Picture, Store

SHARD = 512  # gallery pictures a file
WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of log(1 + inliers) beside a likeness of at most 1
REACH = 4.0  # pixels within which a match agrees with a homography or affine map


class Keypoints(NamedTuple):
    """`points`: float32 (K, 2), x and y on the canvas, pixels. `descriptors`: uint8 (K, 128), SIFT's."""

    points: np.ndarray
    descriptors: np.ndarray


@dataclass(frozen=True)
class Detector:
    """SIFT keypoints of pictures fitted into `size` x `size` pixels: at most `most`, the strongest.

    `contrast`: Lowe's threshold, 0.04 as OpenCV has it; smooth products need less. `foreground`: those on the product alone.
    """

    size: int
    most: int
    contrast: float = 0.04
    foreground: bool = False

    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        """uint8 (S, S, 3), S any; `inside`: bool (S, S), where keypoints may lie, heeded with `foreground`."""
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


def count_matches(query: Keypoints, candidate: Keypoints, ratio: float) -> tuple[int, float]:
    """Query keypoints whose nearest descriptor is nearer than `ratio` times the next (FLANN, Lowe's test); their mean distance.

    (0, 0.0) where nothing matches.
    """
    if not len(query.points) or len(candidate.points) < 2:
        return 0, 0.0
    # FLANN's exact index: at a few hundred keypoints four times as fast as its trees, and the same every time.
    index = cv2.flann_Index(candidate.descriptors.astype(np.float32), {"algorithm": 0})  # type: ignore[attr-defined]
    _, squares = index.knnSearch(query.descriptors.astype(np.float32), 2, params={})
    near = np.sqrt(squares[:, 0])
    passed = near < ratio * np.sqrt(squares[:, 1])
    return int(passed.sum()), float(near[passed].mean()) if passed.any() else 0.0


def match_mutually(query: np.ndarray, candidate: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two RootSIFT arrays, float32 (K, 128), (L, 128), that are each other's nearest and pass the ratio both ways."""
    if len(query) < 2 or len(candidate) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    distance = np.sqrt(np.maximum(2 - 2 * query @ candidate.T, 0))
    rows = np.arange(len(query))
    nearest = distance.argmin(axis=1)
    forward = distance[rows, nearest] < ratio * np.partition(distance, 1, axis=1)[:, 1]
    rows, nearest = rows[forward], nearest[forward]
    columns = distance[:, nearest]  # only these candidates are looked at from the other side
    backward = (columns.argmin(axis=0) == rows) & (distance[rows, nearest] < ratio * np.partition(columns, 1, axis=0)[1])
    return rows[backward], nearest[backward]


def count_inliers(source: np.ndarray, target: np.ndarray) -> int:
    """Matches, float32 (M, 2) each, that agree on a homography or an affine map, beyond the 4 or 3 that always do.

    MAGSAC++ (Barath et al., CVPR 2020). Mirroring maps and those that shrink or enlarge over 20 times count as none.
    """
    best = 0
    if len(source) > 4:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.findHomography(source, target, cv2.USAC_MAGSAC, REACH, maxIters=500, confidence=0.99)
        if matrix is not None and _plausible(matrix[:2, :2]):
            best = int(inliers.sum()) - 4
    if len(source) > 3:
        cv2.setRNGSeed(0)
        matrix, inliers = cv2.estimateAffine2D(
            source, target, method=cv2.USAC_MAGSAC, ransacReprojThreshold=REACH, maxIters=500, confidence=0.99
        )
        if matrix is not None and _plausible(matrix[:, :2]):
            best = max(best, int(inliers.sum()) - 3)
    return max(best, 0)


def _plausible(linear: np.ndarray) -> bool:
    return bool(1 / 400 < np.linalg.det(linear) < 400)


def rerank_sift(found: Found, depth: int, ratio: float, detector: Detector) -> Found:
    """The hybrid paper's: each query's first `depth` answers by the number of SIFT matches, ties by their distance.

    Answers without a match keep their order behind the others.
    """

    def score(query: Keypoints, candidates: Sequence[Keypoints]) -> np.ndarray:
        counts = [count_matches(query, candidate, ratio) for candidate in candidates]
        # SIFT distances stay below 1000, so that no distance outweighs a match.
        return np.array([count + (1 - min(distance, 999) / 1000 if count else 0) for count, distance in counts])

    found = with_depth(found, depth)
    return reorder(found, _look(found, depth, detector, score))


def rerank_sift_verified(
    found: Found,
    depth: int,
    ratio: float,
    detector: Detector,
    weight: float | None,
    rehearsals: int,
    augmentation: Augmentation,
    backgrounds: str | None,
) -> Found:
    """Likeness + `weight` x log(1 + inliers) among each query's first `depth` answers: geometry beside appearance.

    With `detector.foreground` the keypoints are the product's: of the query by its predicted mask, of a catalogue photo by
    its plain backdrop. `weight` None: the one that finds gallery pictures best from `rehearsals` street views of themselves,
    drawn by `augmentation` on `backgrounds` (a folder, None for drawn scenes).
    """

    def geometry(query: Keypoints, candidates: Sequence[Keypoints]) -> np.ndarray:
        own = root_sift(query.descriptors)
        counts = []
        for candidate in candidates:
            rows, columns = match_mutually(own, root_sift(candidate.descriptors), ratio)
            counts.append(count_inliers(query.points[rows], candidate.points[columns]))
        return np.log1p(counts)

    found = with_depth(found, depth)
    if weight is None:
        scene, photos = _present(found.scene), Backgrounds(None if backgrounds is None else open_catalog(backgrounds))
        folder = scene.folder / f"rehearsal-{detector.size}"
        with locked([folder]):  # another gallery's views go to the same files
            views = draw_street_views(scene.gallery, rehearsals, augmentation, photos, detector.size, folder)
            practice = with_depth(scene.rehearse(views), depth)
            weight = choose_weight(practice, _look(practice, depth, detector, geometry))
    evidence = _look(found, depth, detector, geometry)
    return reorder(found, _likeness(found, depth) + weight * evidence)


def _likeness(found: Found, depth: int) -> np.ndarray:
    """Scores of each query's first answers, float (Q, depth), up to 1; inner products where the index gives distances."""
    positions = found.ranking.positions[:, :depth]
    if found.index.metric == "ip":
        return found.ranking.scores[:, :depth]
    pairs = zip(found.queries.vectors, positions, strict=True)
    return np.stack([np.asarray(found.index.vectors[row]) @ query for query, row in pairs])


def choose_weight(practice: Found, evidence: np.ndarray) -> float:
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
    print(
        f"geometry weighs {WEIGHTS[chosen]}: {len(hit)} gallery pictures found from their own street views at mean 1/rank "
        f"{found[chosen].mean():.3f}, without it {found[0].mean():.3f}"
    )
    return WEIGHTS[chosen]


def _present(scene: Scene | None) -> Scene:
    if scene is None:
        raise ValueError("local features need the pictures of gallery and queries; this search has descriptors alone")
    return scene


def _look(
    found: Found, depth: int, detector: Detector, score: Callable[[Keypoints, Sequence[Keypoints]], np.ndarray]
) -> np.ndarray:
    """`score(query, its first answers)` of every query, float (Q, depth); queries on all cores."""
    scene, ranking = _present(found.scene), found.ranking
    positions = ranking.positions[:, :depth]
    gallery = _GalleryKeypoints(scene, detector)
    paths = dict(zip(scene.asked.ids, scene.asked.paths, strict=True))

    def look(row: int) -> np.ndarray:
        rgb = letterbox(read_picture(paths[ranking.query_ids[row]], detector.size).rgb, detector.size)
        inside = None
        if found.queries.masks is not None:
            inside = cv2.resize(found.queries.masks[row], rgb.shape[:2], interpolation=cv2.INTER_LINEAR) > 127
        return score(detector(rgb, inside), [gallery[ranking.gallery_ids[place]] for place in positions[row]])

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the queries keep the cores busy
    try:
        # numpy's products would take all cores for each query and wait for each other.
        with ThreadPoolExecutor(default_workers()) as threads, threadpool_limits(1):
            gallery.describe([ranking.gallery_ids[place] for place in np.unique(positions)], threads)
            what, start = f"{len(positions)} queries with {positions.shape[1]} answers each", time.perf_counter()
            looked = list(track(threads.map(look, range(len(positions))), f"matching {what}", total=len(positions)))
            print(f"matched {what}: {len(positions) / (time.perf_counter() - start):.1f} queries a second")
            return np.array(looked)
    finally:
        cv2.setNumThreads(before)


class _GalleryKeypoints:
    """Keypoints of gallery pictures by id, described by `describe`, kept on disk, read through memory maps."""

    def __init__(self, scene: Scene, detector: Detector) -> None:
        self.detector = detector
        self.paths = dict(zip(scene.gallery.ids, scene.gallery.paths, strict=True))
        self.pictures: dict[str, Picture] = {name: (name, stamp(path)) for name, path in self.paths.items()}
        key = asdict(detector) | {"opencv": cv2.__version__, "preprocessing": PREPROCESSING, "masks": MASKS}
        where = str(next(iter(self.paths.values())).parent)  # galleries do not push each other out
        self.folder, self.key = scene.folder / f"sift-{digest(where, *map(str, key.values()))}", key

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
            most = max(len(keypoints.points) for keypoints in found)
            arrays: dict[str, np.ndarray] = {
                "points": np.zeros((len(part), most, 2), np.float32),
                "descriptors": np.zeros((len(part), most, 128), np.uint8),
                "counts": np.array([len(keypoints.points) for keypoints in found]),
            }
            for row, keypoints in enumerate(found):
                arrays["points"][row, : len(keypoints.points)] = keypoints.points
                arrays["descriptors"][row, : len(keypoints.points)] = keypoints.descriptors
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
        size, product = self.detector.size, find_foreground(picture)
        # A photo without a plain backdrop keeps all of its keypoints.
        inside = letterbox(product.mask, size, fill=0) > 127 if product.trusted else None
        return self.detector(letterbox(picture.rgb, size), inside)
