"""Numbers that name the rows of a collection, and what its partitions are called."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence

import numpy as np


def make_labels(vectors: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """A hash of each id and vector: int64 (N,)."""
    rows = zip(ids, np.ascontiguousarray(vectors, np.float32), strict=True)
    return np.fromiter((_hash(name, vector.tobytes()) for name, vector in rows), np.int64, len(ids))


def _hash(text: str, content: bytes = b"") -> int:
    """63 bits."""
    key = text.encode("utf-8", "surrogatepass")  # file names may hold what is no Unicode
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
