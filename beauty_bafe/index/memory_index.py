"""What the indexes share whose vectors are one array, in memory or mapped from disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..manifest import replace_file
from .base import Index


class MemoryIndex(Index):
    """An index beside `vectors`, float32 (N, D), which no other class reads: ask `get`.

    A subclass makes what it searches with from the array, in `_build`, and follows its changes in `_grown` and `_shrunk`.
    """

    def __init__(self, metric: str) -> None:
        super().__init__(metric)
        self.vectors = np.zeros((0, 0), np.float32)

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def _replace(self, vectors: np.ndarray, ids: tuple[str, ...] = ()) -> None:
        self.vectors = vectors
        self._build()

    def _append(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        before = len(self.vectors)
        self.vectors = np.concatenate([self.vectors, vectors])
        self._grown(before)

    def _delete(self, keep: np.ndarray) -> None:
        self.vectors = self.vectors[keep]
        self._shrunk(keep)

    def _get(self, ids: Sequence[str]) -> np.ndarray:
        return np.asarray(self.vectors[np.array([self.row_of[name] for name in ids], np.int64)])

    def _save(self, folder: Path) -> None:
        replace_file(folder / "vectors.npy", lambda part: _save_npy(part, self.vectors))

    def _load(self, folder: Path) -> int:
        """Vectors stay on disk, mapped; what is searched with is made again, unless a subclass can read it sooner."""
        self._map(folder)
        self._build()
        return len(self.vectors)

    def _map(self, folder: Path) -> None:
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="c")  # copy on write: torch wants writable memory

    @abstractmethod
    def _build(self) -> None:
        """Make what is searched with from all of `vectors`."""

    @abstractmethod
    def _grown(self, before: int) -> None:
        """Follow `vectors`, which got more rows behind its first `before`."""

    @abstractmethod
    def _shrunk(self, keep: np.ndarray) -> None:
        """Follow `vectors`, which lost the rows where `keep`, bool (rows before,), is false."""


def _save_npy(part: Path, vectors: np.ndarray) -> None:
    with part.open("wb") as stream:  # np.save would append .npy to the name
        np.save(stream, vectors)
