"""Local features of queries and of their candidates; those of the gallery are cached on disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ..data.catalog import Catalog
from ..data.foreground import find_foreground
from ..data.photos import VERSION as MASKS
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..data.places import stamp, stamps
from ..data.workers import default_workers, one_opencv_thread
from ..extraction.local import PREPROCESSING
from ..extraction.store import Picture, Store
from ..manifest import digest, locked
from ..process import TemporarySetting
from ..progress import show_progress
from .candidates import Candidates, SearchContext

log = logging.getLogger("beauty_bafe")

T = TypeVar("T")  # the features of one picture

one_torch_thread = TemporarySetting(torch.get_num_threads, torch.set_num_threads, 1)
SHARD = 512  # gallery pictures per file
PROGRESS_ABOVE = 32  # queries, or gallery pictures, up to which no progress is shown
COUNT = "_count"  # suffix of the array that holds the unpadded lengths of another


class LocalExtractor(Protocol[T]):
    """Extracts the features of single pictures: a keypoint detector or a label reader.

    Hashable, and equal to another with the same output. `key`: plain values that the features depend on. `pack` and
    `unpack`: convert features to named arrays for the cache and back; their first dimension may differ between pictures.
    """

    @property
    def size(self) -> int: ...

    def key(self) -> dict[str, Any]: ...

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> T:
        """uint8 (H, W, 3). `mask`: uint8 (M, M), 255 on the product, of the letterboxed picture."""

    def pack(self, features: T) -> dict[str, np.ndarray]: ...

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> T: ...


def score_candidates(
    candidates: Candidates,
    depth: int,
    extractor: LocalExtractor[T],
    score: Callable[[T, Sequence[T]], np.ndarray],
    rotations: int = 1,
    copies: LocalExtractor[T] | None = None,
) -> np.ndarray:
    """`score(query, its first candidates)`, float (depth, E), for every query: (Q, depth, E), on all cores.

    The query is scored in its first `rotations` orientations, 90 degrees apart; each candidate keeps the scores of the
    orientation with the highest first score. `copies`: extracts the features of the candidates of small queries (see
    Candidates); None: `extractor`. Raises ValueError if a gallery picture is not a file or cannot be read.
    """
    context, ranking = candidates.needed_context, candidates.ranking
    positions = ranking.positions[:, :depth]
    small = np.zeros(len(positions), bool) if candidates.small is None or copies is None else candidates.small
    rows = {name: row for row, name in enumerate(context.queries.ids)}

    def score_query(row: int) -> np.ndarray:
        rgb = context.queries.read(rows[ranking.query_ids[row]], extractor.size).rgb
        mask = None if candidates.queries.masks is None else candidates.queries.masks[row]
        find = copies_of if small[row] else features_of
        others = [find(ranking.gallery_ids[position]) for position in positions[row]]
        scores = []
        for turns in range(rotations):
            rotated = (None if part is None else np.ascontiguousarray(np.rot90(part, turns)) for part in (rgb, mask))
            scores.append(score(extractor.extract(*rotated), others))  # type: ignore[arg-type]
        best = np.argmax([part[:, 0] for part in scores], axis=0)
        return np.stack(scores)[best, np.arange(len(best))]

    def load_some(own: LocalExtractor[T], queries: np.ndarray) -> Callable[[str], T]:
        """The features of the candidates of some queries, bool (Q,), by name."""
        names = [ranking.gallery_ids[position] for position in np.unique(positions[queries])]
        return open_features(context, own).load(names, threads) if names else dict[str, T]().__getitem__

    # One thread per query: matrix products that each used all cores would wait for one another.
    with ThreadPoolExecutor(default_workers()) as threads, threadpool_limits(1), one_opencv_thread, one_torch_thread:
        features_of = load_some(extractor, ~small)
        copies_of = features_of if copies is None else load_some(copies, small)
        what, start = f"{len(positions)} queries with {positions.shape[1]} candidates each", time.perf_counter()
        found = threads.map(score_query, range(len(positions)))
        scored = list(show_progress(found, f"matching {what}", len(positions), PROGRESS_ABOVE))
        if len(positions) > PROGRESS_ABOVE:
            log.info(f"matched {what}: {len(positions) / (time.perf_counter() - start):.1f} queries per second")
        return np.array(scored)


def open_features(context: SearchContext, extractor: LocalExtractor[T]) -> GalleryFeatures[T]:
    """The features of the gallery's pictures, shared by all searches of the same gallery."""
    gallery: GalleryFeatures[T] | None = context.cache.get(extractor)
    if gallery is None or gallery.catalog is not context.gallery:
        gallery = context.cache[extractor] = GalleryFeatures(context.gallery, context.folder, extractor)
    return gallery


