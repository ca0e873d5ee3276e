"""Descriptors of a gallery -> the nearest ones of each query. The only file that imports faiss, and after torch."""

from __future__ import annotations

import numpy as np
import torch  # noqa: F401  # first: loaded after faiss, torch can find faiss's OpenMP and hang

from .ranking import Ranking, check_k


class FlatIndex:
    """Exact search by inner product (cosine, as descriptors have length 1) with FAISS; `device` is auto, cpu or gpu.

    Raises ValueError for device=gpu where faiss sees none.
    """

    def __init__(self, device: str) -> None:
        import faiss

        if device not in ("auto", "cpu", "gpu"):
            raise ValueError(f"index.device={device}: type auto, cpu or gpu")
        gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        if device == "gpu" and not gpus:
            raise ValueError("index.device=gpu, but faiss sees no GPU here (or is faiss-cpu); type index.device=cpu or auto")
        self.on_gpu = device != "cpu" and gpus > 0
        self._ids: tuple[str, ...] = ()

    def fit(self, vectors: np.ndarray, ids: tuple[str, ...]) -> FlatIndex:
        """Take the gallery: float32 (N, D) and its N ids."""
        import faiss

        self._ids = ids
        self._index: faiss.Index = faiss.IndexFlatIP(vectors.shape[1])
        if self.on_gpu:
            self._index = faiss.index_cpu_to_all_gpus(self._index)
        self._index.add(np.ascontiguousarray(vectors, np.float32))
        return self

    def search(self, vectors: np.ndarray, query_ids: tuple[str, ...], k: int) -> Ranking:
        """The k best of every query, float32 (Q, D). Equal scores are in the gallery's order. Raises ValueError for a bad k."""
        check_k(k, len(self._ids))
        scores, positions = self._index.search(np.ascontiguousarray(vectors, np.float32), k)
        order = np.lexsort((positions, -scores), axis=1)  # faiss leaves the order of equal scores open
        return Ranking(query_ids, self._ids, np.take_along_axis(positions, order, 1), np.take_along_axis(scores, order, 1))
