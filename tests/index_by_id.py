"""An index that keeps its rows as a database would: by id, in no array, each copy of it in a place of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beauty_bafe.index.base import Index


class IndexById(Index):
    """Inner products in float64, everything compared with everything."""

    def __init__(self) -> None:
        super().__init__("ip")
        self.rows: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"index": "by id", "metric": self.metric}

    def _replace(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        self.rows = dict(zip(ids, vectors.copy(), strict=True))

    def _append(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        self.rows = self.rows | dict(zip(ids, vectors.copy(), strict=True))

    def _delete(self, keep: np.ndarray) -> None:
        self.rows = {name: self.rows[name] for name, kept in zip(self.ids, keep, strict=True) if kept}

    def _get(self, ids: Sequence[str]) -> np.ndarray:
        return np.array([self.rows[name] for name in ids], np.float32).reshape(len(ids), self.dimensions)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        names = sorted(self.rows)  # a database has an order of its own
        scores = (queries.astype(float) @ np.array([self.rows[name] for name in names], float).T).astype(np.float32)
        positions = np.array([self.row_of[name] for name in names])
        order = np.array([np.lexsort((positions, -row))[:k] for row in scores])
        return np.take_along_axis(scores, order, 1), positions[order]

    def _save(self, folder: Path) -> None:
        (folder / "rows.json").write_text(json.dumps({name: row.tolist() for name, row in self.rows.items()}))

    def _load(self, folder: Path) -> int:
        rows = json.loads((folder / "rows.json").read_text())
        self.rows = {name: np.array(row, np.float32) for name, row in rows.items()}
        return len(rows)
