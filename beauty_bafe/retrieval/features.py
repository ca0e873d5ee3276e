"""From pictures to descriptors on disk: one pass over a catalogue feeds every checkpoint and every pooling."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.catalog import Catalog, Skipped, stamp
from ..data.images import Pictures
from ..data.workers import one_opencv_thread
from ..models.descriptor import Pooling
from ..models.exported import checkpoint_bytes
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import MASK_SIZE
from ..models.module import load_extractor, read_checkpoint
from ..models.precision import fastest_precision, pick_devices
from ..models.views import View
from ..recipe import check_enlarge
from .describing import ExtractionJob, readable_now
from .manifest import digest, locked
from .sharing import SharedJob, on_devices
from .store import Picture, Store

log = logging.getLogger("beauty_bafe")

TOLERANCE = 1e-3  # of a vector's length: extraction.dtype=float16 rounds it
PREPROCESSING = "letterbox 1"  # counts up when the same file gives other pixels
PACKAGES = ("torch", "timm", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Features:
    """`vectors`: float32 (N, D), one row a picture. `ids`: N names. `masks`: uint8 (N, M, M) saliency, 0 to 255, or None.

    Every vector has length 1, or 0 where a picture showed nothing to describe, unless `any_length` says otherwise: the
    ensemble of BAFE's code (`ensemble.normalize=false`) leaves them as they are. Whoever needs length 1 then calls `unit`.

    Raises ValueError where rows and ids differ, a vector is not finite or has another length.
    """

    vectors: np.ndarray
    ids: tuple[str, ...]
    masks: np.ndarray | None = None
    any_length: bool = False

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.ids):
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.ids)} ids")
        for start in range(0, len(self.vectors), 1 << 14):
            block = self.vectors[start : start + (1 << 14)]
            broken = np.flatnonzero(~np.isfinite(block).all(axis=1))
            if len(broken):
                raise ValueError(f"the descriptor of '{self.ids[start + broken[0]]}' is not finite; try precision=32-true")
            lengths = np.linalg.norm(block, axis=1)
            other = np.flatnonzero((np.abs(lengths - 1) > TOLERANCE) & (lengths != 0))
            if len(other) and not self.any_length:
                raise ValueError(
                    f"the descriptor of '{self.ids[start + other[0]]}' has length {lengths[other[0]]:.6g}, not 1; "
                    "bring it there by `unit`, or say any_length=True"
                )


@dataclass(frozen=True)
class Member:
    """One descriptor of an ensemble: a network and a pooling. `name` tells which; `source` hashes the weights.

    `trained`: whether the network has learned to make masks.
    """

    name: str
    source: str
    extractor: BackgroundAgnosticExtractor
    pooling: Pooling
    trained: bool = True


def load_members(
    checkpoints: str | Sequence[str],
    poolings: Mapping[str, Pooling],
    models: Mapping[str, Mapping[str, Any]] | None = None,
    pairs: Mapping[Any, Sequence[str]] | None = None,
    size: int | None = None,
) -> list[Member]:
    """Each network with each pooling: trained ones from `checkpoints`, others with their published weights from `models`.

    `models`: plain arguments of BackgroundAgnosticExtractor by name. `pairs`: the poolings, by name, of a network (a model's
    name, a checkpoint's number from 0); one that is not named takes all. A pooling of the picture itself is made once.
    `size`: pixels of the square that trained networks look at, None for what each checkpoint asks for.
    Raises ValueError for a file that is not a checkpoint, unknown names, or saliency asked of a network that learned none.
    """
    models = models or {}
    pairs = {str(name): names for name, names in (pairs or {}).items()}
    files = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints)
    networks = {
        str(number): (file, _load_at(file, size), digest(*checkpoint_bytes(file).values())) for number, file in enumerate(files)
    }
    for name, model in models.items():
        extractor = BackgroundAgnosticExtractor(**model).eval()
        weights = (tensor.numpy().tobytes() for tensor in extractor.backbone.state_dict().values())
        networks[name] = model["name"], extractor, digest(json.dumps(dict(model), sort_keys=True), *weights)
    unknown = [name for name in pairs if name not in networks] or [
        name for names in pairs.values() for name in names if name not in poolings
    ]
    if unknown:
        raise ValueError(
            f"pairs names '{unknown[0]}'; the networks are {', '.join(networks)}, the poolings {', '.join(poolings)}"
        )
    members: list[Member] = []
    for key, (name, extractor, source) in networks.items():
        for pooling in [poolings[chosen] for chosen in pairs.get(key, poolings)]:
            if pooling.map == "picture" and any(member.pooling is pooling for member in members):
                continue
            if pooling.saliency and key in models:
                raise ValueError(
                    f"pooling '{pooling}' needs masks, and {name} was never trained to make any; "
                    "type checkpoints='[RUN/checkpoints/best.ckpt]' instead, or a pooling without masks, such as pooling=gem"
                )
            members.append(Member(f"{name}: {pooling}", source, extractor, pooling, key not in models))
    return members


def _load_at(file: str, size: int | None) -> BackgroundAgnosticExtractor:
    """A checkpoint's network at `size`, or at the size that the checkpoint was made to be described at."""
    extractor = load_extractor(file)
    recipe = read_checkpoint(file).get("retrieval")
    times = check_enlarge(recipe.get("enlarge", 1), f"checkpoint '{file}'") if isinstance(recipe, Mapping) else 1
    own = extractor.size
    if size is not None and size < 1:
        raise ValueError(f"size={size}: type pixels, or null for what the checkpoint asks for")
    patch = extractor.backbone.patch or 1
    patch = patch if own % patch == 0 else 1
    extractor.size = size or max(1, round(own * times / patch)) * patch
    if extractor.size != own:
        log.info(f"'{file}' describes at {extractor.size} px, trained at {own} px")
    try:
        if extractor.size != own:
            extractor(torch.zeros(1, 3, extractor.size, extractor.size, dtype=torch.uint8))
    except (AssertionError, RuntimeError) as error:  # timm's transformers assert their size
        raise ValueError(
            f"'{file}' cannot look at {extractor.size} px ({error}); type size={own}, as it was trained"
        ) from error
    return extractor


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
            "source": str(Path(source).expanduser().resolve()),
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


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) at length 1; one of zeros stays as it is."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def mean_masks(members: Sequence[Features]) -> Features:
    """What an ensemble looks at: the first member's features with the mean of the masks of those that take one."""
    masks = [features.masks for features in members if features.masks is not None]
    if not masks:
        return replace(members[0], masks=None)
    mean = np.asarray(masks, np.float32).mean(axis=0) + 0.5
    return replace(members[0], masks=np.asarray(mean, np.uint8))


def describe_members(members: Sequence[Member]) -> list[Mapping[str, Any]]:
    """What an index made from these members must share with its queries: checkpoint, size and pooling, plain values."""
    return [{"checkpoint": member.source, "size": member.extractor.size, "pooling": str(member.pooling)} for member in members]
