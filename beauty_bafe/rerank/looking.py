"""Looking at the pictures of queries and of their first answers; what is seen on the gallery's is kept on disk."""

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
from rich.progress import track
from threadpoolctl import threadpool_limits

from ..data.catalog import Catalog
from ..data.foreground import find_foreground
from ..data.photos import VERSION as MASKS
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..data.places import stamp
from ..data.workers import default_workers, one_opencv_thread
from ..extraction.local import PREPROCESSING
from ..extraction.store import Picture, Store
from ..manifest import digest, locked
from ..process import HeldSetting
from .candidates import Candidates

log = logging.getLogger("beauty_bafe")

T = TypeVar("T")  # what is seen on a picture

one_torch_thread = HeldSetting(torch.get_num_threads, torch.set_num_threads, 1)
SHARD = 512  # gallery pictures a file
QUIET = 32  # queries, or gallery pictures, up to which no progress is shown
COUNT = "_count"  # how many values of a padded array are there


class Viewer(Protocol[T]):
    """Looks at single pictures: a detector of keypoints, a reader of labels.

    Hashable, and equal to another that sees the same. `key`: plain values that its looks depend on. `pack` and `unpack`: a
    look as named arrays, kept on disk; their first dimension may differ from picture to picture.
    """

    @property
    def size(self) -> int: ...

    def key(self) -> dict[str, Any]: ...

    def look(self, rgb: np.ndarray, mask: np.ndarray | None) -> T:
        """uint8 (H, W, 3). `mask`: uint8 (M, M), 255 on the product, of the letterboxed picture."""

    def pack(self, look: T) -> dict[str, np.ndarray]: ...

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> T: ...


def look_at_answers(
    found: Candidates,
    depth: int,
    viewer: Viewer[T],
    score: Callable[[T, Sequence[T]], np.ndarray],
    turns: int = 1,
) -> np.ndarray:
    """`score(query, its first answers)`, float (depth, E), of every query: (Q, depth, E), on all cores.

    Of so many quarter turns of the query, each answer is scored in the one whose first score is the highest. Raises
    ValueError where a gallery picture is not a file, or cannot be read.
    """
    context, ranking = found.context, found.ranking
    if context is None:
        raise ValueError("this re-ranking needs the pictures of gallery and queries; this search has descriptors alone")
    positions = ranking.positions[:, :depth]
    answers = [ranking.gallery_ids[place] for place in np.unique(positions)]
    looks: _GalleryLooks[T] | None = context.looks.get(viewer)
    if looks is None or looks.gallery is not context.gallery:
        looks = context.looks[viewer] = _GalleryLooks(context.gallery, context.folder, viewer)
    rows = {name: row for row, name in enumerate(context.queries.ids)}

    def look(row: int) -> np.ndarray:
        rgb = context.queries.read(rows[ranking.query_ids[row]], viewer.size).rgb
        mask = None if found.queries.masks is None else found.queries.masks[row]
        candidates = [gallery(ranking.gallery_ids[place]) for place in positions[row]]
        scores = []
        for turn in range(turns):
            turned = (None if part is None else np.ascontiguousarray(np.rot90(part, turn)) for part in (rgb, mask))
            scores.append(score(viewer.look(*turned), candidates))  # type: ignore[arg-type]
        best = np.argmax([turn[:, 0] for turn in scores], axis=0)
        return np.stack(scores)[best, np.arange(len(best))]

    # Each query keeps a core busy; products that took all cores for one query would wait for each other.
    with ThreadPoolExecutor(default_workers()) as threads, threadpool_limits(1), one_opencv_thread, one_torch_thread:
        gallery = looks.describe(answers, threads)
        what, start = f"{len(positions)} queries with {positions.shape[1]} answers each", time.perf_counter()
        looked = list(_progress(threads.map(look, range(len(positions))), f"matching {what}", len(positions)))
        if len(positions) > QUIET:
            log.info(f"matched {what}: {len(positions) / (time.perf_counter() - start):.1f} queries a second")
        return np.array(looked)


