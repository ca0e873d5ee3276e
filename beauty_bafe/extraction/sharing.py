"""Describe pictures with several workers, each of which describes and writes whole shards."""

from __future__ import annotations

import copy
import logging
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from ..data.catalog import Catalog
from ..data.places import Place
from ..data.workers import default_workers
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import MASK_SIZE, Describer, default_batch_size
from ..models.views import View
from .describing import CHUNK, Canvases, ExtractionJob, Settings, check_space, collate, stored_arrays
from .engine import EnsembleEngine
from .store import Picture, is_written, write_shard

log = logging.getLogger("beauty_bafe")


class Shard(NamedTuple):
    """Pictures that are described together. `files`: number of each store that lacks some -> (file to write, missing rows)."""

    number: int
    pictures: Sequence[Picture]
    paths: Sequence[Place]
    files: Mapping[int, tuple[Path, Sequence[int]]]


class Worker(NamedTuple):
    """What a worker needs to describe shards; can be pickled and sent to another machine.

    `plans`: number of each store that lacks pictures -> the batch size and runtime in its manifest.
    """

    settings: Settings
    requested: Sequence[tuple[BackgroundAgnosticExtractor, Pooling]]
    masks: bool
    view: View | None
    plans: Mapping[int, Mapping[str, Any]]

    def start(self, device: str, threads: int) -> ShardDescriber:
        """Load the networks on a device; pictures are decoded in `threads` threads."""
        settings = copy.copy(self.settings)
        settings.device = device
        return ShardDescriber(self, settings, threads)


class ShardDescriber:
    """Describes one shard after another, decoding the next pictures while the network is busy."""

    def __init__(self, worker: Worker, settings: Settings, threads: int) -> None:
        self.worker, self.settings, self.threads = worker, settings, threads
        members = {number: worker.requested[number] for number in worker.plans}
        self.engine = EnsembleEngine(settings, members, worker.masks, worker.view, worker.plans)
        for network in self.engine.networks:
            network.engine.compile()

    def __call__(self, shard: Shard) -> int:
        """Describe a shard and write its files; returns their size in bytes. Files written by a worker that died are kept."""
        left = {
            number: (file, rows)
            for number, (file, rows) in shard.files.items()
            if not is_written(file, [shard.pictures[row] for row in rows], ())
        }
        wanted = [network for network in self.engine.networks if any(number in left for number in network.numbers)]
        if not wanted:
            return 0
        outputs: list[list[list[Tensor]]] = [[] for _ in wanted]
        reasons: list[str] = []
        for views, why in self._decode(shard, max([CHUNK, *(network.engine.batch for network in wanted)])):
            reasons += why
            if not all(why):
                for parts, network in zip(outputs, wanted, strict=True):
                    parts.append(network.engine(views[network.canvas]))
        places = {row: place for place, row in enumerate(row for row, reason in enumerate(reasons) if not reason)}
        size = 0
        for parts, network in zip(outputs, wanted, strict=True):
            arrays = [torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)]
            for place, number in enumerate(network.numbers):
                if number in left:
                    file, rows = left[number]
                    good = [row for row in rows if not reasons[row]]
                    drawn = self.worker.masks and self.worker.requested[number][1].saliency
                    kept = stored_arrays(arrays, place, [places[row] for row in good], drawn, self.settings.dtype)
                    bad = {shard.pictures[row]: reasons[row] for row in rows if reasons[row]}
                    size += write_shard(file, [shard.pictures[row] for row in good], kept, bad)
        return size

    def _decode(self, shard: Shard, chunk: int) -> Iterator[tuple[list[Tensor], list[str]]]:
        catalog = Catalog(tuple(name for name, _ in shard.pictures), tuple(shard.paths))
        pictures = Canvases(catalog, self.engine.canvases)
        rows = range(len(catalog))
        with ThreadPoolExecutor(self.threads) as threads:
            ahead = [threads.submit(pictures.__getitem__, row) for row in rows[:chunk]]
            for start in range(0, len(rows), chunk):
                now = ahead
                ahead = [threads.submit(pictures.__getitem__, row) for row in rows[start + chunk : start + 2 * chunk]]
                views, reasons, _ = collate([future.result() for future in now])
                yield views, reasons


