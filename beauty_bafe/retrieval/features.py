"""From pictures to descriptors: one pass over a catalogue feeds every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.catalog import Catalog, Skipped
from ..data.datamodule import default_workers, quiet_worker
from ..data.pictures import UnreadablePicture, letterbox, read_picture
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.precision import fastest_precision

MASK_SIZE = 56  # stride 4 at 224 px: the finest grid a mask is predicted on


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
        broken = np.flatnonzero(~np.isfinite(self.vectors).all(axis=1))
        if len(broken):
            raise ValueError(f"the descriptor of '{self.ids[broken[0]]}' is not finite; try precision=32-true")


class _Canvases(Dataset[tuple[list[Tensor], str]]):
    """Item i: picture i letterboxed once per canvas (size, pad), or the reason why it cannot be read."""

    def __init__(self, catalog: Catalog, canvases: Sequence[tuple[int, int]]) -> None:
        self.catalog, self.canvases = catalog, canvases

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, index: int) -> tuple[list[Tensor], str]:
        try:
            picture = read_picture(self.catalog.paths[index], max(size for size, _ in self.canvases)).rgb
        except UnreadablePicture as error:
            return [], str(error)
        return [torch.from_numpy(letterbox(picture, *canvas)).permute(2, 0, 1) for canvas in self.canvases], ""


@torch.inference_mode()
def extract(
    extractors: Sequence[BackgroundAgnosticExtractor],
    catalog: Catalog,
    pooling: Pooling,
    skipped: Skipped,
    what: str,
    batch_size: int,
    num_workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    keep_masks: bool = False,
) -> list[Features]:
    """Features of each extractor over the whole catalogue; unreadable pictures go to `skipped` and have no row.

    Each picture is decoded once. `what` names the pictures in the progress line. With `keep_masks` the first Features
    keep what the pooling looks at: the extractors' mean saliency, or everything (255) where the pooling takes no saliency.
    Raises ValueError for a device that is not there.
    """
    device = pick_device(device)
    precision = fastest_precision(device) if precision == "auto" else precision
    canvases = sorted({(extractor.size, extractor.pad) for extractor in extractors})
    places = [canvases.index((extractor.size, extractor.pad)) for extractor in extractors]
    loader = DataLoader(
        _Canvases(catalog, canvases),
        batch_size=batch_size,
        num_workers=default_workers() if num_workers is None else num_workers,
        collate_fn=list,
        worker_init_fn=quiet_worker,
        pin_memory=device == "cuda",
    )
    networks = [extractor.to(device).eval() for extractor in extractors]
    # Written by index: row i is picture i, whatever happens in between.
    rows: list[np.ndarray | None] = [None] * len(extractors)
    masks = np.zeros((len(catalog), MASK_SIZE, MASK_SIZE), np.float32) if keep_masks else None
    readable = np.zeros(len(catalog), bool)
    start = 0
    for batch in track(loader, f"describing {len(catalog)} {what}", total=len(loader)):
        good = [start + offset for offset, (_, reason) in enumerate(batch) if not reason]
        for offset, (_, reason) in enumerate(batch):
            if reason:
                skipped.add(catalog, start + offset, reason)
        start += len(batch)
        if not good:
            continue
        readable[good] = True
        stacks = [torch.stack([views[c] for views, reason in batch if not reason]).to(device) for c in range(len(canvases))]
        for number, network in enumerate(networks):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
                extraction = network(stacks[places[number]])
            vectors = torch.nn.functional.normalize(pooling(extraction)).cpu().numpy()
            if rows[number] is None:
                rows[number] = np.zeros((len(catalog), vectors.shape[1]), np.float32)
            rows[number][good] = vectors  # type: ignore[index]
            if masks is not None:
                looked_at = extraction.saliency(MASK_SIZE)[:, 0].cpu().numpy() if pooling.saliency else 1.0
                masks[good] += looked_at / len(networks)
    if not readable.any():
        raise ValueError(f"none of the {len(catalog)} {what} can be read; the first: {catalog.paths[0]}: {skipped.rows[0][2]}")
    ids = tuple(name for name, ok in zip(catalog.ids, readable, strict=True) if ok)
    shown = None if masks is None else (masks[readable] * 255 + 0.5).astype(np.uint8)
    return [Features(row[readable], ids, None if number else shown) for number, row in enumerate(rows) if row is not None]


def pick_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` -> a torch device. Raises ValueError where there is no GPU to use."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device}: type auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; type device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