def _progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """A program that imports this package decides by the logger whether it is shown."""
    return track(items, what, total=total, disable=total <= QUIET or not log.isEnabledFor(logging.INFO))


class _GalleryLooks(Generic[T]):
    """What a viewer sees on gallery pictures: made where it is asked for first, kept on disk, read through memory maps.

    One for all searches of a gallery, in several threads as well: a search then costs what it asks for, and not what the
    gallery holds.
    """

    def __init__(self, gallery: Catalog, folder: Path, viewer: Viewer[T]) -> None:
        self.gallery, self.viewer = gallery, viewer
        self.paths = dict(zip(gallery.ids, gallery.paths, strict=True))
        self.key = viewer.key() | {"preprocessing": PREPROCESSING, "masks": MASKS}
        # Galleries do not push each other out; resolved, as an index_dir names its pictures.
        where = [str(path.resolve().parent) for path in gallery.paths[:1]]
        self.folder = folder / f"{type(viewer).__name__.lower()}-{digest(*where, *map(str, self.key.values()))}"
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._files: object = None  # what lay in the folder when this one last read or wrote there

    def describe(self, names: Iterable[str], threads: ThreadPoolExecutor) -> Callable[[str], T]:
        """Make what is not there yet, a shard at a time; gives what is seen on one of `names`."""
        names = list(names)
        if missing := [name for name in names if name not in self.paths]:
            raise ValueError(
                f"this re-ranking needs the gallery's pictures as files, and '{missing[0]}' was given as pixels; "
                "give its path, or rerank=none"
            )
        pictures: dict[str, Picture] = {name: (name, stamp(self.paths[name])) for name in names}
        with self._opening:
            if self._store is None or not all(map(self._store.is_mapped, pictures.values())):
                with locked([self.folder]):
                    self._store = self._open()
                    self._make(self._store, [picture for picture in pictures.values() if picture not in self._store], threads)
                    self._store.map(pictures.values())
                    self._files = self._store.files()
            store = self._store

        def look(name: str) -> T:
            row = store.row(pictures[name])
            arrays = {part: values for part, values in row.items() if not part.endswith(COUNT)}
            return self.viewer.unpack({part: values[: int(row[part + COUNT])] for part, values in arrays.items()})

        return look

    def _open(self) -> Store:
        """The store as it is on disk: opened again where another run has changed it."""
        if self._store is not None and self._store.files() == self._files:
            return self._store
        store = Store(self.folder, self.key)
        store.begin([(name, stamp(path)) for name, path in self.paths.items()], {})
        return store

    def _make(self, store: Store, pictures: Sequence[Picture], threads: ThreadPoolExecutor) -> None:
        what = f"looking at {len(pictures)} gallery pictures"
        done = iter(_progress(threads.map(self._describe, (name for name, _ in pictures)), what, len(pictures)))
        for start in range(0, len(pictures), SHARD):
            part = pictures[start : start + SHARD]
            found = [next(done) for _ in part]
            arrays = {}
            for name in found[0]:
                values = [look[name] for look in found]
                counts = np.array([len(value) for value in values])
                arrays[name] = np.zeros((len(part), counts.max(), *values[0].shape[1:]), values[0].dtype)
                arrays[name + COUNT] = counts
                for row, value in enumerate(values):
                    arrays[name][row, : len(value)] = value
            store.append(part, arrays, {})
        next(done, None)  # lets the progress bar end

    def _describe(self, name: str) -> dict[str, np.ndarray]:
        try:
            picture = read_picture(self.paths[name], self.viewer.size)
        except UnreadablePicture as error:
            raise ValueError(
                f"this re-ranking needs the gallery's pictures, and '{self.paths[name]}' cannot be read ({error}); "
                "put it back, or type rerank=none"
            ) from error
        product = find_foreground(picture)
        # A photo without a plain backdrop is seen whole.
        mask = letterbox(product.mask, self.viewer.size, fill=0) if product.trusted else None
        return self.viewer.pack(self.viewer.look(picture.rgb, mask))
