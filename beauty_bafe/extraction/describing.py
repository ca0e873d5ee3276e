"""Describe pictures in one pass: each is decoded once for all networks, and each descriptor is written to its store."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.catalog import Catalog
from ..data.pictures import UnreadablePicture
from ..data.workers import default_workers, single_threaded_worker
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import MASK_SIZE, PLAN_ABOVE
from ..models.views import View
from .engine import Canvas, EnsembleEngine, Network, fit, longest, stack
from .engine import Settings as EngineSettings
from .store import Picture, Store

log = logging.getLogger("beauty_bafe")

CHUNK = 32  # pictures that a loader passes to the network at once; a whole batch if that is more


class Settings(EngineSettings, Protocol):
    """The settings of `FeatureExtraction` that a pass over the pictures needs."""

    num_workers: int | None
    shard: int
    dtype: np.dtype


@dataclass(frozen=True)
class ExtractionJob:
    """Describes the pictures numbered `missing` for every store that lacks them.

    `requested`: network and pooling of each store, in the order of `stores`. `pictures`: id and stamp of every picture of
    `catalog`. `what` describes them in messages. `masks`, `view`: see FeatureExtraction.
    """

    settings: Settings
    requested: Sequence[tuple[BackgroundAgnosticExtractor, Pooling]]
    stores: Sequence[Store]
    catalog: Catalog
    pictures: Sequence[Picture]
    missing: Sequence[int]
    what: str
    masks: bool
    view: View | None

    def lacks(self, number: int, rows: Sequence[int]) -> bool:
        """Whether store `number` lacks any of the pictures numbered `rows`."""
        return any(self.pictures[row] not in self.stores[number] for row in rows)


class LocalRun:
    """Runs an ExtractionJob in this process, a shard at a time. Raises ValueError if disk space or memory is insufficient."""

    def __init__(self, job: ExtractionJob) -> None:
        self.job, settings = job, job.settings
        numbers: dict[BackgroundAgnosticExtractor, list[int]] = {}
        for number, (extractor, _) in enumerate(job.requested):
            numbers.setdefault(extractor, []).append(number)
        # Networks whose stores are all complete are skipped.
        members = {
            number: job.requested[number]
            for same in numbers.values()
            if any(job.lacks(one, job.missing) for one in same)
            for number in same
        }
        plans = {number: store.plan(job.pictures) for number, store in enumerate(job.stores)}
        engine = EnsembleEngine(settings, members, job.masks, job.view, plans)
        self.networks, self.canvases = engine.networks, engine.canvases
        # On a CPU the network uses every core, and loading processes would compete with it (measured: a fifth slower than
        # threads that decode between its batches).
        automatic = 0 if settings.device == "cpu" else default_workers()
        self.workers = automatic if settings.num_workers is None else settings.num_workers

    def run(self) -> None:
        """Plan, log a forecast, compile if that saves time, describe, and log how long it took."""
        job = self.job
        count, shard = len(job.missing), job.settings.shard
        forecast = self._plan()
        if not count:
            return
        shards = [job.missing[at : at + shard] for at in range(0, count, shard)]
        chunk = max([CHUNK, *(network.engine.batch for network in self.networks)])
        chunks = [list(shard_rows[at : at + chunk]) for shard_rows in shards for at in range(0, len(shard_rows), chunk)]
        start, decoding, writing, size = time.perf_counter(), 0.0, 0.0, 0
        loaded = iter(track(self._load(chunks), f"describing {count} {job.what}", total=len(chunks)))
        for shard_rows in shards:
            wanted = [net for net in self.networks if any(job.lacks(number, shard_rows) for number in net.numbers)]
            outputs: list[list[list[Tensor]]] = [[] for _ in wanted]
            reasons: list[str] = []
            for _ in range(0, len(shard_rows), chunk):
                views, why, seconds = next(loaded)
                decoding += seconds
                reasons += why
                if not all(why):
                    for parts, network in zip(outputs, wanted, strict=True):
                        parts.append(network.engine(views[network.canvas]))
            before = time.perf_counter()
            for parts, network in zip(outputs, wanted, strict=True):
                size += self._write(
                    shard_rows, reasons, [torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)], network
                )
            writing += time.perf_counter() - before
        next(loaded, None)  # completes the progress bar
        network_time = sum(network.engine.seconds for network in self.networks)
        expected = f" (forecast {forecast:.0f} s)" if forecast else ""
        log.info(
            f"described {count} {job.what} in {time.perf_counter() - start:.1f} s: network {network_time:.1f} s{expected}, "
            f"decoding {decoding:.1f} s in {f'{self.workers} processes' if self.workers else 'threads'}, "
            f"writing {writing:.1f} s; {size / 1e6:.1f} MB on disk, peak memory {peak_memory() / 1e9:.2f} GB"
        )

    def _plan(self) -> float:
        """Print the forecast and prepare every store; returns the expected seconds of the networks, 0 for few pictures."""
        job, count = self.job, len(self.job.missing)
        seconds = sum(network.engine.plan(count) for network in self.networks)
        if count > PLAN_ABOVE:
            self._forecast(seconds)
        plans = {number: network.engine for network in self.networks for number in network.numbers}
        for number, store in enumerate(job.stores):
            engine = plans.get(number)
            plan = {key: store.manifest[key] for key in ("runtime", "batch")} if engine is None else engine.describe()
            store.begin(job.pictures, plan)
        compiling = sum(network.engine.compile() for network in self.networks)
        if compiling:
            seconds = sum(network.engine.plan(count) for network in self.networks)
            log.info(f"compiled in {compiling:.0f} s" + (f"; now about {seconds:.0f} s in the network" if seconds else ""))
        for network in self.networks:
            network.engine.seconds = 0.0
        return seconds

    def _forecast(self, seconds: float) -> None:
        """Log the time and space needed. Raises ValueError if disk space or memory is insufficient."""
        job, widths = self.job, [width for network in self.networks for width in network.engine.widths()]
        count, masks = len(job.missing), len(widths) * MASK_SIZE**2 if job.masks else 0
        # For search: the descriptors, their ensemble, and its rounded copy.
        disk = count * (sum(widths) * job.settings.dtype.itemsize + masks + 64)
        memory = 10 * sum(widths) * len(job.pictures)
        how = ", less when compiled" if any(network.engine.runtime == "compiled" for network in self.networks) else ""
        log.info(
            f"forecast for {count} {job.what}: about {seconds:.0f} s in the network{how}, {disk / 1e6:.0f} MB on disk, "
            f"{memory / 1e9:.1f} GB of memory to search them"
        )
        check_space(disk, memory, job.stores[0].folder, len(job.pictures), job.what)

    def _load(self, chunks: list[list[int]]) -> Iterator[tuple[list[Tensor], list[str], float]]:
        pictures = Canvases(self.job.catalog, self.canvases)
        if self.workers:
            yield from DataLoader(
                pictures,
                batch_sampler=chunks,
                num_workers=self.workers,
                collate_fn=collate,
                worker_init_fn=single_threaded_worker,
                pin_memory=self.job.settings.device.startswith("cuda"),
            )
            return
        with ThreadPoolExecutor(default_workers()) as threads:
            for chunk in chunks:
                yield collate(list(threads.map(pictures.__getitem__, chunk)))

    def _write(self, shard_rows: Sequence[int], reasons: Sequence[str], outputs: list[np.ndarray], network: Network) -> int:
        """Append to each of the network's stores the rows that it lacks; returns the bytes written."""
        job = self.job
        pictures = list(zip([job.pictures[row] for row in shard_rows], reasons, strict=True))
        good = [picture for picture, reason in pictures if not reason]
        size = 0
        for place, number in enumerate(network.numbers):
            store = job.stores[number]
            new = [row for row, picture in enumerate(good) if picture not in store]
            bad = {picture: reason for picture, reason in pictures if reason and picture not in store}
            if not new and not bad:
                continue
            drawn = job.masks and job.requested[number][1].saliency
            arrays = stored_arrays(outputs, place, new, drawn, job.settings.dtype)
            size += store.append([good[row] for row in new], arrays, bad)
        return size


