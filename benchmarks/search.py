"""Exact search, ours beside FAISS, NumPy, PyTorch and (where installed) usearch, in one run.

python benchmarks/search.py --rows 500000 --dim 512 2048 --batch 1 32 1000
python benchmarks/search.py --rows 500000 --batch 1 1000 --data trained --checkpoint RUN/checkpoints/best.ckpt \\
  --gallery GALLERY --queries QUERIES
python benchmarks/search.py --rows 100000 --batch 1 --data trained ... --plot recall.png

`--data random`: independent random directions; no picture stands out, so that a first pass can rule out the fewest.
`--data trained`: the checkpoint's descriptors of GALLERY, the other rows mixtures of two of them and noise of length 0.3; the
queries are descriptors of QUERIES, repeated where they are fewer than the batch. `--plot`: speed against recall, beside
approximate indexes of FAISS whose best 100 are scored again in float32; building them takes minutes. The last line compares
the first and the last batch of the last dimension with FAISS's flat index and with the fastest of the peers, all of which
compute in float32.
Where OPENBLAS_CORETYPE or OPENBLAS_L2_SIZE are set, put `env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE` before the command:
NumPy is faster without them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch

from beauty_bafe import Retriever
from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.faiss_index import FaissIndex
from beauty_bafe.index.fastest import FastestIndex
from beauty_bafe.models.precision import pick_device

K, SINGLE = 7, 24  # answers; queries that are tried one by one for a batch of 1
BLOCK = 16_384
Search = Callable[[np.ndarray], np.ndarray]
Points = list[tuple[float, float]]  # recall, and queries per second


def unit(rows: int, dim: int, seed: int) -> np.ndarray:
    """Random directions, float32 (rows, dim)."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    for start in range(0, rows, BLOCK):
        vectors[start : start + BLOCK] /= np.linalg.norm(vectors[start : start + BLOCK], axis=1, keepdims=True)
    return vectors


def trained(rows: int, checkpoint: str, gallery: str, queries: str) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors of a gallery, float32 (rows, D), and of queries, float32 (Q, D); see the top of this file."""
    shop = Retriever.build([checkpoint], gallery, ["rerank=none", "rehearsal.views=0"])
    real, asked = (shop.describe(list(open_catalog(place).paths))[0] for place in (gallery, queries))
    rng, vectors = np.random.default_rng(0), np.empty((rows, real.shape[1]), np.float32)
    for start in range(0, rows, BLOCK):
        part = vectors[start : start + BLOCK]
        pair, share = rng.integers(len(real), size=(2, len(part))), rng.random((len(part), 1), np.float32)
        part[:] = share * real[pair[0]] + (1 - share) * real[pair[1]]
        part += 0.3 / part.shape[1] ** 0.5 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    vectors[: len(real)] = real[:rows]
    print(f"trained: {min(rows, len(real))} descriptors of {gallery}, the rest mixtures of two and noise; queries: {queries}")
    return vectors, asked


def panorama(gallery: np.ndarray) -> Search:
    """FAISS's flat index that rules out rows by Cauchy and Schwarz, after a rotation to the principal axes, in float32."""
    import faiss  # after torch

    rotation = faiss.PCAMatrix(gallery.shape[1], gallery.shape[1], 0, False)
    index = faiss.IndexPreTransform(rotation, faiss.IndexFlatIPPanorama(gallery.shape[1], 16))
    rotation.train(gallery[:20_000])
    rotation.b = faiss.Float32Vector()  # no centring, which would change the products
    rotation.have_bias = False
    index.is_trained = True
    index.add(gallery)
    return lambda queries: index.search(queries, K)[1]


def usearch(gallery: np.ndarray) -> dict[str, Search]:
    """usearch in float32; and in int8, one scale for all, whose best 100 are scored again in float32."""
    from usearch.index import MetricKind
    from usearch.index import search as compare

    scale = 127 / np.abs(gallery).max()
    codes = np.round(gallery * scale).astype(np.int8)

    def rescored(queries: np.ndarray) -> np.ndarray:
        rounded = np.round(queries * scale).clip(-127, 127).astype(np.int8)
        keys = compare(codes, rounded, 100, MetricKind.IP, exact=True).keys.reshape(len(queries), -1).astype(np.int64)
        scores = np.einsum("qd,qcd->qc", queries, gallery[keys])
        return np.take_along_axis(keys, np.argsort(-scores, axis=1, kind="stable")[:, :K], axis=1)

    return {
        "usearch exact": lambda queries: compare(gallery, queries, K, MetricKind.IP, exact=True).keys,
        "usearch int8": rescored,
    }


