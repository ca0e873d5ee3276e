"""Ten million descriptors in less than 4 GB: how long indexing and searching take, and what share of true neighbours is found.

python benchmarks/scale.py --rows 10000000 --dim 64

Synthetic: directions of 16 hidden dimensions and noise, and queries that are rows with more noise. A float16 copy lies on
disk, an int8 one in memory; an approximate answer's first 100 are scored again from float16. The truth is a search of all
rows in float32. With --milvus http://HOST:19530 the same rows also go to that server (index=milvus), whose memory is its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from beauty_bafe.extraction.describing import peak_memory
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.milvus_index import MilvusIndex

BLOCK = 1 << 16
HIDDEN = 16
QUERIES = 256
DEPTH, K = 100, 7
LIMIT = 4e9  # bytes


def draw(rows: int, dim: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of length 1, float32, block by block; the same ones every time."""
    hidden = np.random.default_rng(0).standard_normal((HIDDEN, dim), np.float32)
    for start in range(0, rows, BLOCK):
        rng = np.random.default_rng((1, start))
        size = min(BLOCK, rows - start)
        block = rng.standard_normal((size, HIDDEN), np.float32) @ hidden / HIDDEN**0.5
        block += 0.5 * rng.standard_normal((size, dim), np.float32)
        yield slice(start, start + size), block / np.linalg.norm(block, axis=1, keepdims=True)


def to_int8(vectors: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(vectors * scale), -127, 127).astype(np.int8)


def best(scan: Iterator[tuple[int, torch.Tensor]], k: int) -> np.ndarray:
    """Scores of blocks of rows, (Q, R) each with its first row -> the k best rows of each query, int64 (Q, k)."""
    scores, rows = None, None
    for start, block in scan:
        top = block.topk(min(k, block.shape[1]), dim=1)
        found = top.indices + start
        scores = top.values if scores is None else torch.cat([scores, top.values], 1)
        rows = found if rows is None else torch.cat([rows, found], 1)
        keep = scores.topk(min(k, scores.shape[1]), dim=1)
        scores, rows = keep.values, rows.gather(1, keep.indices)
    assert rows is not None
    return rows.numpy()


