"""Extraction to disk, for all checkpoints and poolings in one pass over the catalogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..data.catalog import Catalog, Skipped
from ..data.images import Pictures
from ..data.places import absolute, stamps
from ..data.workers import one_opencv_thread
from ..manifest import digest, locked
from ..models.inference import MASK_SIZE, halving
from ..models.precision import pick_devices
from ..models.runtime import pick_precision, pick_runtime
from ..models.views import View
from .describing import ExtractionJob, LocalRun, find_readable
from .features import Features
from .members import Member
from .sharing import SharedRun, on_devices
from .store import Picture, Store

PREPROCESSING = "letterbox 1"  # increase it when the same file gives other pixels
PACKAGES = ("torch", "timm", "opencv-python-headless", "pillow")


class FeatureExtraction:
    """Describes pictures and keeps the descriptors on disk (conf/extraction).

    `features`: folder of the stores. `scales`: sizes as multiples of the network's own; `flip`: also the mirror image; the
    descriptors of all are summed. `batch_size`: pictures per batch, None for a default of the device. `num_workers`: loading
    processes, 0 for threads that alternate with the network, None for a default of the device. `device`: see
    `pick_device`. `precision`: auto, bf16-mixed, 32-true. `runtime`: see `pick_runtime`.
    `shard`: pictures per file, the most that are lost if a run is interrupted. `dtype`: float32 or float16, on disk.
    `max_skipped`: largest share of unreadable pictures. `devices`: all for every GPU of this machine, or a list of devices,
    among which the pictures are divided; None for `device` only. Raises ValueError for an unavailable device or unknown dtype.
    """

    def __init__(
        self,
        features: str | Path,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        runtime: str = "auto",
        shard: int = 2048,
        dtype: str = "float32",
        max_skipped: float = 0.1,
        devices: str | Sequence[str] | None = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise ValueError(f"extraction.dtype={dtype}: type float32 or float16")
        if not scales or min(scales) <= 0:
            raise ValueError(f"extraction.scales={list(scales)}: type numbers above 0, [1.0] for the network's own size")
        self.scales, self.flip = tuple(float(scale) for scale in scales), flip
        self.root, self.batch_size, self.num_workers = Path(features), batch_size, num_workers
        self.devices = pick_devices(devices, device)
        self.device = self.devices[0]
        # One for all devices: OpenVINO if they are all CPUs.
        self.runtime = pick_runtime(runtime, next((one for one in self.devices if one != "cpu"), "cpu"))
        self.precision = pick_precision(precision, self.device, self.runtime)
        self.shard, self.dtype, self.max_skipped = shard, np.dtype(dtype), max_skipped

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder for pictures to be described, locked against other runs, and kept for later ones."""
        with locked([self.root / name]):
            yield self.root / name

    def __call__(
        self,
        members: Sequence[Member],
        pictures: Pictures,
        source: str,
        what: str,
        skipped: Skipped,
        masks: bool = False,
        view: View | None = None,
    ) -> list[Features]:
        """Features of each member for picture files, read from disk if they were stored; unreadable pictures go to `skipped`.

        `source`: where the pictures come from, which identifies their stores. `what` describes them in messages. `masks`:
        whether to keep the masks of members whose pooling uses them. `view`: see Describer. Raises ValueError if too many
        pictures cannot be read, or disk space or memory is insufficient.
        """
        catalog = pictures.files
        if len(catalog) < len(pictures):
            raise ValueError(
                f"{len(pictures) - len(catalog)} {what} are not files, but descriptors are stored by file; "
                "save them as files, or use Retriever for pictures in memory"
            )
        stamped = list(zip(catalog.ids, stamps(catalog.paths), strict=True))
        places = [self._place(member, source, masks, view) for member in members]
        with locked(folder for folder, _ in places):
            opened = {folder: Store(folder, key) for folder, key in places}  # identical members share a store
            stores = [opened[folder] for folder, _ in places]
            self._retry(members, stores, catalog, stamped)
            missing = [row for row, picture in enumerate(stamped) if not all(picture in store for store in stores)]
            if missing or any(len(store.rows) + len(store.unreadable) > len(stamped) for store in stores):
                requested = [(member.extractor, member.pooling) for member in members]
                with one_opencv_thread:
                    self._describe(ExtractionJob(self, requested, stores, catalog, stamped, missing, what, masks, view))
            readable, broken = [], Skipped()
            for row, picture in enumerate(stamped):
                reason = next((store.unreadable[picture] for store in stores if picture in store.unreadable), None)
                if reason is None:
                    readable.append(picture)
                else:
                    broken.add(catalog, row, reason)
            skipped.rows += broken.rows
            broken.check(len(catalog), self.max_skipped, what, "max_skipped")
            arrays = [store.read(readable) for store in stores]
        ids = tuple(name for name, _ in readable)
        return [Features(found["vectors"], ids, found.get("masks")) for found in arrays]

    def _describe(self, job: ExtractionJob) -> None:
        if len(self.devices) > 1:
            SharedRun(job).run(on_devices(self.devices))
        else:
            LocalRun(job).run()

    def _retry(self, members: Sequence[Member], stores: Sequence[Store], catalog: Catalog, pictures: Sequence[Picture]) -> None:
        """Clear the unreadable marks of pictures that can be read now: a network error does not change a picture's stamp."""
        doubtful = [row for row, picture in enumerate(pictures) if any(picture in store.unreadable for store in stores)]
        for row in find_readable(catalog, doubtful, max(member.extractor.size for member in members)):
            for store in stores:
                store.unreadable.pop(pictures[row], None)

    def _place(self, member: Member, source: str, masks: bool, view: View | None) -> tuple[Path, dict[str, Any]]:
        """Folder and key of a member's store."""
        key = {
            "checkpoint": member.source,
            "size": member.extractor.size,
            "pooling": str(member.pooling),
            "source": absolute(source),
            "masks": MASK_SIZE if masks else 0,
            "precision": self.precision,
            "openvino": self.runtime == "openvino",  # the store's plan says whether it is compiled
            "dtype": str(self.dtype),
            "scales": str(self.scales),
            "flip": self.flip,
            "view": str(view),
            **halving(self.scales),
        }
        name = f"{Path(source).stem}-{digest(*map(str, key.values()))}"
        rest = {
            "pad": member.extractor.pad,
            "preprocessing": PREPROCESSING,
            "versions": versions(self.runtime),
        }
        return self.root / name, key | rest


def versions(runtime: str) -> dict[str, str]:
    """The versions of the packages that descriptors depend on."""
    return {name: version(name) for name in (*PACKAGES, *(["openvino"] if runtime == "openvino" else []))}