def numpy_search(gallery: np.ndarray) -> Search:
    def search(queries: np.ndarray) -> np.ndarray:
        scores = np.full((len(queries), 0), 0, np.float32)
        places = np.zeros((len(queries), 0), np.int64)
        for start in range(0, len(gallery), BLOCK):
            block = queries @ gallery[start : start + BLOCK].T
            best = np.argpartition(-block, min(K, block.shape[1] - 1), axis=1)[:, :K]
            scores = np.concatenate([scores, np.take_along_axis(block, best, 1)], axis=1)
            places = np.concatenate([places, best + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        return np.take_along_axis(places, order, 1)

    return search


def torch_search(gallery: np.ndarray, device: str) -> Search:
    rows = torch.from_numpy(gallery).to(device)

    @torch.inference_mode()
    def search(queries: np.ndarray) -> np.ndarray:
        asked = torch.from_numpy(queries).to(device)
        parts = []
        for start in range(0, len(rows), BLOCK):
            best = (asked @ rows[start : start + BLOCK].T).topk(K)
            parts.append((best.values, best.indices + start))
        values, places = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return places.gather(1, values.topk(K).indices).cpu().numpy()

    return search


def index_search(index: ExactIndex | FaissIndex) -> Search:
    def search(queries: np.ndarray) -> np.ndarray:
        return index.search(queries, tuple(map(str, range(len(queries)))), K).positions

    return search


def seconds(search: Search, batches: Sequence[np.ndarray], rounds: int) -> float:
    """Of one call, the mean over all batches, the best of `rounds`; short calls are repeated within a round."""
    best = np.inf
    for _ in range(rounds):
        calls, start = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - start < 0.3:
            for queries in batches:
                search(queries)
            calls += len(batches)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def same(ours: np.ndarray, theirs: np.ndarray, queries: np.ndarray, gallery: np.ndarray) -> tuple[bool, int]:
    """Whether the same rows stand at the same ranks, but for those whose float32 sums cannot be told apart; how many."""
    rows, ranks = np.nonzero(ours != theirs)
    asked = queries[rows].astype(float)
    gap = (asked * gallery[ours[rows, ranks]]).sum(1) - (asked * gallery[theirs[rows, ranks]]).sum(1)
    return bool((np.abs(gap) < 1e-6).all()), len(rows)


def approximate(gallery: np.ndarray, queries: np.ndarray, expected: np.ndarray, rounds: int) -> dict[str, Points]:
    """Recall of the expected rows, int64 (Q, K), and queries per second, one by one, at several settings of each index."""
    import faiss  # after torch

    lists = 4 * int(len(gallery) ** 0.5)
    kinds = {
        "HNSW32": ("efSearch", [100, 200, 400, 800]),
        f"IVF{lists},RaBitQ": ("nprobe", [8, 16, 32, 64, 128, 256]),
    }
    curves: dict[str, Points] = {}
    for kind, (name, values) in kinds.items():
        start = time.perf_counter()
        base = faiss.index_factory(gallery.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexRefineFlat(base)
        index.k_factor = 100 / K
        index.train(gallery)
        index.add(gallery)
        print(f" {kind}: built in {time.perf_counter() - start:.0f} s", flush=True)
        singles = np.split(queries, len(queries))
        for value in values:
            faiss.ParameterSpace().set_index_parameter(base, name, value)
            search: Search = lambda some: index.search(some, K)[1]  # noqa: B023, E731
            found = np.concatenate([search(one) for one in singles])
            recall = float(np.mean([len(np.intersect1d(*pair)) / K for pair in zip(found, expected, strict=True)]))
            rate = 1 / seconds(search, singles, rounds)
            curves.setdefault(kind, []).append((recall, rate))
            print(f"  {kind} {name}={value}: recall@{K} {recall:.4f}, {rate:.1f} queries/s", flush=True)
    return curves


def draw(curves: dict[str, Points], title: str, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel=f"recall@{K}", ylabel="queries per second, one by one", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def limits(device: str, rows: int, dim: int, batch: int) -> str:
    """Seconds that reading the rounded gallery once, and multiplying it with the batch, take at this device's measured best."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    memory = torch.ones(1 << 27, dtype=torch.float32, device=device)
    square = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    best = {}
    for name, work in (("read", lambda: memory.sum()), ("multiply", lambda: square @ square)):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        best[name] = min(times)
    bandwidth, arithmetic = memory.nbytes / best["read"], 2 * 4096**3 / best["multiply"]
    reading, multiplying = 2 * rows * dim / bandwidth, 2 * rows * dim * batch / arithmetic
    return (
        f"  limits in bfloat16: memory {1e3 * reading:.1f} ms ({bandwidth / 1e9:.0f} GB/s), "
        f"arithmetic {1e3 * multiplying:.1f} ms ({arithmetic / 1e12:.2f} TFLOP/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--data", choices=("random", "trained"), default="random")
    parser.add_argument("--plot", help="a PNG: speed against recall for one query, beside approximate indexes")
    for name in ("checkpoint", "gallery", "queries"):
        parser.add_argument(f"--{name}", help="with --data trained")
    given = parser.parse_args()
    device = pick_device(given.device)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{device}, {where}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, top {K}")
    if given.data == "trained":
        if not (given.checkpoint and given.gallery and given.queries):
            parser.error("--data trained needs --checkpoint, --gallery and --queries")
        rows, asked = trained(given.rows, given.checkpoint, given.gallery, given.queries)
        given.dim = [rows.shape[1]]
    last = ""
    for dim in given.dim:
        gallery = unit(given.rows, dim, 0) if given.data == "random" else rows
        ids = tuple(map(str, range(given.rows)))
        start = time.perf_counter()
        index = ExactIndex(device=device).fit(gallery, ids)
        print(f"{given.rows} x {dim}: {index}, built in {time.perf_counter() - start:.1f} s, {index.nbytes / 1e9:.2f} GB")
        print(f" index=fastest takes: {FastestIndex(device=device).fit(gallery, ids)}")
        flat = FaissIndex("Flat", device="auto" if device == "cuda" else "cpu").fit(gallery, ids)
        peers = {"exact": index_search(index), "faiss flat": index_search(flat), "torch float32": torch_search(gallery, device)}
        if "int8" in str(index):
            peers["exact, bfloat16"] = index_search(ExactIndex(device=device, first_pass="bfloat16").fit(gallery, ids))
        if device == "cpu":
            peers |= {"numpy": numpy_search(gallery), "faiss panorama": panorama(gallery)}
            if find_spec("usearch"):
                peers |= usearch(gallery)
            else:
                print("usearch is not installed: pip install usearch adds its rows")
        ratios = []
        for batch in given.batch:
            count = SINGLE if batch == 1 else batch  # how long one takes depends on the query
            queries = unit(count, dim, 1) if given.data == "random" else asked[np.arange(count) % len(asked)]
            batches = np.split(queries, count // batch)
            expected = peers["faiss flat"](queries)
            # usearch and Panorama take queries one by one: minutes for a thousand.
            tried = {n: search for n, search in peers.items() if not n.startswith(("usearch", "faiss p")) or batch <= 100}
            result = {
                name: np.concatenate([search(part).reshape(batch, K) for part in batches]) for name, search in tried.items()
            }
            times = {name: seconds(search, batches, given.rounds) for name, search in tried.items()}
            print(f" batch {batch}")
            for name in tried:
                agrees, swapped = same(np.asarray(result[name]).astype(np.int64), expected, queries, gallery)
                print(
                    f"  {name:15s} {1e3 * times[name]:10.1f} ms {batch / times[name]:10.1f} queries/s   "
                    f"exact is {times[name] / times['exact']:6.2f} times as fast   "
                    f"same top {K} {'yes' if agrees else 'no'}" + (f" ({swapped} within float32 rounding)" if swapped else "")
                )
            print(limits(device, given.rows, dim, batch), flush=True)
            agrees, _ = same(result["exact"], expected, queries, gallery)
            best = min(took for name, took in times.items() if not name.startswith("exact") and "int8" not in name)
            ratios.append((times["faiss flat"] / times["exact"], best / times["exact"], agrees))
            if given.plot and batch == 1:
                curves = approximate(gallery, queries, expected, given.rounds)
                curves |= {name: [(1.0, 1 / took)] for name, took in times.items()}
                draw(curves, f"{given.rows:,} x {dim}, {given.data}", given.plot)
        flat_ratios, best_ratios, agree = zip(ratios[0], ratios[-1], strict=True)
        last = (
            f"exact/faiss_flat {flat_ratios[0]:.2f} {flat_ratios[1]:.2f} best_float32_peer {best_ratios[0]:.2f} "
            f"{best_ratios[1]:.2f} identical {'yes' if all(agree) else 'no'}"
        )
    print(last)


if __name__ == "__main__":
    main()