class Simulation:
    """`stored`: float16 (N, D) on disk; `codes`: int8 (N, D) in memory; `queries`: float32 (Q, D)."""

    def __init__(self, rows: int, dim: int, folder: Path) -> None:
        self.stored = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (rows, dim))
        self.codes = np.empty((rows, dim), np.int8)
        self.scale = 127 / min(1.0, 5 / dim**0.5)  # what is beyond five deviations is clipped
        for part, block in draw(rows, dim):
            self.stored[part], self.codes[part] = block, to_int8(block, self.scale)
        rng = np.random.default_rng(2)
        asked = self.stored[np.sort(rng.choice(rows, QUERIES, replace=False))].astype(np.float32)
        asked += 0.5 / dim**0.5 * rng.standard_normal(asked.shape, np.float32)
        self.queries = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
        self.truth = best(self._float_scan(), K)

    def _float_scan(self) -> Iterator[tuple[int, torch.Tensor]]:
        queries = torch.from_numpy(self.queries)
        for start in range(0, len(self.stored), BLOCK):
            yield start, queries @ torch.from_numpy(self.stored[start : start + BLOCK].astype(np.float32)).T

    def int8_flat(self, queries: np.ndarray) -> np.ndarray:
        """All rows in integers, the first 100 again from float16."""
        asked, codes = torch.from_numpy(to_int8(queries, self.scale)), torch.from_numpy(self.codes)
        scan = ((at, torch._int_mm(asked, codes[at : at + BLOCK].T)) for at in range(0, len(codes), BLOCK))
        return self.again(queries, best(scan, DEPTH))

    def again(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Candidates, int64 (Q, C), -1 for none -> the best K by their float16 rows."""
        scores = np.einsum("qd,qcd->qc", queries, self.stored[candidates].astype(np.float32))
        order = np.argsort(-np.where(candidates >= 0, scores, -np.inf), axis=1, kind="stable")[:, :K]
        return np.take_along_axis(candidates, order, axis=1)

    def measure(self, name: str, search: Callable[[np.ndarray], np.ndarray], index_bytes: float, built: float) -> None:
        def seconds(count: int) -> float:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                search(self.queries[:count])
                times.append(time.perf_counter() - start)
            return min(times)

        found = search(self.queries)
        recall = np.mean([len({*left} & {*right}) / K for left, right in zip(found, self.truth, strict=True)])
        one, many = seconds(1), seconds(QUERIES)
        print(
            f"| {name} | {built:.1f} | {index_bytes / len(self.stored):.0f} | {1e3 * one:.1f} | "
            f"{1e3 * many / QUERIES:.2f} | {recall:.4f} | {peak_memory() / 1e9:.2f} |",
            flush=True,
        )


def ivf(simulation: Simulation, factory: str, probes: list[int]) -> None:
    import faiss

    rows, dim = simulation.stored.shape
    lists = 1 << int(np.log2(max(1, min(4 * rows**0.5, rows / 39))))
    start = time.perf_counter()
    index = faiss.index_factory(dim, factory.format(lists=lists), faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid, index.cp.niter, index.cp.min_points_per_centroid = 64, 10, 1
    sample = np.sort(np.random.default_rng(3).choice(rows, min(rows, 64 * lists), replace=False))
    index.train(simulation.stored[sample].astype(np.float32))
    for at in range(0, rows, BLOCK):
        index.add(simulation.stored[at : at + BLOCK].astype(np.float32))
    built = time.perf_counter() - start
    for probe in probes:
        index.nprobe = probe

        def search(queries: np.ndarray) -> np.ndarray:
            return simulation.again(queries, index.search(queries, DEPTH)[1])

        name = f"faiss {factory.format(lists=lists)}, {probe} lists"
        simulation.measure(name, search, rows * (index.sa_code_size() + 8), built)


def milvus(simulation: Simulation, uri: str, kind: str) -> None:
    rows, dim = simulation.stored.shape
    index = MilvusIndex(uri, f"scale_{rows}x{dim}_{kind}", kind, overwrite=True, timeout=600)
    start = time.perf_counter()
    index.fit(simulation.stored.astype(np.float32), tuple(f"n{row:09d}" for row in range(rows)))
    built = time.perf_counter() - start

    def search(queries: np.ndarray) -> np.ndarray:
        return index.search(queries, tuple(map(str, range(len(queries)))), K).positions

    simulation.measure(f"{index}", search, index.nbytes, built)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--milvus", metavar="URI", help="a server to measure as well")
    parser.add_argument("--kinds", nargs="+", default=["hnsw", "ivf_sq8"], help="of index.kind, with --milvus")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        simulation = Simulation(given.rows, given.dim, Path(folder))
        print(f"{given.rows} x {given.dim} drawn and compared with {QUERIES} queries in {time.perf_counter() - start:.0f} s\n")
        print("| index | built, s | bytes a row | ms, one query | ms a query of 256 | recall@7 | peak memory, GB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        simulation.measure("int8, all rows", simulation.int8_flat, simulation.codes.nbytes, 0)
        if given.rows <= 2_000_000:  # 10 bytes a dimension would be above the limit
            exact = ExactIndex("ip").fit(simulation.stored.astype(np.float32), tuple(map(str, range(given.rows))))
            asked = tuple(map(str, range(QUERIES)))
            search = lambda queries: exact.search(queries, asked[: len(queries)], K).positions  # noqa: E731
            simulation.measure("index=exact", search, exact.nbytes, 0)
            del exact, search
        del simulation.codes
        ivf(simulation, "IVF{lists},SQ8", [16, 64])
        ivf(simulation, "IVF{lists},PQ32np", [64])
        print(
            f"\npeak memory {peak_memory() / 1e9:.2f} GB, {'below' if peak_memory() < LIMIT else 'NOT below'} {LIMIT / 1e9:.0f}"
        )
        for kind in given.kinds if given.milvus else []:
            milvus(simulation, given.milvus, kind)


if __name__ == "__main__":
    main()
