"""From pictures to descriptors on disk: one pass over a catalogue feeds every checkpoint and every pooling."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.catalog import Catalog, Skipped
from ..data.datamodule import default_workers, quiet_worker
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import FEW, MASK_SIZE, Describer, Engine
from ..models.module import load_extractor
from ..models.precision import fastest_precision, pick_device
from .manifest import digest
from .store import Picture, Store

LOT = 32  # pictures that travel together from a loader to the network, or a whole batch where that is more
PREPROCESSING = "letterbox 1"  # counts up when the same file gives other pixels
PACKAGES = ("torch", "timm", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Features:
    """`vectors`: float32 (N, D), one row a picture. `ids`: N names. `masks`: uint8 (N, M, M) saliency, 0 to 255, or None.

    Raises ValueError where rows and ids differ or a vector is not finite.
    """

    vectors: np.ndarray
    ids: tuple[str, ...]
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.ids):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.ids)} ids")
        for start in range(0, len(self.vectors), 1 << 14):
            broken = np.flatnonzero(~np.isfinite(self.vectors[start : start + (1 << 14)]).all(axis=1))
            if len(broken):
                raise ValueError(f"the descriptor of '{self.ids[start + broken[0]]}' is not finite; try precision=32-true")


@dataclass(frozen=True)
class Member:
    """One descriptor of an ensemble: a checkpoint's network and a pooling. `name` tells which; `source` hashes the file."""

    name: str
    source: str
    extractor: BackgroundAgnosticExtractor
    pooling: Pooling


def load_members(checkpoints: str | Sequence[str], poolings: Sequence[Pooling]) -> list[Member]:
    """Every checkpoint with every pooling. Raises ValueError for a file that is no checkpoint."""
    members = []
    for checkpoint in [checkpoints] if isinstance(checkpoints, str) else checkpoints:
        extractor = load_extractor(checkpoint)
        source = digest(Path(checkpoint).read_bytes())
        members += [Member(f"{checkpoint}: {pooling}", source, extractor, pooling) for pooling in poolings]
    return members


class Extraction:
    """How descriptors are made and where they are kept (conf/retrieve.yaml, `extraction`).

    `features`: folder of the stores. `batch_size`: pictures a network batch, None for the device's own. `num_workers`:
    loading processes, 0 for threads that take turns with the network, None for what suits the device. `device`: auto,
    cpu, cuda. `precision`: auto, bf16-mixed, 32-true. `compiled`: torch.compile, None where it pays. `shard`: pictures a
    file, what a kill loses at most. `dtype`: float32 or float16, on disk. `max_skipped`: share of unreadable pictures
    above which to stop. Raises ValueError for a device that is not there or an unknown dtype.
    """

    def __init__(
        self,
        features: str | Path,
        batch_size: int | None = None,
        num_workers: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        compiled: bool | None = None,
        shard: int = 2048,
        dtype: str = "float32",
        max_skipped: float = 0.1,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"extraction.dtype={dtype}: type float32 or float16")
        self.root, self.batch_size, self.num_workers = Path(features), batch_size, num_workers
        self.device = pick_device(device)
        self.precision = fastest_precision(self.device) if precision == "auto" else precision
        self.compiled, self.shard, self.dtype, self.max_skipped = compiled, shard, np.dtype(dtype), max_skipped

    def __call__(
        self, members: Sequence[Member], catalog: Catalog, source: str, what: str, skipped: Skipped, masks: bool = False
    ) -> list[Features]:
        """Features of each member over the catalogue, from disk where they are there; unreadable pictures go to `skipped`.

        `source` is where the catalogue came from: its stores are found again by it. `what` names the pictures in messages.
        With `masks` the members' saliency is kept, or everything (255) where a pooling takes none. Raises ValueError where
        too many pictures cannot be read, or the work will not fit on disk or in memory.
        """
        pictures = [(name, _stamp(path)) for name, path in zip(catalog.ids, catalog.paths, strict=True)]
        stores = [self._store(member, source, masks) for member in members]
        lacking = [row for row, picture in enumerate(pictures) if not all(picture in store for store in stores)]
        if lacking or any(len(store.rows) + len(store.unreadable) > len(pictures) for store in stores):
            _Pass(self, members, stores, catalog, pictures, what, masks).run(lacking)
        readable = [picture for picture in pictures if picture in stores[0].rows]
        broken = Skipped()
        for row, picture in enumerate(pictures):
            if picture in stores[0].unreadable:
                broken.add(catalog, row, stores[0].unreadable[picture])
        skipped.rows += broken.rows
        if not readable:
            reason = stores[0].unreadable[pictures[0]]
            raise ValueError(f"none of the {len(catalog)} {what} can be read; the first: {catalog.paths[0]}: {reason}")
        broken.check(len(catalog), self.max_skipped, what, "max_skipped")
        ids = tuple(name for name, _ in readable)
        result = []
        for store in stores:
            arrays = store.read(readable)
            shown = arrays.get("masks", np.full((len(ids), MASK_SIZE, MASK_SIZE), 255, np.uint8) if masks else None)
            result.append(Features(arrays["vectors"], ids, shown))
        return result

    def _store(self, member: Member, source: str, masks: bool) -> Store:
        key = {
            "checkpoint": member.source,
            "pooling": str(member.pooling),
            "source": str(Path(source).expanduser().resolve()),
            "masks": masks,
            "precision": self.precision,
            "dtype": str(self.dtype),
        }
        name = f"{Path(source).stem}-{digest(*map(str, key.values()))}"
        size = f"{member.extractor.size} px on {member.extractor.pad}"
        rest = {"size": size, "preprocessing": PREPROCESSING, "versions": {name: version(name) for name in PACKAGES}}
        return Store(self.root / name, key | rest)


