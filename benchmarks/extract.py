"""Images per second of describing pictures, by each runtime beside a plain eager float32 loop, in one run.

python benchmarks/extract.py --pictures GALLERY --checkpoints RUN/checkpoints/best.ckpt resnet50
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from beauty_bafe.data.catalog import Catalog, Skipped, open_catalog
from beauty_bafe.data.pictures import letterbox, read_picture
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.module import load_extractor
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.models.precision import fastest_precision, pick_device
from beauty_bafe.models.runtime import pick_precision, pick_runtime

ATTENTION = Pooling(spoc, saliency=True)
CONF = (Path(__file__).parents[1] / "conf").resolve()


def network(name: str) -> BackgroundAgnosticExtractor:
    """A checkpoint, or a file of conf/model with random weights: enough for speed, never for quality."""
    if Path(name).is_file():
        return load_extractor(name)
    torch.manual_seed(0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose("train", [f"model={name}", "data.root=none"]).model, resolve=True)
    assert isinstance(settings, dict)
    return BackgroundAgnosticExtractor(**settings | {"pretrained": False, "weights": None}).eval()


def best_rate(work: Callable[[], object], pictures: int, repeats: int = 3) -> float:
    """Images per second of the best of `repeats` runs after one that warms up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        seconds.append(time.perf_counter() - start)
    return pictures / min(seconds)


def load(catalog: Catalog, size: int, pad: int) -> torch.Tensor:
    views = [letterbox(np.asarray(Image.open(path).convert("RGB")), size, pad) for path in catalog.paths]
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def plain_loop(extractor: BackgroundAgnosticExtractor, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """What one would write first: float32, eager, batches of 64."""
    parts = [F.normalize(ATTENTION(extractor(batch.to(device)))).cpu() for batch in pictures.split(64)]
    return torch.cat(parts)


def ways(device: str) -> list[tuple[str, str]]:
    """Runtime and precision of the engines to compare; the first is the default."""
    runtime = pick_runtime("auto", device)
    first = runtime.replace("auto", "compiled"), pick_precision("auto", device, runtime)
    others = [("openvino", "bf16-mixed")] if runtime == "openvino" else []
    return list(dict.fromkeys([first, *others, *((kind, fastest_precision(device)) for kind in ("torch", "compiled"))]))


def compare(name: str, catalog: Catalog, device: str) -> None:
    extractor = network(name).to(memory_format=torch.contiguous_format).to(device)
    pictures = load(catalog, extractor.size, extractor.pad)
    reference = plain_loop(extractor, pictures, device)
    few = pictures[:128]

    engines = {}
    starting = {}
    for runtime, precision in ways(device):
        start = time.perf_counter()
        engine = Engine(Describer(network(name), [ATTENTION], False), device, precision, None, runtime)
        engine.compile()
        engine(few[:1])
        engines[f"{runtime}, {precision}"], starting[f"{runtime}, {precision}"] = engine, time.perf_counter() - start
    # Interleaved, as the machine may be shared: each round is measured under the same conditions.
    works = {"plain": lambda: plain_loop(extractor, few, device)}
    works |= {key: partial(engine, few) for key, engine in engines.items()}
    rounds = [{key: best_rate(work, len(few), 2) for key, work in works.items()} for _ in range(3)]
    rates = {key: statistics.median(found[key] for found in rounds) for key in works}

    start = time.perf_counter()
    plain_loop(extractor, load(catalog, extractor.size, extractor.pad), device)
    whole = len(catalog) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        settings = FeatureExtraction(folder, device=device)
        member = Member(name, "benchmark", network(name), ATTENTION)
        start = time.perf_counter()
        settings([member], catalog, "benchmark", f"pictures, {Path(name).stem}", Skipped())
        whole_ours = len(catalog) / (time.perf_counter() - start)
    print(f"{name}: {len(catalog)} pictures; cosines to the plain loop's")
    print(f"  plain, float32          {rates['plain']:7.1f} img/s")
    for key, engine in engines.items():
        cosines = (engine(pictures)[0] * reference).sum(1)
        print(
            f"  {key:22s}  {rates[key]:7.1f} img/s  {rates[key] / rates['plain']:5.2f} times, after {starting[key]:4.1f} s; "
            f"cosine: median {cosines.median():.6f}, least {cosines.min():.6f}"
        )
    print(f"  whole pipeline  plain {whole:7.1f} img/s   default {whole_ours:7.1f} img/s   {whole_ours / whole:5.2f} times")


def read_all(read: Callable[[Path], object], paths: Sequence[Path]) -> None:
    for path in paths:
        read(path)


def decoders(catalog: Catalog) -> None:
    """Milliseconds a picture of reading alone, one thread."""
    from torchvision.io import ImageReadMode, decode_image

    cv2.setNumThreads(0)
    ways: dict[str, Callable[[Path], object]] = {
        "Pillow": lambda path: np.asarray(Image.open(path).convert("RGB")),
        "OpenCV": lambda path: cv2.imread(str(path), cv2.IMREAD_COLOR_RGB),
        "torchvision": lambda path: decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True),
        "ours (torchvision, Pillow's draft for large ones)": lambda path: read_picture(path, 224),
    }
    with tempfile.TemporaryDirectory() as folder:
        large = []
        for number, path in enumerate(catalog.paths[:40]):
            large.append(Path(folder) / f"{number}.jpg")
            Image.open(path).convert("RGB").resize((1500, 1500), Image.Resampling.BICUBIC).save(large[-1], quality=90)
        print("reading, ms a picture       as they are   1500 px")
        for name, read in ways.items():
            columns = [1e3 / best_rate(partial(read_all, read, paths), len(paths)) for paths in (catalog.paths[:200], large)]
            print(f"  {name:52s} {columns[0]:6.2f} {columns[1]:9.2f}")


