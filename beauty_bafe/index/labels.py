"""The labels of the rows of a Milvus collection, which of them belong to an index, and the names of partitions."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from ..manifest import replace_file


@dataclass(frozen=True)
class Labels:
    """The rows of one index, in a collection that it may share with its clones. Immutable, so that clones can share it.

    `rows`: int64 (N,), the label of each row. `removed`: labels of rows removed since the index was last saved or loaded.
    `obsolete`: of rows removed before that, which no saved index refers to. `foreign`: of rows that searches found in the
    collection although they are not in this index. `order`: sorts `rows`; computed if None.

    Raises ValueError if two rows have the same label.
    """

    rows: np.ndarray
    removed: frozenset[int] = frozenset()
    obsolete: frozenset[int] = frozenset()
    foreign: frozenset[int] = frozenset()
    order: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.order is None:
            order = np.argsort(self.rows)
            object.__setattr__(self, "order", order)
            ordered = self.rows[order]
            if (ordered[1:] == ordered[:-1]).any():
                raise ValueError("two rows have the same hash, a chance of 1 in 2,000 with 10^8 rows; rename one of the ids")

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of labels, int64 (M,), and bool (M,): whether they are in this index at all."""
        place = np.minimum(np.searchsorted(self.rows, labels, sorter=self.order), len(self) - 1)
        positions = np.asarray(self.order)[place]
        return positions, self.rows[positions] == labels

    def with_added(self, labels: np.ndarray) -> Self:
        """These rows and `labels`, int64 (M,), after them."""
        back = set(labels.tolist())
        kept = {name: getattr(self, name) - back for name in ("removed", "obsolete", "foreign")}
        return replace(self, rows=np.concatenate([self.rows, labels]), order=None, **kept)

    def without(self, keep: np.ndarray) -> Self:
        """The rows where `keep`, bool (N,), is true."""
        gone = frozenset(self.rows[~keep].tolist())
        return replace(self, rows=self.rows[keep], order=None, removed=self.removed | gone, foreign=self.foreign | gone)

    def with_foreign(self, labels: set[int]) -> Self:
        """The same rows, and `labels` known to belong to others."""
        return replace(self, foreign=self.foreign | labels)

    def save(self, folder: Path) -> Self:
        """Write rows and removals; returns what to continue with."""
        removed = np.array(sorted(self.removed), np.int64)
        replace_file(folder / "labels.npy", lambda part: part.write_bytes(self.rows.tobytes()))
        replace_file(folder / "forgotten.npy", lambda part: part.write_bytes(removed.tobytes()))
        return replace(self, removed=frozenset(), obsolete=self.removed)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        rows, removed = (np.frombuffer((folder / f"{name}.npy").read_bytes(), np.int64) for name in ("labels", "forgotten"))
        obsolete = frozenset(removed.tolist())
        return cls(rows, obsolete=obsolete, foreign=obsolete)


def make_labels(vectors: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """A hash of each id and its vector: int64 (N,)."""
    rows = zip(ids, np.ascontiguousarray(vectors, np.float32), strict=True)
    return np.fromiter((_hash(name, vector.tobytes()) for name, vector in rows), np.int64, len(ids))


def _hash(text: str, content: bytes = b"") -> int:
    """63 bits."""
    key = text.encode("utf-8", "surrogatepass")  # file names need not be valid Unicode
    state = hashlib.blake2b(len(key).to_bytes(4, "little") + key + content, digest_size=8)
    return int.from_bytes(state.digest(), "little") >> 1


def category_code(category: str) -> str:
    return f"{_hash(category):016x}"


def read_categories(file: str) -> dict[str, str]:
    with open(file, newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"id", "category"} <= rows[0].keys():
        raise ValueError(f"index.categories={file}: give a csv with the columns id,category")
    return {row["id"]: row["category"] for row in rows}