Run = Callable[[Worker, Sequence[Shard]], Iterable[tuple[int, int]]]


class SharedRun:
    """Runs an ExtractionJob with several workers. Networks are compiled only if `settings.runtime` is compiled."""

    def __init__(self, job: ExtractionJob) -> None:
        self.job = job

    def run(self, run: Run) -> None:
        """Prepare every store and let `run` describe the shards; it yields the number and the bytes of each finished shard."""
        job, plans = self.job, self._begin()
        if not job.missing:
            return
        count, start, size = len(job.missing), time.perf_counter(), 0
        shards = {shard.number: shard for shard in self._shards(sorted(plans))}
        done = run(Worker(job.settings, job.requested, job.masks, job.view, plans), list(shards.values()))
        for number, written in track(done, f"describing {count} {job.what}", total=len(shards)):
            size += written
            for store, (file, _) in shards.pop(number).files.items():
                job.stores[store].register(int(file.stem))
        if shards:
            raise RuntimeError(f"{len(shards)} shards of {job.what} were not described; run the same command again")
        log.info(f"described {count} {job.what} in {time.perf_counter() - start:.1f} s; {size / 1e6:.1f} MB on disk")

    def _begin(self) -> dict[int, dict[str, Any]]:
        """Check the free space and prepare every store; returns the plans of those that lack pictures, by number."""
        job, settings = self.job, self.job.settings
        plans: dict[int, dict[str, Any]] = {}
        for number, (store, (extractor, pooling)) in enumerate(zip(job.stores, job.requested, strict=True)):
            side = Describer(extractor, [pooling], False, settings.scales, settings.flip, job.view).canvas
            batch = settings.batch_size or default_batch_size(settings.device, side)
            plan = {"runtime": "torch" if settings.runtime == "auto" else settings.runtime, "batch": batch}
            plan |= {key: value for key, value in store.plan(job.pictures).items() if key in plan}
            if job.lacks(number, job.missing):
                plans[number] = plan
            store.begin(job.pictures, plan)
        drawn = MASK_SIZE**2 if job.masks else 0
        check_space(len(job.missing) * len(plans) * (64 + drawn), 0, job.stores[0].folder, len(job.pictures), job.what)
        return plans

    def _shards(self, numbers: Sequence[int]) -> list[Shard]:
        job = self.job
        free = {number: job.stores[number].free_shards() for number in numbers}
        shards: list[Shard] = []
        for at in range(0, len(job.missing), job.settings.shard):
            rows = job.missing[at : at + job.settings.shard]
            pictures = [job.pictures[row] for row in rows]
            files: dict[int, tuple[Path, Sequence[int]]] = {}
            for number in numbers:
                store = job.stores[number]
                new = [place for place, picture in enumerate(pictures) if picture not in store]
                same = next((other for other in files if job.stores[other] is store), None)  # identical members
                if new and same is None:
                    files[number] = store.file(next(free[number])), new
            shards.append(Shard(len(shards), pictures, [job.catalog.paths[row] for row in rows], files))
        return shards


def on_devices(devices: Sequence[str]) -> Run:
    """Workers as threads of this process, one per device; each takes the next shard when it has finished one."""

    def run(worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
        threads = max(1, default_workers() // len(devices))
        free: queue.SimpleQueue[ShardDescriber] = queue.SimpleQueue()
        for device in devices:  # one after another: torch.compile is not thread-safe
            free.put(worker.start(device, threads))

        def describe(shard: Shard) -> tuple[int, int]:
            describer = free.get()
            try:
                return shard.number, describer(shard)
            finally:
                free.put(describer)

        with ThreadPoolExecutor(len(devices)) as pool:
            pending = [pool.submit(describe, shard) for shard in shards]
            try:
                for future in pending:
                    yield future.result()
            finally:
                for future in pending:
                    future.cancel()

    return run