def stored_arrays(
    outputs: Sequence[np.ndarray], place: int, rows: Sequence[int], masks: bool, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The arrays to store for these rows: output `place` of a Describer, and its masks if `masks`; empty without rows."""
    if not rows:
        return {}
    arrays = {"vectors": outputs[place][list(rows)].astype(dtype)}
    return arrays | ({"masks": outputs[-1][list(rows)]} if masks else {})


def find_readable(catalog: Catalog, rows: Sequence[int], size: int) -> list[int]:
    """Those of the pictures numbered `rows` that can be read (at about `size` pixels, to save time)."""

    def readable(row: int) -> bool:
        try:
            return bool(catalog.read(row, size))
        except UnreadablePicture:
            return False

    with ThreadPoolExecutor(default_workers()) as threads:
        return [row for row, good in zip(rows, threads.map(readable, rows), strict=True) if good]


class Canvases(Dataset[tuple[list[Tensor], str, float]]):
    """Item i: picture i, letterboxed once per canvas (size, pad); the reason if it cannot be read, else ""; seconds."""

    def __init__(self, catalog: Catalog, canvases: Sequence[Canvas]) -> None:
        self.catalog, self.canvases = catalog, canvases

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, index: int) -> tuple[list[Tensor], str, float]:
        start = time.perf_counter()
        try:
            picture = self.catalog.read(index, longest(self.canvases)).rgb
        except UnreadablePicture as error:
            return [], str(error), time.perf_counter() - start
        return fit(picture, self.canvases), "", time.perf_counter() - start


def collate(items: list[tuple[list[Tensor], str, float]]) -> tuple[list[Tensor], list[str], float]:
    """Items of `Canvases` -> one batch per canvas of the readable pictures, all reasons, and the total seconds."""
    return (
        stack([views for views, reason, _ in items if not reason]),
        [reason for _, reason, _ in items],
        sum(seconds for _, _, seconds in items),
    )


def check_space(disk: int, memory: int, folder: Path, pictures: int, what: str) -> None:
    """Raise ValueError if fewer than `disk` bytes of disk space or `memory` bytes of memory are free."""
    place = next(parent for parent in [folder, *folder.resolve().parents] if parent.exists())
    free, available = shutil.disk_usage(place).free, psutil.virtual_memory().available
    if disk > free:
        raise ValueError(
            f"{pictures} {what} need {disk / 1e9:.1f} GB on disk, '{place}' has {free / 1e9:.1f} GB left; "
            "type features=DIR on a larger disk, or extraction.dtype=float16"
        )
    if memory > available:
        raise ValueError(
            f"searching {pictures} {what} needs about {memory / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; "
            "use fewer checkpoints or poolings at once, or a larger machine"
        )


def peak_memory() -> int:
    """Peak memory of this process in bytes, without its loading processes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
