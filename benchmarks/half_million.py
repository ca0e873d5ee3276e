"""Half a million pictures' descriptors: stored, fused, indexed, searched, re-ranked, kept, loaded, extended; time and memory.

python benchmarks/half_million.py --checkpoint RUN/checkpoints/best.ckpt --rows 500000

Descriptors of toy pictures are extracted for real; the other rows are synthetic: random mixtures of two real ones plus
noise. With --memory it measures instead how the peak memory of extraction grows with the number of pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.data.toy import draw_toy
from beauty_bafe.extraction.describing import peak_memory
from beauty_bafe.extraction.features import Features
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.extraction.store import Picture, Store
from beauty_bafe.index.base import Index
from beauty_bafe.index.faiss_index import FaissIndex
from beauty_bafe.index.fastest import FastestIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.pooling import spoc
from beauty_bafe.rerank import descriptors
from beauty_bafe.rerank.candidates import Candidates
from beauty_bafe.retrieval.ensemble import Concatenation

ATTENTION = Pooling(spoc, saliency=True)
SHARD = 2048
QUERIES = 1000


@contextmanager
def stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    now = psutil.Process().memory_info().rss
    print(
        f"{name:52s} {time.perf_counter() - start:8.1f} s   memory {now / 1e9:5.2f} GB, peak {peak_memory() / 1e9:5.2f} GB",
        flush=True,
    )


def fill(folder: Path, real: np.ndarray, rows: int) -> tuple[Store, list[Picture]]:
    """A store of `rows` descriptors, the real ones first."""
    pictures = [(f"n{row:07d}", "1") for row in range(rows)]
    store = Store(folder, {"checkpoint": "half a million"})
    store.begin(pictures, {})
    rng = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        part = pictures[start : start + SHARD]
        pair, share = rng.integers(len(real), size=(2, len(part))), rng.random((len(part), 1), np.float32)
        vectors = share * real[pair[0]] + (1 - share) * real[pair[1]]
        vectors += 0.3 / real.shape[1] ** 0.5 * rng.standard_normal(vectors.shape, np.float32)
        if start < len(real):
            vectors[: len(real) - start] = real[start : start + len(part)]
        store.append(part, {"vectors": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)}, {})
    return store, pictures


def simulate(checkpoint: str, rows: int, toys: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with stage(f"drawn {toys} toy products, {QUERIES} queries"):
            toy = draw_toy(root, products=toys, queries=QUERIES, seed=1, size=256)
        extraction, members = FeatureExtraction(root / "features"), load_members(checkpoint, {"attention": ATTENTION})
        with stage("described them"):
            (real,) = extraction(members, from_folder(toy / "gallery"), str(toy / "gallery"), "toy products", Skipped())
            (queries,) = extraction(members, from_folder(toy / "queries"), str(toy / "queries"), "toy queries", Skipped())
        with stage(f"stored {rows} x {real.vectors.shape[1]} descriptors in shards"):
            store, pictures = fill(root / "store", real.vectors, rows)
        with stage("opened the store again"):
            store = Store(root / "store", store.key)
        with stage("read, checked"):
            gallery = Features(store.read(pictures)["vectors"], tuple(name for name, _ in pictures))
        with stage("ensemble learned and applied"):
            ensemble = Concatenation(zscore=False, weights=None)
            (view,) = ensemble.fit([gallery]).transform([gallery])
            (asked,) = ensemble.transform([queries])
            del gallery
        with stage("indexed, fastest"):
            index = FastestIndex().fit(view.vectors, view.ids)
            del view
        search_and_rerank(index, asked)
        with stage("saved"):
            index.save(root / "index", {})
        before = index.search(asked.vectors, asked.ids, 7).positions
        del index
        with stage("loaded, vectors mapped from disk"):
            index = FastestIndex().load(root / "index", {})
        with stage(f"searched {QUERIES} queries, top 7, mapped"):
            assert np.array_equal(index.search(asked.vectors, asked.ids, 7).positions, before)
        new = tuple(f"new{row}" for row in range(5000))
        with stage("5,000 added, 5,000 removed"):
            index.add(real.vectors[np.arange(5000) % len(real.vectors)] * np.float32(0.999), new)
            index.remove(new)
        with stage(f"searched {QUERIES} queries again"):
            assert np.array_equal(index.search(asked.vectors, asked.ids, 7).positions, before)
        with stage("ivf_flat trained, filled, tuned to recall 0.99"):
            approximate = FaissIndex("IVF{lists},Flat", target_recall=0.99).fit(index.get(index.ids), index.ids)
        with stage(f"ivf_flat searched {QUERIES} queries"):
            found = approximate.search(asked.vectors, asked.ids, 7).positions
        shares = [len(set(a) & set(b)) / 7 for a, b in zip(found, before, strict=True)]
        print(f"ivf_flat: {np.mean(shares):.4f} of the exact top 7")


def search_and_rerank(index: Index, queries: Features) -> None:
    with stage(f"searched {QUERIES} queries, top 7"):
        index.search(queries.vectors, queries.ids, 7)
    with stage(f"searched {QUERIES} queries, top 400"):
        found = Candidates(index.search(queries.vectors, queries.ids, 400), queries, index)
    steps = {
        "query expansion": descriptors.QueryExpansion(n=3, alpha=3.0),
        "k-reciprocal, depth 100": descriptors.KReciprocal(depth=100, k1=20, k2=6, weight=0.3),
        "diffusion, depth 200": descriptors.Diffusion(depth=200, k=20, seeds=5, alpha=0.9, gamma=3.0),
        "superglobal, depth 400": descriptors.SuperGlobal(depth=400, k=9, beta=0.15),
    }
    for name, step in steps.items():
        with stage(f"re-ranked {QUERIES} queries: {name}"):
            step(found)


def memory(counts: list[int]) -> None:
    """Peak memory of describing, a process a count: hard links to 2,000 toy pictures, a network of a few layers."""
    with tempfile.TemporaryDirectory() as folder:
        toy = draw_toy(Path(folder), products=2000, queries=1, seed=1, size=256)
        files = sorted((toy / "gallery").iterdir())
        for count in counts:
            gallery = Path(folder) / f"gallery{count}"
            gallery.mkdir()
            for number in range(count):
                os.link(files[number % len(files)], gallery / f"{number}{files[0].suffix}")
            words = [sys.executable, __file__, "--describe", str(gallery)]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            line = next(line for line in output.splitlines() if line.startswith("described"))
            print(f"{count:7d} pictures: peak memory {re.findall('peak memory ([0-9.]+) GB', line)[0]} GB; {line}", flush=True)


def describe(gallery: str) -> None:
    tiny = {"name": "test_efficientnet", "taps": [f"blocks.{n}" for n in range(4)], "last": "bn2", "size": 64, "hidden": 8}
    member = Member("tiny", "tiny", BackgroundAgnosticExtractor(**tiny, pretrained=False).eval(), ATTENTION)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        FeatureExtraction(folder)([member], from_folder(gallery), gallery, "pictures", Skipped())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a best.ckpt")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--toys", type=int, default=2000, help="rows extracted for real")
    parser.add_argument("--memory", type=int, nargs="+", metavar="PICTURES", help="measure extraction's memory at these counts")
    parser.add_argument("--describe", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.describe:
        describe(given.describe)
    elif given.memory:
        memory(given.memory)
    elif given.checkpoint:
        simulate(given.checkpoint, given.rows, given.toys)
    else:
        parser.error("--checkpoint or --memory is needed")


if __name__ == "__main__":
    main()
