"""Describe pictures in memory, with networks that stay loaded between calls."""

from __future__ import annotations

import copy
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from ..data.catalog import Skipped
from ..data.images import Pictures
from ..data.pictures import UnreadablePicture
from ..data.workers import default_workers, one_opencv_thread
from ..models.views import View
from .engine import Described, EnsembleEngine, fit, longest, stack
from .features import Features
from .local import FeatureExtraction
from .members import Member

CHUNK = 32  # pictures decoded before they are passed to the network


class MemoryExtraction:
    """Like FeatureExtraction, but nothing is stored, and each engine is built once, on first use. Thread-safe.

    `settings`: how to describe. Networks are compiled only if `settings.runtime` is compiled. `root`: a temporary folder for
    re-rankers and descriptors that keep files (SIFT, VLAD), created when needed and removed with this object.
    """

    def __init__(self, settings: FeatureExtraction) -> None:
        self.settings = copy.copy(settings)
        self.settings.runtime = "torch" if settings.runtime == "auto" else settings.runtime
        self.scales, self.flip = settings.scales, settings.flip
        self.root = Path(tempfile.gettempdir()) / f"beauty_bafe-{uuid.uuid4().hex}"
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self._engines: dict[tuple[bool, str], EnsembleEngine] = {}
        # Only one call at a time runs the networks: they already use every core, and threads that share cores wait for each
        # other at every layer.
        self._networks = threading.RLock()

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A temporary folder for pictures to be described."""
        with tempfile.TemporaryDirectory(prefix=f"beauty_bafe-{name}-") as folder:
            yield Path(folder)

    def engine(self, members: Sequence[Member], masks: bool, view: View | None) -> EnsembleEngine:
        """The engine for these settings, built at the first call; `members` must be the same in every call."""
        with self._networks:
            key = (masks, str(view))
            if key not in self._engines:
                numbered = {number: (member.extractor, member.pooling) for number, member in enumerate(members)}
                engine = EnsembleEngine(self.settings, numbered, masks, view)
                for network in engine.networks:
                    network.engine.compile()
                self._engines[key] = engine
            return self._engines[key]

    def __call__(
        self,
        members: Sequence[Member],
        pictures: Pictures,
        source: str,
        what: str,
        skipped: Skipped,
        masks: bool = False,
        view: View | None = None,
    ) -> list[Features]:
        """Features of each member, see FeatureExtraction; `source` is ignored."""
        engine = self.engine(members, masks, view)
        parts: list[list[Described]] = []
        ids: list[str] = []
        broken = Skipped()
        with one_opencv_thread, ThreadPoolExecutor(default_workers()) as threads:

            def prepare(row: int) -> list[Tensor] | str:
                try:
                    return fit(pictures.read(row, longest(engine.canvases)).rgb, engine.canvases)
                except UnreadablePicture as error:
                    return str(error)

            for start in range(0, len(pictures), CHUNK):
                rows = range(start, min(start + CHUNK, len(pictures)))
                good = []
                for row, views in zip(rows, threads.map(prepare, rows), strict=True):
                    if isinstance(views, str):
                        broken.add(pictures.files, row, views)
                    else:
                        ids.append(pictures.ids[row])
                        good.append(views)
                if good:
                    with self._networks:
                        parts.append(engine(stack(good)))
        skipped.rows += broken.rows
        broken.check(len(pictures), self.settings.max_skipped, what, "max_skipped")
        return [self._features(list(described), tuple(ids)) for described in zip(*parts, strict=True)]

    def _features(self, parts: Sequence[Described], ids: tuple[str, ...]) -> Features:
        vectors = np.concatenate([part.vectors for part in parts])
        drawn = [part.masks for part in parts if part.masks is not None]
        # Rounded as on disk.
        vectors = vectors.astype(self.settings.dtype).astype(np.float32)
        return Features(vectors, ids, np.concatenate(drawn) if drawn else None)
