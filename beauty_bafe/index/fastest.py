"""The fastest exact index for the size of the gallery and the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np

from .exact import ExactIndex, search_device
from .faiss_index import FaissIndex
from .memory_index import MemoryIndex

SMALL = 1 << 22  # numbers (rows x dimensions) below which faiss was faster, see benchmarks/retrieval.md


class FastestIndex(MemoryIndex):
    """`ExactIndex`, or faiss's flat index for small galleries on a CPU, for which the bound costs more than it saves.

    Both are exact. The choice is made again whenever the gallery grows or shrinks; `str(index)` says which was made.
    """

    def __init__(self, metric: str = "ip", device: str = "auto") -> None:
        super().__init__(metric)
        self.device = search_device(device)
        self._chosen: MemoryIndex | None = None

    @property
    def nbytes(self) -> int:
        return super().nbytes if self._chosen is None else self._chosen.nbytes

    def describe(self) -> dict[str, Any]:
        return {"index": "fastest", "metric": self.metric}

    def __str__(self) -> str:
        if self._chosen is None:
            return f"fastest {self.metric} on {self.device}"
        rows, width = self.vectors.shape
        where = "below" if self._is_small() else "not below"
        why = f"{rows * width / 1e6:.1f} million numbers, {where} {SMALL / 1e6:.1f}" if self.device == "cpu" else "on a GPU"
        return f"{self._chosen}, the fastest ({why})"

    def _is_small(self) -> bool:
        return self.device == "cpu" and self.vectors.size < SMALL

    def _build(self) -> None:
        self._chosen = self._choose()
        self._chosen._replace(self.vectors)

    def _choose(self) -> MemoryIndex:
        return FaissIndex("Flat", self.metric, "cpu") if self._is_small() else ExactIndex(self.metric, self.device)

    def _save(self, folder: Path) -> None:
        if isinstance(self._chosen, ExactIndex):
            self._chosen._save(folder)
        else:
            super()._save(folder)

    def _load(self, folder: Path) -> int:
        self._map(folder)
        self._chosen = self._choose()
        if isinstance(self._chosen, ExactIndex):
            self._chosen._load(folder)
            self.vectors = self._chosen.vectors
        else:
            self._chosen._replace(self.vectors)
        return len(self.vectors)

    def clone(self) -> Self:
        twin = super().clone()
        twin._chosen = None if self._chosen is None else self._chosen.clone()
        return twin

    def _grown(self, before: int) -> None:
        if not isinstance(self._chosen, ExactIndex):
            self._build()
            return
        self._chosen.vectors = self.vectors
        self._chosen._grown(before)

    def _shrunk(self, keep: np.ndarray) -> None:
        if not isinstance(self._chosen, ExactIndex) or self._is_small():
            self._build()
            return
        self._chosen.vectors = self.vectors
        self._chosen._shrunk(keep)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._chosen is not None
        return self._chosen._search(queries, k)
