"""Every path on a CUDA GPU, measured, beside what limits it; writes benchmarks/gpu.md.

make gpu

Speeds are of random numbers and toy pictures; they say nothing of quality. A part that fails is named in the page, the others
are measured all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from beauty_bafe.config import compose
from beauty_bafe.data.catalog import Skipped, open_catalog
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member
from beauty_bafe.index.base import Index
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.faiss_index import FaissIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.pooling import gem
from beauty_bafe.models.precision import fastest_precision

ROOT = Path(__file__).parents[1].resolve()
GEM = Pooling(gem, saliency=False)
DEVICE = "gpu"  # tests run the parts on "cpu"
Lines = list[str]


def table(*rows: Sequence[object]) -> Lines:
    """A table of Markdown; the first row is its head."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [head, "|" + " --- |" * len(rows[0]), *body]


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The best of some runs after one that warms up."""
    best = float("inf")
    wait = torch.cuda.synchronize if DEVICE == "gpu" else lambda: None
    for number in range(repeats + 1):
        wait()
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start) if number else best
    return best


def torch_device() -> str:
    return "cuda" if DEVICE == "gpu" else "cpu"


def network(name: str) -> BackgroundAgnosticExtractor:
    """With pretrained weights if they need no download, or else random ones."""
    settings = dict(compose("train", [f"model={name}", "data.root=none"]).model)
    if name != "efficientnet_lite0":
        settings |= {"pretrained": False, "weights": None}
    return BackgroundAgnosticExtractor(**settings).eval()


def describe(extractor: BackgroundAgnosticExtractor, pictures: Path, features: Path, **options: object) -> np.ndarray:
    members = [Member("network", "network", extractor, GEM, False)]
    extraction = FeatureExtraction(features, runtime="torch", **options)  # type: ignore[arg-type]
    return extraction(members, open_catalog(pictures), str(pictures), "pictures", Skipped())[0].vectors


def draw_pictures(work: Path, products: int) -> Path:
    """The gallery of a toy catalogue."""
    from beauty_bafe.data.toy import draw_toy

    return draw_toy(work / "toy", products=products, queries=8, seed=7, size=256) / "gallery"


def train(work: Path, products: int, *overrides: str) -> float:
    """Images per second of the last of two epochs of train.py."""
    output = Path(tempfile.mkdtemp(dir=work))
    words = [
        "data=folder",
        f"data.root={draw_pictures(work, products)}",
        f"data.cache={work / 'cache'}",
        f"output_dir={output}",
    ]
    words += ["trainer.max_epochs=2", "objective.average=0", "data.val_max=16"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *overrides], check=True, cwd=ROOT)
    return float(json.loads((output / "metrics.json").read_text())["images_per_second"])


def training(work: Path, size: argparse.Namespace) -> Lines:
    rows = []
    for name, overrides in {"joint": ["objective=joint"], "frozen": ["objective=frozen"]}.items():
        for batch in size.train_batches:
            rate = train(work, size.products, f"device={DEVICE}", f"data.batch_size={batch}", *overrides)
            rows.append((name, batch, f"{rate:.0f}"))
    return table(("objective", "photos a batch", "images/s, loading included"), *rows)


def extraction(work: Path, size: argparse.Namespace) -> Lines:
    rows = []
    device, pictures = torch_device(), draw_pictures(work, size.products)
    for name in size.models:
        extractor = network(name)
        for precision in dict.fromkeys(["32-true", fastest_precision(device)]):
            engine = Engine(Describer(extractor, [GEM], False), device, precision, None, "torch")
            side = engine.describer.canvas
            batch = torch.randint(0, 256, (4 * engine.batch, 3, side, side), dtype=torch.uint8)
            batch = batch.pin_memory() if DEVICE == "gpu" else batch
            memory = len(batch) / seconds(lambda engine=engine, batch=batch: engine(batch))  # type: ignore[misc]
            options = {"device": DEVICE, "precision": precision}
            start = time.perf_counter()
            count = len(describe(extractor, pictures, Path(tempfile.mkdtemp(dir=work)), **options))
            files = count / (time.perf_counter() - start)
            rows.append((name, side, precision, f"{memory:.0f}", f"{files:.0f}"))
    return table(("model", "px", "precision", "images/s from memory", "images/s from files, starting included"), *rows)


def parity(work: Path, _size: argparse.Namespace) -> Lines:
    """Raises ValueError where a picture's vector is not the CPU's to a cosine of 0.999."""
    extractor, pictures = network("efficientnet_lite0"), draw_pictures(work, 64)
    exact = describe(extractor, pictures, work / "cpu", device="cpu", precision="32-true")
    rows = []
    for precision in dict.fromkeys(["32-true", fastest_precision(torch_device())]):
        cosine = (describe(extractor, pictures, work / "gpu", device=DEVICE, precision=precision) * exact).sum(axis=1)
        rows.append((precision, f"{cosine.min():.6f}", f"{np.median(cosine):.6f}"))
        if cosine.min() < 0.999:
            raise ValueError(f"in {precision} a vector has cosine {cosine.min():.6f} with the CPU's in float32, below 0.999")
    return table(("precision", "lowest cosine with the CPU's float32", "median"), *rows)


def unit_rows(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fitted(index: Index, gallery: np.ndarray) -> Index:
    return index.fit(gallery, [str(number) for number in range(len(gallery))])


def timed_search(index: Index, queries: np.ndarray, batch: int) -> float:
    """Milliseconds of a batch, without naming what was found."""
    return 1e3 * seconds(lambda: index._search(queries[:batch], 10))


def exact_search(_work: Path, size: argparse.Namespace) -> Lines:
    gallery, queries = unit_rows(size.rows, size.width, 0), unit_rows(4096, size.width, 1)
    index = ExactIndex(device=DEVICE)
    fitted(index, gallery)
    block = torch.empty(1 << 28, dtype=torch.uint8, device=torch_device())
    bandwidth = 2 * block.numel() / seconds(block.clone)  # read and written
    side = 8192 if DEVICE == "gpu" else 256
    one, other = (torch.randn(side, side, device=torch_device(), dtype=index.rounded) for _ in range(2))
    products = 2 * side**3 / seconds(lambda: one @ other)
    itemsize = 2 if index.rounded == torch.bfloat16 else 4
    rows = []
    for batch in (1, 4096):
        reading, multiplying = gallery.size * itemsize / bandwidth, 2 * gallery.size * batch / products
        name = "reading the rows" if reading > multiplying else "multiplying"
        rows.append((batch, f"{timed_search(index, queries, batch):.2f}", f"{1e3 * max(reading, multiplying):.2f}", name))
    head = ("queries at once", "ms", "ms at least", "which is")
    about = f"{size.rows:,} x {size.width}, first pass in {index.rounded}; {bandwidth / 1e9:.0f} GB/s and "
    return [f"{about}{products / 1e12:.0f} TFLOP/s were measured here.", "", *table(head, *rows)]


def faiss_search(_work: Path, size: argparse.Namespace) -> Lines:
    gallery, queries = unit_rows(size.rows, size.width, 0), unit_rows(4096, size.width, 1)
    queries = queries * 0.5 + gallery[:4096]  # with neighbours: random directions have none
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    true = fitted(ExactIndex(device=DEVICE), gallery)._search(queries, 10)[1]
    rows = []
    for factory in ("Flat", "IVF{lists},Flat", "IVF{lists},PQ64np"):
        start = time.perf_counter()
        index = fitted(FaissIndex(factory, device=DEVICE), gallery)
        built = time.perf_counter() - start
        found = index._search(queries, 10)[1]
        recall = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, true, strict=True)])
        ms = [f"{timed_search(index, queries, batch):.2f}" for batch in (1, 4096)]
        rows.append((factory, f"{built:.1f}", *ms, f"{recall:.4f}"))
    return table(("factory", "s to build", "ms, 1 query", "ms, 4096 queries", "recall@10"), *rows)


def short_memory(_work: Path, _size: argparse.Namespace) -> Lines:
    """A batch that does not fit is halved until it does, and gives the same vectors. Raises ValueError where it does not."""
    extractor = network("resnet50")
    pictures = torch.randint(0, 256, (512, 3, extractor.size, extractor.size), dtype=torch.uint8)
    expected = Engine(Describer(extractor, [GEM], False), "cuda", "32-true", 16, "torch")(pictures)[0]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / total + torch.cuda.memory_reserved() / total))
    try:
        engine = Engine(Describer(extractor, [GEM], False), "cuda", "32-true", 512, "torch")
        cosine = (engine(pictures)[0] * expected).sum(dim=1).min().item()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if engine.batch == 512 or cosine < 0.9999:
        raise ValueError(f"batches of {engine.batch} pictures within 1.5 GB, lowest cosine {cosine:.6f}")
    return [f"Asked for 512 pictures of ResNet-50 at once within 1.5 GB, it went down to {engine.batch}; cosine {cosine:.6f}."]


def _describe_alone(pictures: Path, features: Path, device: str) -> None:
    describe(network("efficientnet_lite0"), pictures, features, device=device)


def two_processes(work: Path, size: argparse.Namespace) -> Lines:
    """Two runs on one GPU and one store; where there are two GPUs, training and describing on both."""
    pictures = draw_pictures(work, size.products)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_describe_alone, args=(pictures, work / "both", DEVICE)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    if any(process.exitcode for process in both):
        raise RuntimeError(f"two processes on one GPU ended with {[process.exitcode for process in both]}")
    lines = ["Two processes at once on one GPU and one store: both finished."]
    if torch.cuda.device_count() < 2:
        return [*lines, "Training and describing on several GPUs: not measured, there is one GPU here."]
    rates = [train(work, size.products, "device=gpu", f"trainer.devices={count}", "trainer=ddp") for count in (1, 2)]
    times = []
    for devices in (["cuda:0"], ["cuda:0", "cuda:1"]):
        options = {"device": "gpu", "devices": devices, "shard": 256}
        start = time.perf_counter()
        describe(network("resnet50"), pictures, Path(tempfile.mkdtemp(dir=work)), **options)
        times.append(f"{time.perf_counter() - start:.1f}")
    rows = ("training, images/s", *(f"{rate:.0f}" for rate in rates)), ("describing, s", *times)
    return [*lines, "", *table(("", "1 GPU", "2 GPUs"), *rows)]


PARTS: dict[str, Callable[[Path, argparse.Namespace], Lines]] = {
    "Training": training,
    "Describing": extraction,
    "Vectors beside the CPU's": parity,
    "Exact search": exact_search,
    "faiss": faiss_search,
    "Memory that runs out": short_memory,
    "Two processes": two_processes,
}


def main() -> None:
    """Measure, print and write the page. Exits where there is no GPU, or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--products", type=int, default=4000, help="toy pictures to train on and to describe")
    parser.add_argument("--train-batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet50"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    size = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "error: benchmarks/gpu.py measures a CUDA GPU, and PyTorch sees none here; type make gpu on a machine with one"
        )
    device = torch.cuda.get_device_properties(0)
    lines = [f"# {device.name}, {device.total_memory / 1e9:.0f} GB", ""]
    lines += [f"`make gpu`; torch {version('torch')}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU here."]
    failed = []
    with tempfile.TemporaryDirectory() as work:
        for title, measure in PARTS.items():
            print(f"{title} ...", flush=True)
            try:
                found = measure(Path(work), size)
            except Exception as error:  # a machine with a GPU is rare: the other parts are worth their figures
                traceback.print_exc()
                failed.append(title)
                found = [f"Failed: {type(error).__name__}: {error}"]
            lines += ["", f"## {title}", "", *found]
            size.output.write_text("\n".join(lines) + "\n")
    print(f"\n{size.output}")
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}; see {size.output}")


if __name__ == "__main__":
    main()