class _Pass:
    """One way through the pictures that some store lacks."""

    def __init__(
        self,
        settings: Extraction,
        members: Sequence[Member],
        stores: Sequence[Store],
        catalog: Catalog,
        pictures: Sequence[Picture],
        what: str,
        masks: bool,
    ) -> None:
        self.settings, self.stores, self.catalog, self.pictures, self.what = settings, stores, catalog, pictures, what
        self.masks = masks
        extractors = list({id(member.extractor): member.extractor for member in members}.values())
        self.canvases = sorted({(extractor.size, extractor.pad) for extractor in extractors})
        # Per network: its members' numbers, its canvas.
        self.networks = [
            (
                [number for number, member in enumerate(members) if member.extractor is extractor],
                self.canvases.index((extractor.size, extractor.pad)),
                extractor,
            )
            for extractor in extractors
        ]
        self.poolings = [member.pooling for member in members]
        # On a CPU the network has every core; processes beside it make both wait for each other (measured: a fifth slower
        # than threads that decode between its batches).
        automatic = 0 if settings.device == "cpu" else default_workers()
        self.workers = automatic if settings.num_workers is None else settings.num_workers

    def run(self, lacking: Sequence[int]) -> None:
        """Describe the pictures numbered `lacking`, a shard at a time."""
        engines = self._engines(lacking)
        for engine, (numbers, _, _) in zip(engines, self.networks, strict=True):
            for number in numbers:
                self.stores[number].begin(self.pictures, {"compiled": bool(engine.compiled), "batch": engine.batch})
        if not lacking:
            return
        compiling = sum(engine.compile() for engine in engines)
        if compiling:
            print(f"compiled in {compiling:.0f} s")
        for engine in engines:
            engine.seconds = 0.0
        chunks = [lacking[at : at + self.settings.shard] for at in range(0, len(lacking), self.settings.shard)]
        lot = max([LOT, *(engine.batch for engine in engines)])
        lots = [chunk[at : at + lot] for chunk in chunks for at in range(0, len(chunk), lot)]
        start, decoding, writing, size = time.perf_counter(), 0.0, 0.0, 0
        loaded = iter(track(self._loader(lots), f"describing {len(lacking)} {self.what}", total=len(lots)))
        for chunk in chunks:
            outputs: list[list[list[Tensor]]] = [[] for _ in engines]
            reasons: list[str] = []
            for _ in range(0, len(chunk), lot):
                views, why, seconds = next(loaded)
                decoding += seconds
                reasons += why
                if not all(why):
                    for number, (engine, (_, canvas, _)) in enumerate(zip(engines, self.networks, strict=True)):
                        outputs[number].append(engine(views[canvas]))
            before = time.perf_counter()
            size += self._write(chunk, reasons, outputs)
            writing += time.perf_counter() - before
        next(loaded, None)  # lets the progress bar end
        network = sum(engine.seconds for engine in engines)
        print(
            f"described {len(lacking)} {self.what} in {time.perf_counter() - start:.1f} s: network {network:.1f} s, "
            f"decoding {decoding:.1f} s in {f'{self.workers} processes' if self.workers else 'threads'}, "
            f"writing {writing:.1f} s; "
            f"{size / 1e6:.1f} MB on disk, peak memory {peak_memory() / 1e9:.2f} GB"
        )

    def _engines(self, lacking: Sequence[int]) -> list[Engine]:
        """One per network, planned; forecasts. Raises ValueError where disk or memory will not do."""
        settings, engines, seconds = self.settings, [], 0.0
        for numbers, _, extractor in self.networks:
            describer = Describer(extractor, [self.poolings[number] for number in numbers], self.masks)
            # A resumed pass goes on as it began: the other way the rest would differ in its last bits.
            begun = next((plan for number in numbers if (plan := self.stores[number].plan(self.pictures))), {})
            compiled = settings.compiled if settings.compiled is not None else begun.get("compiled")
            batch = settings.batch_size or begun.get("batch")
            engine = Engine(describer, settings.device, settings.precision, batch, compiled)
            seconds += engine.plan(len(lacking))
            engines.append(engine)
        if len(lacking) > FEW:
            self._forecast(engines, len(lacking), seconds)
        return engines

    def _forecast(self, engines: Sequence[Engine], lacking: int, seconds: float) -> None:
        widths = [
            vectors.shape[1] for engine in engines for vectors in engine(_empty(engine))[: len(engine.describer.poolings)]
        ]
        per_picture = sum(widths) * self.settings.dtype.itemsize + (len(widths) * MASK_SIZE**2 if self.masks else 0) + 64
        # To search: the descriptors, the ensemble of them, and its rounded copy.
        disk, memory = per_picture * lacking, 10 * sum(widths) * len(self.pictures)
        how = ", less compiled" if any(engine.compiled for engine in engines) else ""
        print(
            f"forecast for {lacking} {self.what}: about {seconds:.0f} s of network{how}, {disk / 1e6:.0f} MB on disk, "
            f"{memory / 1e9:.1f} GB of memory to search them in"
        )
        check_room(disk, memory, self.stores[0].folder, len(self.pictures), self.what)

    def _loader(self, lots: list[Sequence[int]]) -> Iterator[tuple[list[Tensor], list[str], float]]:
        pictures = _Canvases(self.catalog, self.canvases)
        if self.workers:
            gpu = self.settings.device == "cuda"
            loader = DataLoader(
                pictures,
                batch_sampler=[list(lot) for lot in lots],
                num_workers=self.workers,
                collate_fn=_stack,
                worker_init_fn=quiet_worker,
                pin_memory=gpu,
            )
            yield from loader
            return
        quiet_worker(0)
        with ThreadPoolExecutor(default_workers()) as threads:
            for lot in lots:
                yield _stack(list(threads.map(pictures.__getitem__, lot)))

    def _write(self, chunk: Sequence[int], reasons: Sequence[str], outputs: list[list[list[Tensor]]]) -> int:
        """Append to each store what it lacks of this chunk; returns the bytes written."""
        pictures = [self.pictures[row] for row in chunk]
        good = [picture for picture, reason in zip(pictures, reasons, strict=True) if not reason]
        unreadable = {picture: reason for picture, reason in zip(pictures, reasons, strict=True) if reason}
        size = 0
        for (numbers, _, _), parts in zip(self.networks, outputs, strict=True):
            whole = [torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)]
            for place, number in enumerate(numbers):
                store = self.stores[number]
                new = [row for row, picture in enumerate(good) if picture not in store]
                bad = {picture: reason for picture, reason in unreadable.items() if picture not in store}
                if not new and not bad:
                    continue
                arrays = {"vectors": whole[place][new].astype(self.settings.dtype)} if new else {}
                if new and self.masks and self.poolings[number].saliency:
                    arrays["masks"] = whole[-1][new]
                size += store.append([good[row] for row in new], arrays, bad)
        return size


