"""Looking at the pictures of queries and of their first answers; what is seen on the gallery's is kept on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from rich.progress import track
from threadpoolctl import threadpool_limits

from ..data.catalog import Catalog
from ..data.foreground import find_foreground
from ..data.photos import VERSION as MASKS
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..data.places import Place, stamp
from ..data.workers import default_workers, one_opencv_thread
from ..extraction.local import PREPROCESSING
from ..extraction.store import Picture, Store
from ..manifest import digest, locked
from ..process import HeldSetting
from .candidates import Candidates, SearchContext

log = logging.getLogger("beauty_bafe")

T = TypeVar("T")  # what is seen on a picture

one_torch_thread = HeldSetting(torch.get_num_threads, torch.set_num_threads, 1)
SHARD = 512  # gallery pictures a file
COUNT = "_count"  # how many values of a padded array are there


class Viewer(Protocol[T]):
    """Looks at single pictures: a detector of keypoints, a reader of labels.

    `key`: plain values that its looks depend on. `pack` and `unpack`: a look as named arrays, kept on disk; their first
    dimension may differ from picture to picture.
    """

    @property
    def size(self) -> int: ...

    def key(self) -> dict[str, Any]: ...

    def look(self, rgb: np.ndarray, mask: np.ndarray | None) -> T:
        """uint8 (H, W, 3). `mask`: uint8 (M, M), 255 on the product, of the letterboxed picture."""

    def pack(self, look: T) -> dict[str, np.ndarray]: ...

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> T: ...


def _present(context: SearchContext | None) -> SearchContext:
    if context is None:
        raise ValueError("this re-ranking needs the pictures of gallery and queries; this search has descriptors alone")
    return context


def look_at_answers(
    found: Candidates,
    depth: int,
    viewer: Viewer[T],
    score: Callable[[T, Sequence[T]], np.ndarray],
    turns: int = 1,
) -> np.ndarray:
    """`score(query, its first answers)`, float (depth, E), of every query: (Q, depth, E), on all cores.

    Of so many quarter turns of the query, each answer is scored in the one whose first score is the highest.
    """
    context, ranking = _present(found.context), found.ranking
    positions = ranking.positions[:, :depth]
    _paths(context.gallery, (ranking.gallery_ids[place] for place in np.unique(positions)))
    gallery = _GalleryLooks(context, viewer)
    rows = {name: row for row, name in enumerate(context.queries.ids)}

    def look(row: int) -> np.ndarray:
        rgb = context.queries.read(rows[ranking.query_ids[row]], viewer.size).rgb
        mask = None if found.queries.masks is None else found.queries.masks[row]
        candidates = [gallery[ranking.gallery_ids[place]] for place in positions[row]]
        scores = []
        for turn in range(turns):
            turned = (None if part is None else np.ascontiguousarray(np.rot90(part, turn)) for part in (rgb, mask))
            scores.append(score(viewer.look(*turned), candidates))  # type: ignore[arg-type]
        best = np.argmax([turn[:, 0] for turn in scores], axis=0)
        return np.stack(scores)[best, np.arange(len(best))]

    # Each query keeps a core busy; products that took all cores for one query would wait for each other.
    with ThreadPoolExecutor(default_workers()) as threads, threadpool_limits(1), one_opencv_thread, one_torch_thread:
        gallery.describe([ranking.gallery_ids[place] for place in np.unique(positions)], threads)
        what, start = f"{len(positions)} queries with {positions.shape[1]} answers each", time.perf_counter()
        looked = list(track(threads.map(look, range(len(positions))), f"matching {what}", total=len(positions)))
        log.info(f"matched {what}: {len(positions) / (time.perf_counter() - start):.1f} queries a second")
        return np.array(looked)


def _paths(catalog: Catalog, names: Iterable[str]) -> dict[str, Place]:
    """Where these pictures lie. Raises ValueError for one that is not a file."""
    paths = dict(zip(catalog.ids, catalog.paths, strict=True))
    if missing := [name for name in names if name not in paths]:
        raise ValueError(
            f"this re-ranking needs the gallery's pictures as files, and '{missing[0]}' was given as pixels; "
            "give its path, or rerank=none"
        )
    return paths


class _GalleryLooks(Generic[T]):
    """What a viewer sees on gallery pictures, by id: made by `describe`, kept on disk, read through memory maps."""

    def __init__(self, context: SearchContext, viewer: Viewer[T]) -> None:
        self.viewer = viewer
        self.paths = dict(zip(context.gallery.ids, context.gallery.paths, strict=True))
        self.pictures: dict[str, Picture] = {name: (name, stamp(path)) for name, path in self.paths.items()}
        self.key = viewer.key() | {"preprocessing": PREPROCESSING, "masks": MASKS}
        where = str(next(iter(self.paths.values())).parent)  # galleries do not push each other out
        self.folder = context.folder / f"{type(viewer).__name__.lower()}-{digest(where, *map(str, self.key.values()))}"

    def __getitem__(self, name: str) -> T:
        row = self.store.row(self.pictures[name])
        arrays = {part: row[part] for part in row if not part.endswith(COUNT)}
        return self.viewer.unpack({part: values[: int(row[part + COUNT])] for part, values in arrays.items()})

    def describe(self, names: Sequence[str], threads: ThreadPoolExecutor) -> None:
        """Make what is not there yet, a shard at a time, and map what `names` have."""
        with locked([self.folder]):
            self.store = Store(self.folder, self.key)
            self.store.begin(list(self.pictures.values()), {})
            self._make(names, threads)
            self.store.map(self.pictures[name] for name in names)

    def _make(self, names: Sequence[str], threads: ThreadPoolExecutor) -> None:
        new = [name for name in names if self.pictures[name] not in self.store]
        if not new:
            return
        done = iter(track(threads.map(self._describe, new), f"looking at {len(new)} gallery pictures", total=len(new)))
        for start in range(0, len(new), SHARD):
            part = new[start : start + SHARD]
            found = [next(done) for _ in part]
            arrays = {}
            for name in found[0]:
                values = [look[name] for look in found]
                counts = np.array([len(value) for value in values])
                arrays[name] = np.zeros((len(part), counts.max(), *values[0].shape[1:]), values[0].dtype)
                arrays[name + COUNT] = counts
                for row, value in enumerate(values):
                    arrays[name][row, : len(value)] = value
            self.store.append([self.pictures[name] for name in part], arrays, {})
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
