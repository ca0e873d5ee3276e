"""FAISS indexes, exact and approximate. The only file that imports faiss, always after torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch  # noqa: F401  # first: loaded after faiss, torch can find faiss's OpenMP and hang

from ..manifest import replace_file
from ..models.precision import check_device
from .exact import ExactIndex
from .memory_index import MemoryIndex

log = logging.getLogger("beauty_bafe")

GPU_MOST = 2048  # faiss's largest k, and nprobe, on a GPU
GPU_TABLES = 48 << 10  # bytes of shared memory that faiss may use per block
SAMPLES = 200  # gallery rows that serve as queries when an approximate index is tuned


class FaissIndex(MemoryIndex):
    """Any FAISS index by its factory string ("Flat", "IVF4096,Flat", "IVF4096,PQ64np", "HNSW32"), on CPU or GPUs.

    `device`: auto for all GPUs that faiss sees, or the CPU if there are none; gpu, cuda or cuda:N for one GPU; cpu (also
    for mps, which faiss does not support).

    In `factory`, `{lists}` stands for a number of lists that suits the gallery, `{bytes}` for a PQ code size that divides
    its width. `target_recall` (0 to 1): nprobe or efSearch becomes the smallest value that finds this share of the `tune_k`
    true neighbours of gallery samples; None for faiss's default. `float16`: halves the memory on GPUs; product quantisers
    with more than 48 parts always use it. `temp_memory`: scratch space per GPU, in MiB. Ties among the rows that faiss
    returns are in the gallery's order.

    Raises ValueError for a GPU that faiss does not see, or a factory string that faiss rejects.
    """

    def __init__(
        self,
        factory: str,
        metric: str = "ip",
        device: str = "auto",
        float16: bool = False,
        temp_memory: int = 512,
        target_recall: float | None = None,
        tune_k: int = 10,
    ) -> None:
        import faiss

        super().__init__(metric)
        check_device(device, "index.device")
        seen = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
        number = int(device.partition(":")[2] or 0)
        if device.startswith(("gpu", "cuda")) and number >= seen:
            raise ValueError(
                f"index.device={device}, but faiss sees {seen or 'no'} GPU here (or is faiss-cpu); "
                "type index.device=cpu or auto"
            )
        if target_recall is not None and not 0 < target_recall <= 1:
            raise ValueError(f"index.target_recall={target_recall}: type a number above 0 and up to 1, or null")
        self.gpus = list(range(seen)) if device == "auto" else [number] if device.startswith(("gpu", "cuda")) else []
        self.factory, self.float16, self.temp_memory = factory, float16, temp_memory
        self.target_recall, self.tune_k = target_recall, tune_k
        self._one_at_a_time = threading.Lock()  # faiss's GPU indexes share scratch space

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._index.sa_code_size() * len(self.vectors)

    def describe(self) -> dict[str, Any]:
        return {"index": f"faiss {self.factory}", "metric": self.metric, "target_recall": self.target_recall}

    def __str__(self) -> str:
        return f"faiss {self.factory} {self.metric} on {f'{len(self.gpus)} GPU' if self.gpus else 'cpu'}"

    def _build(self) -> None:
        import faiss

        metrics = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2, "l1": faiss.METRIC_L1}
        rows, width = self.vectors.shape
        # The least number of lists that faiss recommends (4 times the root), but at least 39 training rows per list.
        lists = 1 << max(0, int(np.log2(max(1, min(4 * rows**0.5, rows / 39)))))
        codes = next(size for size in range(max(1, min(64, width // 4)), 0, -1) if width % size == 0)
        text = self.factory.format(lists=lists, bytes=codes)
        self._labels, self._next = np.zeros(0, np.int64), 0
        self._index: Any
        try:
            index = faiss.index_factory(width, text, metrics[self.metric])
            if not index.is_trained:
                for part in (index, getattr(index, "pq", None)):
                    if (clustering := getattr(part, "cp", None)) is not None:
                        clustering.min_points_per_centroid = 1  # no warning for small galleries
                if (lists_from := getattr(index, "cp", None)) is not None:
                    # A quarter of faiss's points and 10 of its 25 iterations: half a million rows in minutes instead of 15.
                    lists_from.max_points_per_centroid, lists_from.niter = 64, 10
                index.train(self.vectors)
            # Labels that stay the same when rows are removed: inverted lists have them, other kinds need a map.
            self._index = index if "IVF" in text else faiss.IndexIDMap2(index)
            self._grown(0)
            self._index.search(self.vectors[:1], 1)  # some kinds check the metric only when searched
        except RuntimeError as error:
            reason = str(error).rpartition(": ")[2].strip()
            raise ValueError(
                f"faiss rejects index.factory={text} for {rows} x {width} vectors, {self.metric}: {reason}"
            ) from error
        if self.target_recall is not None:
            self._tune()

    def clone(self) -> Self:
        import faiss

        twin = super().clone()
        twin._index = faiss.clone_index(self._index)
        return twin

    def _grown(self, before: int) -> None:
        new = np.arange(self._next, self._next + len(self.vectors) - before, dtype=np.int64)
        for start in range(0, len(new), 1 << 16):  # in parts, as faiss copies its input
            part = slice(start, start + (1 << 16))
            self._index.add_with_ids(np.ascontiguousarray(self.vectors[before:][part]), new[part])
        self._labels = np.concatenate([self._labels, new])
        self._next += len(new)
        self._to_gpu()

    def _shrunk(self, keep: np.ndarray) -> None:
        gone, self._labels = self._labels[~keep], self._labels[keep]
        if "HNSW" in self.factory:
            log.info("index: rows cannot be removed from an HNSW graph, so it is built again")
            self._build()
            return
        self._index.remove_ids(gone)
        self._to_gpu()

    def _to_gpu(self) -> None:
        import faiss

        self._on_gpu = None
        if not self.gpus or "HNSW" in self.factory:
            return
        options = faiss.GpuMultipleClonerOptions()
        options.useFloat16, options.shard = self.float16 or needs_half_tables(self._index), len(self.gpus) > 1
        resources = [faiss.StandardGpuResources() for _ in self.gpus]
        for resource in resources:
            resource.setTempMemory(self.temp_memory << 20)
        self._resources = resources  # faiss does not keep them alive
        self._on_gpu = faiss.index_cpu_to_gpu_multiple_py(resources, self._index, co=options, gpus=self.gpus)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        # A GPU index returns at most GPU_MOST rows; its CPU counterpart has the same rows.
        index = self._on_gpu if self._on_gpu is not None and k <= GPU_MOST else self._index
        with self._one_at_a_time if index is self._on_gpu else nullcontext():
            scores, labels = index.search(queries, k)
        missing = (labels < 0).any(axis=1)
        if missing.any():
            # An approximate index may visit fewer than k rows; such queries are compared with all rows.
            scores[missing], positions = self._exactly(queries[missing], k, "cpu")
            scores[missing] *= 1 if self.metric == "ip" else -1
            labels[missing] = self._labels[positions]
        positions = np.searchsorted(self._labels, labels)
        scores = scores if self.metric == "ip" else -scores
        order = np.lexsort((positions, -scores), axis=1)  # faiss returns ties in any order
        return np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)

    def _exactly(self, queries: np.ndarray, k: int, device: str) -> tuple[np.ndarray, np.ndarray]:
        exact = ExactIndex(self.metric, device)
        exact._replace(self.vectors)
        return exact._search(queries, k)

    def _tune(self) -> None:
        """Raise nprobe or efSearch through the powers of two until the target is met, printing the recall of each."""
        rows = np.random.default_rng(0).choice(len(self.vectors), min(SAMPLES, len(self.vectors)), replace=False)
        k = min(self.tune_k, len(self.vectors) - 1)
        samples = self.vectors[rows]
        true = self._exactly(samples, k + 1, "auto" if self.gpus else "cpu")[1]
        for value, set_to in self._steps():
            set_to(value)
            found = self._search(samples, k + 1)[1]
            # Every sample finds itself, so only its neighbours count.
            hits = [len((set(a) & set(b)) - {r}) for a, b, r in zip(found, true, rows, strict=True)]
            recall = sum(hits) / sum(len(set(b) - {r}) for b, r in zip(true, rows, strict=True))
            log.info(f"index: {self._knob} {value}: recall@{k} {recall:.4f} of {len(rows)} gallery samples")
            if self.target_recall is not None and recall >= self.target_recall:
                return
        raise ValueError(
            f"{self.factory} does not reach index.target_recall={self.target_recall}: {recall:.4f} at {self._knob} {value}; "
            "lower it, or type index=ivf_flat or index=exact"
        )

    def _steps(self) -> list[tuple[int, Callable[[int], None]]]:
        import faiss

        if "HNSW" in self.factory:
            graph: Any = faiss.downcast_index(self._index.index)
            self._knob, most = "efSearch", len(self.vectors)

            def set_to(value: int) -> None:
                graph.hnsw.efSearch = value
        elif "IVF" in self.factory:
            lists = faiss.extract_index_ivf(self._index)
            self._knob, most = "nprobe", lists.nlist if not self.gpus else min(lists.nlist, GPU_MOST)

            def set_to(value: int) -> None:
                lists.nprobe = value
                self._to_gpu()
        else:
            raise ValueError(f"index.target_recall: {self.factory} has neither nprobe nor efSearch to tune; leave it null")
        values = [1 << power for power in range(most.bit_length()) if 1 << power < most]
        return [(value, set_to) for value in [*values, most]]

    def _save(self, folder: Path) -> None:
        import faiss

        super()._save(folder)
        replace_file(folder / "index.faiss", lambda part: faiss.write_index(self._index, str(part)))
        replace_file(folder / "labels.npy", lambda part: part.write_bytes(self._labels.tobytes()))

    def _load(self, folder: Path) -> int:
        import faiss

        self._map(folder)
        self._index = faiss.read_index(str(folder / "index.faiss"))
        self._labels = np.frombuffer((folder / "labels.npy").read_bytes(), np.int64)
        self._next = int(self._labels.max(initial=-1)) + 1
        self._to_gpu()
        return min(len(self.vectors), self._index.ntotal)


def needs_half_tables(index: Any) -> bool:
    """Whether the tables of a product quantiser, 4 bytes per centre and part in float32, exceed the shared memory of a GPU."""
    import faiss

    lists = faiss.try_extract_index_ivf(index)
    quantiser = None if lists is None else getattr(faiss.downcast_index(lists), "pq", None)
    return quantiser is not None and 4 * quantiser.M * quantiser.ksub > GPU_TABLES


def kmeans(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` cluster centres, float32 (count, D), of float32 (N, D); always the same for the same input."""
    import faiss

    clustering = faiss.Kmeans(vectors.shape[1], count, niter=20, seed=0, min_points_per_centroid=1, verbose=False)
    clustering.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(clustering.centroids)