def several(catalog: Catalog, device: str) -> None:
    """Cost of four checkpoints and of two poolings where decoding dominates: 12-megapixel photos, a network of a few layers."""
    tiny = {"name": "test_efficientnet", "taps": [f"blocks.{n}" for n in range(4)], "last": "bn2", "size": 64, "hidden": 8}

    def member(number: int, pooling: Pooling) -> Member:
        return Member(str(number), str(number), BackgroundAgnosticExtractor(**tiny, pretrained=False).eval(), pooling)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, path in enumerate(catalog.paths[:150]):
            paths.append(Path(folder) / f"{number}.jpg")
            Image.open(path).convert("RGB").resize((4000, 3000)).save(paths[-1], quality=90)
        large = Catalog(tuple(path.stem for path in paths), tuple(paths))
        seconds: dict[int, list[float]] = {1: [], 4: []}
        for attempt in range(3):
            for count in seconds:
                members = [member(number, ATTENTION) for number in range(count)]
                start = time.perf_counter()
                FeatureExtraction(f"{folder}/{attempt}-{count}", device=device)(
                    members, large, "benchmark", "large pictures", Skipped()
                )
                seconds[count].append(time.perf_counter() - start)
        one, four = min(seconds[1]), min(seconds[4])
        print(f"four small checkpoints in one pass: {four:.2f} s, one: {one:.2f} s, {four / one:.2f} times")
        shared = member(9, ATTENTION)
        pair = [shared, Member("gem", "9", shared.extractor, Pooling(gem, saliency=True))]
        start = time.perf_counter()
        FeatureExtraction(f"{folder}/poolings", device=device)(pair, large, "benchmark", "large pictures", Skipped())
        print(f"two poolings of one checkpoint: {time.perf_counter() - start:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="a folder of pictures, or a csv of id,path")
    parser.add_argument(
        "--checkpoints", nargs="+", required=True, help="best.ckpt files, or names in conf/model (random weights)"
    )
    parser.add_argument("--count", type=int, default=512, help="pictures to describe")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    catalog = open_catalog(arguments.pictures)
    catalog = catalog.subset(range(min(arguments.count, len(catalog))))
    device = pick_device(arguments.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    decoders(catalog)
    several(catalog, device)
    for name in arguments.checkpoints:
        compare(name, catalog, device)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