class GalleryFeatures(Generic[T]):
    """The features of gallery pictures: extracted when first needed, cached on disk, read through memory maps. Thread-safe.

    Shared by all searches of a gallery, so that the cost of a search depends on its candidates, not on the gallery's size.
    """

    def __init__(self, catalog: Catalog, folder: Path, extractor: LocalExtractor[T]) -> None:
        self.catalog, self.extractor = catalog, extractor
        self.paths = dict(zip(catalog.ids, catalog.paths, strict=True))
        self.key = extractor.key() | {"preprocessing": PREPROCESSING, "masks": MASKS}
        # One folder per gallery. Paths are resolved, as an index_dir stores them resolved.
        where = [str(path.resolve().parent) for path in catalog.paths[:1]]
        self.folder = folder / f"{type(extractor).__name__.lower()}-{digest(*where, *map(str, self.key.values()))}"
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._files: object = None  # the state of the folder after the last read or write by this object

    def load(self, names: Iterable[str], threads: ThreadPoolExecutor) -> Callable[[str], T]:
        """Extract the features that are not cached yet, shard by shard; returns a function from a name to its features."""
        names = list(names)
        if missing := [name for name in names if name not in self.paths]:
            raise ValueError(
                f"this re-ranking needs the gallery's pictures as files, but '{missing[0]}' was given as pixels; "
                "give its path, or type rerank=none"
            )
        pictures: dict[str, Picture] = {name: (name, stamp(self.paths[name])) for name in names}
        with self._opening:
            if self._store is None or not all(map(self._store.is_mapped, pictures.values())):
                with locked([self.folder]):
                    self._store = self._open()
                    missing_pictures = [picture for picture in pictures.values() if picture not in self._store]
                    self._extract_all(self._store, missing_pictures, threads)
                    self._store.map(pictures.values())
                    self._files = self._store.files()
            store = self._store

        def features_of(name: str) -> T:
            row = store.row(pictures[name])
            arrays = {part: values for part, values in row.items() if not part.endswith(COUNT)}
            return self.extractor.unpack({part: values[: int(row[part + COUNT])] for part, values in arrays.items()})

        return features_of

    def _open(self) -> Store:
        """The store, opened again if another run has changed it on disk."""
        if self._store is not None and self._store.files() == self._files:
            return self._store
        store = Store(self.folder, self.key)
        store.begin(list(zip(self.paths, stamps(list(self.paths.values())), strict=True)), {})
        return store

    def _extract_all(self, store: Store, pictures: Sequence[Picture], threads: ThreadPoolExecutor) -> None:
        what = f"extracting local features of {len(pictures)} gallery pictures"
        features = threads.map(self._extract, (name for name, _ in pictures))
        extracted = iter(show_progress(features, what, len(pictures), PROGRESS_ABOVE))
        for start in range(0, len(pictures), SHARD):
            part = pictures[start : start + SHARD]
            rows = [next(extracted) for _ in part]
            arrays = {}
            for name in rows[0]:
                values = [row[name] for row in rows]
                counts = np.array([len(value) for value in values])
                arrays[name] = np.zeros((len(part), counts.max(), *values[0].shape[1:]), values[0].dtype)
                arrays[name + COUNT] = counts
                for row, value in enumerate(values):
                    arrays[name][row, : len(value)] = value
            store.append(part, arrays, {})
        next(extracted, None)  # lets the progress bar end

    def _extract(self, name: str) -> dict[str, np.ndarray]:
        try:
            picture = read_picture(self.paths[name], self.extractor.size)
        except UnreadablePicture as error:
            raise ValueError(
                f"this re-ranking needs the gallery's pictures, but '{self.paths[name]}' cannot be read ({error}); "
                "restore the file, or type rerank=none"
            ) from error
        product = find_foreground(picture)
        # Without a plain backdrop there is no reliable mask, so the whole picture is used.
        mask = letterbox(product.mask, self.extractor.size, fill=0) if product.trusted else None
        return self.extractor.pack(self.extractor.extract(picture.rgb, mask))
