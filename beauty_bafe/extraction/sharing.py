"""One pass over pictures shared out among several workers, each of which describes whole shards and writes them itself."""

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
from ..models.inference import MASK_SIZE, Describer, suitable_batch
from ..models.views import View
from .describing import CHUNK, Canvases, Settings, check_room, stack_items, stored_arrays
from .engine import EnsembleEngine
from .store import Picture, Store, holds, write_shard

log = logging.getLogger("beauty_bafe")

Requested = Sequence[tuple[BackgroundAgnosticExtractor, Pooling]]


class Shard(NamedTuple):
    """Pictures that are described together. For each store that lacks some of them, its number -> file to write, their rows."""

    number: int
    pictures: Sequence[Picture]
    paths: Sequence[Place]
    files: Mapping[int, tuple[Path, Sequence[int]]]


class Worker(NamedTuple):
    """What a worker needs to describe shards, plain values and networks: it may be sent to another machine.

    `begun`: by number of a store that lacks pictures, the batch size and compilation in its manifest.
    """

    settings: Settings
    requested: Requested
    masks: bool
    view: View | None
    begun: Mapping[int, Mapping[str, Any]]

    def start(self, device: str, threads: int) -> ShardDescriber:
        """The networks on a device, which decodes in so many threads."""
        settings = copy.copy(self.settings)
        settings.device = device
        return ShardDescriber(self, settings, threads)


class ShardDescriber:
    """Describes one shard after the other, decoding the next pictures while the network is busy."""

    def __init__(self, worker: Worker, settings: Settings, threads: int) -> None:
        self.worker, self.settings, self.threads = worker, settings, threads
        members = {number: worker.requested[number] for number in worker.begun}
        self.engine = EnsembleEngine(settings, members, worker.masks, worker.view, worker.begun)
        for network in self.engine.networks:
            network.engine.compile()

    def __call__(self, shard: Shard) -> int:
        """Describe a shard and write its files; returns their bytes. What another worker wrote of it before it died stays."""
        left = {
            number: (file, rows)
            for number, (file, rows) in shard.files.items()
            if not holds(file, [shard.pictures[row] for row in rows], ())
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
                views, reasons, _ = stack_items([future.result() for future in now])
                yield views, reasons


Run = Callable[[Worker, Sequence[Shard]], Iterable[tuple[int, int]]]


class SharedJob:
    """As ExtractionJob, by several workers. Networks are compiled only where `settings.compiled` says so."""

    def __init__(
        self,
        settings: Settings,
        requested: Requested,
        stores: Sequence[Store],
        catalog: Catalog,
        pictures: Sequence[Picture],
        lacking: Sequence[int],
        what: str,
        masks: bool,
        view: View | None = None,
    ) -> None:
        self.settings, self.requested, self.stores, self.catalog, self.pictures = settings, requested, stores, catalog, pictures
        self.lacking, self.what, self.masks, self.view = lacking, what, masks, view

    def run(self, run: Run) -> None:
        """Begin every store and let `run` go through the shards; it yields the number of each one done, and its bytes."""
        plans = self._begin()
        if not self.lacking:
            return
        count, start, size = len(self.lacking), time.perf_counter(), 0
        shards = {shard.number: shard for shard in self._shards(sorted(plans))}
        done = run(Worker(self.settings, self.requested, self.masks, self.view, plans), list(shards.values()))
        for number, written in track(done, f"describing {count} {self.what}", total=len(shards)):
            size += written
            for store, (file, _) in shards.pop(number).files.items():
                self.stores[store].note(int(file.stem))
        if shards:
            raise RuntimeError(f"{len(shards)} shards of {self.what} were not described; type the same command again")
        log.info(f"described {count} {self.what} in {time.perf_counter() - start:.1f} s; {size / 1e6:.1f} MB on disk")

    def _begin(self) -> dict[int, dict[str, Any]]:
        """Begin every store, after a look at the room for them; the plans of those that lack pictures, by number."""
        plans: dict[int, dict[str, Any]] = {}
        for number, (store, (extractor, pooling)) in enumerate(zip(self.stores, self.requested, strict=True)):
            side = Describer(extractor, [pooling], False, self.settings.scales, self.settings.flip, self.view).canvas
            batch = self.settings.batch_size or suitable_batch(self.settings.device, side)
            plan = {"compiled": bool(self.settings.compiled), "batch": batch}
            plan |= {key: value for key, value in store.plan(self.pictures).items() if key in plan}
            if any(self.pictures[row] not in store for row in self.lacking):
                plans[number] = plan
            store.begin(self.pictures, plan)
        drawn = MASK_SIZE**2 if self.masks else 0
        check_room(len(self.lacking) * len(plans) * (64 + drawn), 0, self.stores[0].folder, len(self.pictures), self.what)
        return plans

    def _shards(self, numbers: Sequence[int]) -> list[Shard]:
        following = {number: self.stores[number].next_shard for number in numbers}
        shards: list[Shard] = []
        for at in range(0, len(self.lacking), self.settings.shard):
            rows = self.lacking[at : at + self.settings.shard]
            pictures = [self.pictures[row] for row in rows]
            files: dict[int, tuple[Path, Sequence[int]]] = {}
            for number in numbers:
                store = self.stores[number]
                new = [place for place, picture in enumerate(pictures) if picture not in store]
                same = next((other for other in files if self.stores[other] is store), None)  # members that are the same
                if new and same is None:
                    files[number] = store.file(following[number]), new
                    following[number] += 1
            shards.append(Shard(len(shards), pictures, [self.catalog.paths[row] for row in rows], files))
        return shards


def on_devices(devices: Sequence[str]) -> Run:
    """Workers that are threads of this process, one a device; each takes the next shard when it is done with one."""

    def run(worker: Worker, shards: Sequence[Shard]) -> Iterator[tuple[int, int]]:
        threads = max(1, default_workers() // len(devices))
        free: queue.SimpleQueue[ShardDescriber] = queue.SimpleQueue()
        for device in devices:  # one after the other: compiling is no work for several threads
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
