"""The base class of indexes whose vectors are one array, in memory or mapped from disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..manifest import replace_file
from .base import Index


class MemoryIndex(Index):
    """An index with the array `vectors`, float32 (N, D). Other classes call `get` instead of reading it.

    A subclass builds its search structure from the array in `_build`, and updates it in `_grown` and `_shrunk`.
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
        replace_file(folder / "vectors.npy", partial(save_npy, self.vectors))

    def _load(self, folder: Path) -> int:
        """Map the vectors from disk and build the search structure again; a subclass may load a saved one instead."""
        self._map(folder)
        self._build()
        return len(self.vectors)

    def _map(self, folder: Path) -> None:
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="c")  # copy on write: torch wants writable memory

    @abstractmethod
    def _build(self) -> None:
        """Build the search structure from all of `vectors`."""

    @abstractmethod
    def _grown(self, before: int) -> None:
        """Update the search structure: `vectors` has got new rows after its first `before`."""

    @abstractmethod
    def _shrunk(self, keep: np.ndarray) -> None:
        """Update the search structure: the rows for which `keep`, bool (rows before,), is false have been removed."""


def save_npy(array: np.ndarray, part: Path) -> None:
    """Write an array to a file of any name."""
    with part.open("wb") as stream:  # np.save would append .npy to the name
        np.save(stream, array)
