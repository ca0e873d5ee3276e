"""From pictures to descriptors on disk: one pass over a catalogue feeds every checkpoint and every pooling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..data.catalog import Catalog, Skipped
from ..data.images import Pictures
from ..data.places import absolute, stamp
from ..data.workers import one_opencv_thread
from ..manifest import digest, locked
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import MASK_SIZE
from ..models.precision import fastest_precision, pick_devices
from ..models.views import View
from .describing import ExtractionJob, readable_now
from .features import Features
from .members import Member
from .sharing import SharedJob, on_devices
from .store import Picture, Store

PREPROCESSING = "letterbox 1"  # counts up when the same file gives other pixels
PACKAGES = ("torch", "timm", "opencv-python-headless", "pillow")


class FeatureExtraction:
    """How descriptors are made and where they are kept (conf/retrieve.yaml, `extraction`).

    `features`: folder of the stores. `scales`, `flip`: sizes (shares of the network's own) and mirror images whose
    descriptors are added. `batch_size`: pictures a network batch, None for the device's own. `num_workers`:
    loading processes, 0 for threads that take turns with the network, None for what suits the device. `device`: see
    `pick_device`. `precision`: auto, bf16-mixed, 32-true. `compiled`: torch.compile, None where it pays. `shard`: pictures a
    file, what a kill loses at most. `dtype`: float32 or float16, on disk. `max_skipped`: share of unreadable pictures
    above which to stop. `devices`: all for every GPU of this machine, or a list of devices, which then share the pictures;
    None for `device` alone. Raises ValueError for a device that is not there or an unknown dtype.
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
        compiled: bool | None = None,
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
        self.precision = fastest_precision(self.device) if precision == "auto" else precision
        self.compiled, self.shard, self.dtype, self.max_skipped = compiled, shard, np.dtype(dtype), max_skipped

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A folder for pictures to be described, kept from other runs meanwhile; it stays, for the next run."""
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
        """Features of each member over files, from disk where they are there; unreadable pictures go to `skipped`.

        `source` is where the pictures came from: its stores are found again by it. `what` names the pictures in messages.
        With `masks` the saliency is kept of members whose pooling takes it. `view`: see Describer.
        Raises ValueError where too many pictures cannot be read, or the work will not fit on disk or in memory.
        """
        catalog = pictures.files
        if len(catalog) < len(pictures):
            raise ValueError(f"{len(pictures) - len(catalog)} {what} are not files, and descriptors are stored by file")
        stamped = [(name, stamp(path)) for name, path in zip(catalog.ids, catalog.paths, strict=True)]
        places = [self._place(member, source, masks, view) for member in members]
        with locked(folder for folder, _ in places):
            opened = {folder: Store(folder, key) for folder, key in places}  # one for members that are the same
            stores = [opened[folder] for folder, _ in places]
            self._retry(members, stores, catalog, stamped)
            lacking = [row for row, picture in enumerate(stamped) if not all(picture in store for store in stores)]
            if lacking or any(len(store.rows) + len(store.unreadable) > len(stamped) for store in stores):
                with one_opencv_thread:
                    self._describe(
                        [(m.extractor, m.pooling) for m in members], stores, catalog, stamped, lacking, what, masks, view
                    )
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

    def _describe(
        self,
        requested: Sequence[tuple[BackgroundAgnosticExtractor, Pooling]],
        stores: Sequence[Store],
        catalog: Catalog,
        pictures: Sequence[Picture],
        lacking: Sequence[int],
        what: str,
        masks: bool,
        view: View | None,
    ) -> None:
        """Describe the pictures numbered `lacking` for every store that lacks them."""
        work = requested, stores, catalog, pictures, lacking, what, masks, view
        if len(self.devices) > 1:
            SharedJob(self, *work).run(on_devices(self.devices))
        else:
            ExtractionJob(self, *work).run()

    def _retry(self, members: Sequence[Member], stores: Sequence[Store], catalog: Catalog, pictures: Sequence[Picture]) -> None:
        """Let stores forget what they could not read and can be read now: a network drive's errors leave the stamp as it is."""
        doubtful = [row for row, picture in enumerate(pictures) if any(picture in store.unreadable for store in stores)]
        for row in readable_now(catalog, doubtful, max(member.extractor.size for member in members)):
            for store in stores:
                store.unreadable.pop(pictures[row], None)

    def _place(self, member: Member, source: str, masks: bool, view: View | None) -> tuple[Path, dict[str, Any]]:
        """A member's store: its folder and its key."""
        key = {
            "checkpoint": member.source,
            "size": member.extractor.size,
            "pooling": str(member.pooling),
            "source": absolute(source),
            "masks": MASK_SIZE if masks else 0,
            "precision": self.precision,
            "dtype": str(self.dtype),
            "scales": str(self.scales),
            "flip": self.flip,
            "view": str(view),
        }
        name = f"{Path(source).stem}-{digest(*map(str, key.values()))}"
        rest = {
            "pad": member.extractor.pad,
            "preprocessing": PREPROCESSING,
            "versions": {name: version(name) for name in PACKAGES},
        }
        return self.root / name, key | rest
