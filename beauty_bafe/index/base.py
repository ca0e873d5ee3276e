"""The base class of all indexes; see memory_index.py for those whose vectors are in this process."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..manifest import check_manifest, replace_file
from .ranking import Ranking, check_k

METRICS = ("ip", "l2", "l1")
BLOCK = 1 << 14  # rows compared at a time


class Index(ABC):
    """Nearest-neighbour search among the descriptors of a gallery.

    `metric`: "ip" (inner product, which is the cosine for descriptors of length 1), "l2" (squared) or "l1". Higher scores
    are better, so distances are negated. `ids`: the names of the rows, in order; `row_of`: the row of each id.
    `dimensions`: D.

    This class checks the arguments and keeps the ids. A subclass keeps the vectors: it implements the abstract methods at
    the end, which get checked arguments and are called before `ids` and `row_of` change.
    """

    def __init__(self, metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"index.metric={metric}: type {', '.join(METRICS)}")
        self.metric = metric
        self.dimensions = 0
        self.ids: tuple[str, ...] = ()
        self.row_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def fit(self, vectors: np.ndarray, ids: Sequence[str]) -> Self:
        """Index a gallery, float32 (N, D), by its N ids. Replaces earlier rows; copies of this object keep theirs.

        Raises ValueError if vectors and ids do not match.
        """
        _check_rows(vectors, ids)
        self.dimensions = vectors.shape[1]
        self._replace(np.ascontiguousarray(vectors, np.float32), tuple(ids))
        self._name(ids)
        return self

    def clone(self) -> Self:
        """An index of the same rows; adding to it or removing from it does not change this one."""
        return copy.copy(self)

    def for_view(self, number: int, about: dict[str, Any]) -> Self:
        """An empty index for one view of a gallery; `about`, plain values, says how its vectors are made."""
        return copy.copy(self)

    def get(self, ids: Sequence[str]) -> np.ndarray:
        """The vectors of these ids, float32 (len(ids), D), in this order. Raises ValueError for an unknown id."""
        self._check_known(ids)
        return self._get(ids)

    def add(self, vectors: np.ndarray, ids: Sequence[str]) -> None:
        """Append rows. Raises ValueError for an id that the index already holds, or vectors of another width."""
        _check_rows(vectors, ids)
        if vectors.shape[1] != self.dimensions:
            raise ValueError(f"vectors have {vectors.shape[1]} dimensions, the index {self.dimensions}")
        for name in ids:
            if name in self.row_of:
                raise ValueError(f"the index already holds '{name}'; remove it first to replace it")
        self._append(np.ascontiguousarray(vectors, np.float32), tuple(ids))
        before, self.ids = len(self.ids), self.ids + tuple(ids)
        # A new dict, as clones and searches under way may hold the old one.
        self.row_of = self.row_of | {name: row for row, name in enumerate(ids, start=before)}

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows; the others keep their order. Raises ValueError for an unknown id."""
        self._check_known(ids)
        gone = set(ids)
        keep = np.ones(len(self.ids), bool)
        keep[[self.row_of[name] for name in gone]] = False
        self._delete(keep)
        self._name([name for name in self.ids if name not in gone])

    def sync(self, vectors: np.ndarray, ids: Sequence[str]) -> tuple[int, int, int]:
        """Update the index to exactly these rows, changing as few as possible; returns how many it removed, added and kept."""
        shared = [row for row, name in enumerate(ids) if name in self.row_of]
        same: set[str] = set()
        for start in range(0, len(shared), BLOCK):
            part = shared[start : start + BLOCK]
            before = self.get([ids[row] for row in part])
            unchanged = np.abs(before - vectors[part]).max(axis=1) < 1e-6
            same.update(ids[row] for row, equal in zip(part, unchanged, strict=True) if equal)
        gone = tuple(name for name in self.ids if name not in same)
        new = np.array([name not in same for name in ids], bool)
        if gone:
            self.remove(gone)
        if new.any():
            self.add(vectors[new], tuple(name for name in ids if name not in same))
        return len(gone), int(new.sum()), len(same)

    def search(self, vectors: np.ndarray, query_ids: tuple[str, ...], k: int) -> Ranking:
        """The k best rows for each query, float32 (Q, D); ties are in the gallery's order. Raises ValueError for a bad k."""
        check_k(k, len(self.ids))
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise ValueError(f"queries are {vectors.shape}, the index holds vectors of {self.dimensions} dimensions")
        scores, positions = self._search(np.ascontiguousarray(vectors, np.float32), k)
        return Ranking(query_ids, self.ids, positions, scores)

    def save(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Write the ids, the data of the index, and last the manifest with `about` (plain values)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)  # without it, the folder does not count as an index
        replace_file(folder / "ids.json", lambda part: part.write_text(json.dumps(self.ids), encoding="utf-8"))
        self._save(folder)
        manifest = self.describe() | about | {"rows": len(self.ids), "dimensions": self.dimensions}
        replace_file(folder / "manifest.json", lambda part: part.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))

    def load(self, folder: str | Path, about: dict[str, Any]) -> Self:
        """Read a saved index. Raises ValueError with the name of a key that differs from `about`."""
        folder = Path(folder)
        remedy = "type another index_dir, or delete this one"
        manifest = check_manifest(folder / "manifest.json", self.describe() | about, remedy)
        self.dimensions = manifest["dimensions"]
        ids = tuple(json.loads((folder / "ids.json").read_text(encoding="utf-8")))
        rows = self._load(folder)
        if not rows == len(ids) == len(set(ids)):
            raise ValueError(f"'{folder}' has {rows} vectors for {len(ids)} ids ({len(set(ids))} different); {remedy}")
        self._name(ids)
        return self

    def _name(self, ids: Sequence[str]) -> None:
        self.ids = tuple(ids)
        self.row_of = {name: row for row, name in enumerate(self.ids)}

    def _check_known(self, ids: Sequence[str]) -> None:
        unknown: Set[str] = {name for name in ids if name not in self.row_of}
        if unknown:
            held = f"it holds {len(self.ids)} ids, such as '{self.ids[0]}'" if self.ids else "it is empty"
            raise ValueError(f"the index holds no '{min(unknown)}'; {held}")

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that searching needs: the vectors and the data derived from them."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that must be the same in a saved index for this one to load it."""

    @abstractmethod
    def _replace(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        """Replace all rows by these, float32 (N, D)."""

    @abstractmethod
    def _append(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        """Append these rows, float32 (N, D)."""

    @abstractmethod
    def _delete(self, keep: np.ndarray) -> None:
        """Remove the rows for which `keep`, bool (rows,), is false."""

    @abstractmethod
    def _get(self, ids: Sequence[str]) -> np.ndarray:
        """Rows by their ids, float32 (len(ids), D); ids may repeat."""

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 (Q, k) and positions int64 (Q, k), best first, ties by position."""

    @abstractmethod
    def _save(self, folder: Path) -> None:
        """Write what `_load` needs besides ids and manifest."""

    @abstractmethod
    def _load(self, folder: Path) -> int:
        """Read what `_save` wrote; returns the number of rows."""


def _check_rows(vectors: np.ndarray, ids: Sequence[str]) -> None:
    if vectors.ndim != 2 or len(vectors) != len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids)} ids ({len(set(ids))} different) do not fit vectors of shape {vectors.shape}")
