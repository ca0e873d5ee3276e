"""What every index has: rows with ids, growth, shrinkage, and a folder it can be kept in."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Self

import numpy as np

from .manifest import check_manifest, replace_file
from .ranking import Ranking, check_k

METRICS = ("ip", "l2", "l1")


class Index(ABC):
    """Descriptors of a gallery -> the nearest ones of each query.

    `metric`: "ip" (inner product; cosine, as descriptors have length 1), "l2" (squared) or "l1". Scores rise with
    likeness, so distances come with a minus. `vectors`, float32 (N, D), and `ids`, N names, are the gallery in its order.
    """

    def __init__(self, metric: str) -> None:
        if metric not in METRICS:
            raise ValueError(f"index.metric={metric}: type {', '.join(METRICS)}")
        self.metric = metric
        self.vectors = np.zeros((0, 0), np.float32)
        self.ids: tuple[str, ...] = ()

    def fit(self, vectors: np.ndarray, ids: tuple[str, ...]) -> Self:
        """Take the gallery: float32 (N, D) and its N ids. Raises ValueError where they do not fit each other."""
        _check_rows(vectors, ids, None)
        self.vectors, self.ids = np.ascontiguousarray(vectors, np.float32), tuple(ids)
        self._build()
        return self

    def clone(self) -> Self:
        """An index of the same rows; adding to it or removing from it leaves this one as it is."""
        return copy.copy(self)

    def get(self, ids: Sequence[str]) -> np.ndarray:
        """The vectors of these ids, float32 (len(ids), D), in their order. Raises ValueError for an id that is not there."""
        wanted, rows = set(ids), {}
        for row, name in enumerate(self.ids):
            if name in wanted:
                rows[name] = row
        if missing := wanted.difference(rows):
            raise self._unknown(missing)
        return np.asarray(self.vectors[np.array([rows[name] for name in ids], np.int64)])

    def add(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        """Append rows. Raises ValueError for an id that is already there or another width."""
        _check_rows(vectors, ids, self.vectors.shape[1])
        present = set(self.ids)
        for name in ids:
            if name in present:
                raise ValueError(f"the index already holds '{name}'; remove it first to replace it")
        before = len(self.ids)
        self.vectors = np.concatenate([self.vectors, np.asarray(vectors, np.float32)])
        self.ids += tuple(ids)
        self._grown(before)

    def remove(self, ids: tuple[str, ...]) -> None:
        """Drop rows; the others keep their order. Raises ValueError for an id that is not there."""
        gone = set(ids)
        unknown = gone.difference(self.ids)
        if unknown:
            raise self._unknown(unknown)
        keep = np.array([name not in gone for name in self.ids])
        self.vectors = self.vectors[keep]
        self.ids = tuple(name for name in self.ids if name not in gone)
        self._shrunk(keep)

    def _unknown(self, ids: Set[str]) -> ValueError:
        return ValueError(f"the index holds no '{min(ids)}'; it has {len(self.ids)} ids, the first '{self.ids[:1]}'")

    def sync(self, vectors: np.ndarray, ids: tuple[str, ...]) -> tuple[int, int, int]:
        """Change as little as needed to hold exactly these rows; how many were removed, added and kept."""
        old = {name: row for row, name in enumerate(self.ids)}
        shared = [row for row, name in enumerate(ids) if name in old]
        same: set[str] = set()
        for start in range(0, len(shared), 1 << 14):
            part = shared[start : start + (1 << 14)]
            before = self.vectors[[old[ids[row]] for row in part]]
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
        """The k best of every query, float32 (Q, D). Equal scores are in the gallery's order. Raises ValueError for a bad k."""
        check_k(k, len(self.ids))
        if vectors.ndim != 2 or vectors.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"queries are {vectors.shape}, the index holds vectors of {self.vectors.shape[1]} dimensions")
        scores, positions = self._search(np.ascontiguousarray(vectors, np.float32), k)
        return Ranking(query_ids, self.ids, positions, scores)

    def save(self, folder: str | Path, about: dict[str, Any]) -> None:
        """Write vectors, ids, what the index itself needs, and last the manifest with `about` (plain values)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)  # a folder without one is not an index
        replace_file(folder / "vectors.npy", lambda part: _save_npy(part, self.vectors))
        replace_file(folder / "ids.json", lambda part: part.write_text(json.dumps(self.ids), encoding="utf-8"))
        self._save(folder)
        manifest = self.describe() | about | {"rows": len(self.ids), "dimensions": int(self.vectors.shape[1])}
        replace_file(folder / "manifest.json", lambda part: part.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))

    def load(self, folder: str | Path, about: dict[str, Any]) -> Self:
        """Read what `save` wrote; vectors stay on disk, mapped. Raises ValueError naming the key that differs from `about`."""
        folder = Path(folder)
        check_manifest(folder / "manifest.json", self.describe() | about, "type another index_dir, or delete this one")
        self.vectors = np.load(folder / "vectors.npy", mmap_mode="c")  # copy on write: torch wants writable memory
        self.ids = tuple(json.loads((folder / "ids.json").read_text(encoding="utf-8")))
        _check_rows(self.vectors, self.ids, None)
        self._load(folder)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that answering needs: the vectors and what the index makes of them."""
        return self.vectors.nbytes

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a saved index must share with this one, plain values."""

    @abstractmethod
    def _build(self) -> None: ...

    @abstractmethod
    def _grown(self, before: int) -> None: ...

    @abstractmethod
    def _shrunk(self, keep: np.ndarray) -> None: ...

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 (Q, k) and positions int64 (Q, k), best first, equal scores by position."""

    @abstractmethod
    def _save(self, folder: Path) -> None: ...

    @abstractmethod
    def _load(self, folder: Path) -> None: ...


def _check_rows(vectors: np.ndarray, ids: tuple[str, ...], width: int | None) -> None:
    if vectors.ndim != 2 or len(vectors) != len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids)} ids ({len(set(ids))} different) do not fit vectors of shape {vectors.shape}")
    if width is not None and vectors.shape[1] != width:
        raise ValueError(f"vectors have {vectors.shape[1]} dimensions, the index {width}")


def _save_npy(part: Path, vectors: np.ndarray) -> None:
    with part.open("wb") as stream:  # np.save would append .npy to the name
        np.save(stream, vectors)