class _Canvases(Dataset[tuple[list[Tensor], str, float]]):
    """Item i: picture i, decoded once, letterboxed once per canvas (size, pad); why it cannot be read, if so; seconds."""

    def __init__(self, catalog: Catalog, canvases: Sequence[tuple[int, int]]) -> None:
        self.catalog, self.canvases = catalog, canvases

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, index: int) -> tuple[list[Tensor], str, float]:
        start = time.perf_counter()
        try:
            picture = read_picture(self.catalog.paths[index], max(size for size, _ in self.canvases)).rgb
        except UnreadablePicture as error:
            return [], str(error), time.perf_counter() - start
        views = [torch.from_numpy(letterbox(picture, *canvas)).permute(2, 0, 1) for canvas in self.canvases]
        return views, "", time.perf_counter() - start


def _stack(items: list[tuple[list[Tensor], str, float]]) -> tuple[list[Tensor], list[str], float]:
    good = [views for views, reason, _ in items if not reason]
    return (
        [torch.stack(views) for views in zip(*good, strict=True)],
        [reason for _, reason, _ in items],
        sum(seconds for _, _, seconds in items),
    )


def _stamp(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}"


def _empty(engine: Engine) -> Tensor:
    size = engine.describer.extractor.size
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)


def check_room(disk: int, memory: int, folder: Path, pictures: int, what: str) -> None:
    """Raise ValueError where `disk` or `memory` bytes are more than this machine has left."""
    place = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free, available = shutil.disk_usage(place).free, psutil.virtual_memory().available
    if disk > free:
        raise ValueError(
            f"{pictures} {what} need {disk / 1e9:.1f} GB on disk, '{place}' has {free / 1e9:.1f} GB left; "
            "type features=DIR on a larger disk, or extraction.dtype=float16"
        )
    if memory > available:
        raise ValueError(
            f"{pictures} {what} need about {memory / 1e9:.1f} GB of memory to be searched, {available / 1e9:.1f} GB are free; "
            "use fewer checkpoints or poolings at once, or a larger machine"
        )


def peak_memory() -> int:
    """Bytes of memory this process held at most (its loading processes not counted)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mean_masks(members: Sequence[Features]) -> Features:
    """What an ensemble looks at: the first member's features with the mean of all members' masks."""
    if members[0].masks is None:
        return members[0]
    total = sum(features.masks.astype(np.float32) for features in members if features.masks is not None)
    return Features(members[0].vectors, members[0].ids, (np.asarray(total) / len(members) + 0.5).astype(np.uint8))


def describe_members(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """What an index made from these members must share with its queries: checkpoint and pooling, plain values."""
    return [{"checkpoint": member.source, "pooling": str(member.pooling)} for member in members]
