"""Lightning data module for training: catalogue photos and augmented street views, with their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from .augmentation import Augmentation, Sample, Surroundings, draw_other
from .backgrounds import BACKGROUND_LONGEST, Backgrounds
from .catalog import Catalog, Skipped, from_perfect500k, from_shards, open_catalog
from .foreground import find_holes
from .photos import LoadResult, PhotoCache, inspect_photo, load_photo
from .pictures import UnreadablePicture, read_picture
from .places import Place
from .sampling import EpochSampler, split_indices
from .workers import default_workers, low_priority_worker, single_threaded_worker

VALIDATION_EPOCH = 2**31 - 1  # validation pictures are always those of this epoch, which training never reaches


class ForegroundDataset(Dataset[dict[str, torch.Tensor]]):
    """Item (epoch, index): the letterboxed photo and `views` street views of it, with their masks.

    `pictures`: uint8 (1 + views, 3, S, S), the photo first. `masks`: uint8 (1 + views, 1, S, S), 0 to 255, and 128 where the
    photo does not show whether there is a hole (`find_holes`), if the augmentation renders both cases. `row`: int64 (), the
    index. Random generators are seeded by (seed, epoch, index, view), so results do not depend on workers or order.
    """

    def __init__(
        self,
        catalog: Catalog,
        augmentation: Augmentation,
        backgrounds: Backgrounds,
        load: Callable[[Place], Sample],
        seed: int,
        views: int = 1,
    ) -> None:
        self.catalog, self.augmentation, self.backgrounds = catalog, augmentation, backgrounds
        self.load, self.seed, self.views = load, seed, views

    def __len__(self) -> int:
        return len(self.catalog)

    def sample(self, index: int) -> Sample:
        """Photo `index` and its mask, letterboxed; raises like `load_photo`."""
        return self.load(self.catalog.paths[index])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        photo, mask = self.sample(index)
        surroundings = Surroundings(self.backgrounds, lambda rng: self.sample(draw_other(rng, index, len(self))))
        label = open_mask = mask
        if self.augmentation.holes:
            # Label 128: the photo does not show whether an enclosed part is a hole; its street views render both.
            holes = find_holes(photo, mask)
            label = np.where(holes, np.uint8(128), mask)
            open_mask = np.where(cv2.dilate(holes.view(np.uint8), np.ones((3, 3), np.uint8)), np.uint8(0), mask)
        views = []
        for view in range(self.views):
            rng = np.random.default_rng((self.seed, epoch, index, view))
            cut = open_mask if rng.random() < self.augmentation.holes else mask
            views.append(self.augmentation(photo, cut, surroundings, rng))
        pictures = np.stack([photo, *(view.photo for view in views)]).transpose(0, 3, 1, 2)
        masks = np.stack([label, *(view.mask for view in views)])[:, None]
        return {
            "pictures": torch.from_numpy(np.ascontiguousarray(pictures)),
            "masks": torch.from_numpy(masks),
            "row": torch.tensor(index),
        }


class CleanPhotos(Dataset[dict[str, torch.Tensor]]):
    """Item i: photo i, not augmented; `pictures`: uint8 (1, 3, S, S). `row`: int64 (), i."""

    def __init__(self, catalog: Catalog, load: Callable[[Place], Sample]) -> None:
        self.catalog, self.load = catalog, load

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        photo = self.load(self.catalog.paths[index]).photo
        return {"pictures": torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))[None], "row": torch.tensor(index)}


class _Scan(Dataset[LoadResult]):
    """Item i: the result of inspecting file i."""

    def __init__(self, catalog: Catalog, inspect: Callable[[Place], LoadResult]) -> None:
        self.catalog, self.inspect = catalog, inspect

    def __len__(self) -> int:
        return len(self.catalog)

    def __getitem__(self, index: int) -> LoadResult:
        return self.inspect(self.catalog.paths[index])


def inspect_background(path: Place) -> LoadResult:
    """The result of reading a background photograph."""
    try:
        read_picture(path, BACKGROUND_LONGEST)
    except UnreadablePicture as error:
        return LoadResult(str(error), unreadable=True)
    return LoadResult()


def inspect_photo_without_pixels(path: Place, size: int) -> LoadResult:
    """`inspect_photo` without pixels, so that workers need not send them if they are not cached."""
    return inspect_photo(path, size)._replace(pixels=None)


class SaliencyDataModule(pl.LightningDataModule):
    """Catalogue photos and backgrounds. All are inspected once; those that cannot be used are listed in `skipped`.

    `root`: a Catalog or an argument of `open_catalog`; `backgrounds`: likewise, or None for procedural scenes. `cache`: folder
    for decoded photos; files are read every time if it is None, or if the photos would take more than `cache_gb` GB.
    """

    def __init__(
        self,
        root: Catalog | str | Path,
        backgrounds: Catalog | str | Path | None,
        augmentation: Augmentation,
        size: int,
        seed: int,
        batch_size: int,
        val_share: float,
        val_max: int,
        val_views: int,
        epoch_size: int | None,
        num_workers: int | None,
        cache: str | Path | None,
        cache_gb: float,
    ) -> None:
        super().__init__()
        self.catalog = root if isinstance(root, Catalog) else open_catalog(root)
        self.photos = backgrounds if isinstance(backgrounds, Catalog | None) else open_catalog(backgrounds)
        self.augmentation, self.size, self.seed = augmentation, size, seed
        self.val_share, self.val_max, self.val_views = val_share, val_max, val_views
        self.batch_size, self.epoch_size = batch_size, epoch_size
        self.num_workers = default_workers() if num_workers is None else num_workers
        fits = len(self.catalog) * size * size * 4 <= cache_gb * 1e9
        self.cache = PhotoCache(cache, size) if cache is not None and fits else None
        self.skipped, self.inspected = Skipped(), 0
        self.train_set: ForegroundDataset | None = None
        self.val_set: ForegroundDataset | None = None
        self._pictures: dict[str, str] = {}  # setting -> fingerprint of the pictures in use

    def setup(self, stage: str | None = None) -> None:
        """Inspect every file and split off the validation photos. Raises ValueError if too few are usable."""
        if self.train_set is not None:
            return
        if self.cache is not None:
            results = self.cache.fill(self.catalog, partial(self._scan, inspect=partial(inspect_photo, size=self.size)))
        else:
            results = list(self._scan(self.catalog, partial(inspect_photo_without_pixels, size=self.size)))
        usable = self._collect_usable(self.catalog, results)
        photos = self.photos
        if photos is not None:
            photos = photos.subset(self._collect_usable(photos, self._scan(photos, inspect_background, "backgrounds")))
            if not len(photos):
                raise ValueError("no background can be read, see skipped.csv; type data.backgrounds=null for procedural scenes")
        if len(usable) < 2:
            raise ValueError(
                f"{len(usable)} of {len(self.catalog)} catalogue photos are usable, see skipped.csv; "
                "training needs at least 2, one of them for validation"
            )
        drawn = "drawn scenes" if photos is None else photos.fingerprint()
        self._pictures = {"data.root": self.catalog.subset(usable).fingerprint(), "data.backgrounds": drawn}
        shuffled = np.random.default_rng((self.seed, len(usable))).permutation(usable).tolist()
        held_out = max(1, min(round(self.val_share * len(usable)), self.val_max))
        backgrounds = Backgrounds(photos)
        load = self.cache or partial(load_photo, size=self.size)
        self.val_set, self.train_set = (
            ForegroundDataset(self.catalog.subset(sorted(part)), self.augmentation, backgrounds, load, self.seed, views)
            for part, views in ((shuffled[:held_out], self.val_views), (shuffled[held_out:], 1))
        )

    def state_dict(self) -> dict[str, str]:
        """For checkpoints: fingerprints of the pictures in use, independent of their location."""
        return self._pictures

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Raise ValueError if a resumed run was started with other pictures."""
        for key, now in self._pictures.items():
            if state_dict[key] != now:
                raise ValueError(
                    f"the run was started with {state_dict[key]} in {key}, now there are {now}; "
                    f"type {key}= and their location, or leave out ckpt_path to start from scratch"
                )

    def describe(self) -> str:
        """One line about the training data."""
        assert self.train_set is not None
        assert self.val_set is not None
        photos = self.train_set.backgrounds.photos
        return (
            f"{len(self.train_set)} training photos, {len(self.val_set)} validation photos, {len(self.skipped.rows)} skipped; "
            f"backgrounds: {f'{len(photos)} photographs' if photos else 'procedural'}"
        )

    def _scan(
        self, catalog: Catalog, inspect: Callable[[Place], LoadResult], what: str = "catalogue photos"
    ) -> Iterator[LoadResult]:
        from rich.progress import track

        scan = DataLoader(
            _Scan(catalog, inspect), 16, num_workers=self.num_workers, worker_init_fn=single_threaded_worker, collate_fn=list
        )
        for batch in track(scan, f"inspecting {len(catalog)} {what}"):
            yield from batch

    def _collect_usable(self, catalog: Catalog, results: Iterable[LoadResult]) -> list[int]:
        """Indices of the usable pictures; the others are added to `skipped`."""
        usable = []
        for index, result in enumerate(results):
            self.inspected += 1
            if result.reason:
                self.skipped.add(catalog, index, result.reason, result.unreadable)
            else:
                usable.append(index)
        return usable

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        assert self.train_set is not None
        replicas, rank = self._share()
        sampler = EpochSampler(len(self.train_set), self.seed, self.epoch_size, replicas, rank)
        if not len(sampler):
            raise ValueError(
                f"{sampler.epoch_size} photos per epoch for {replicas} processes; type trainer.devices={sampler.epoch_size} "
                "or fewer, or a larger data.epoch_size"
            )
        if self.trainer:
            # Lightning creates the first iterator, from which workers prefetch, before it calls set_epoch with this number.
            progress: Any = self.trainer.fit_loop.epoch_progress
            sampler.set_epoch(progress.current.processed)
        batch_size = min(self.batch_size, len(sampler))
        # BatchSampler works for keys of any type, but is annotated for integers only.
        batches = BatchSampler(sampler, batch_size, drop_last=True)  # type: ignore[arg-type]
        return self._loader(self.train_set, batches)

    def val_dataloader(self) -> list[DataLoader[dict[str, torch.Tensor]]]:
        """Held-out photos with their street views; then up to `val_max` training photos as distractors.

        Each of several processes gets equally many, so that some rows occur twice.
        """
        assert self.val_set is not None
        assert self.train_set is not None
        share = self._share()
        keys = [(VALIDATION_EPOCH, index) for index in split_indices(len(self.val_set), *share)]
        others = CleanPhotos(self.train_set.catalog.subset(range(min(len(self.train_set), self.val_max))), self.train_set.load)
        return [
            # As many pictures per batch as in training.
            self._loader(self.val_set, split_batches(keys, max(1, 2 * self.batch_size // (1 + self.val_views)))),
            self._loader(others, split_batches(split_indices(len(others), *share), 2 * self.batch_size)),
        ]

    def _share(self) -> tuple[int, int]:
        """The number of training processes, and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _loader(self, dataset: Dataset[dict[str, torch.Tensor]], batches: object) -> DataLoader[dict[str, torch.Tensor]]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of key lists
            num_workers=self.num_workers,
            # With a GPU, loading is the bottleneck, and the network does not need the cores.
            worker_init_fn=single_threaded_worker if on_gpu else low_priority_worker,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
        )


def perfect500k_datamodule(root: str, titles: str, **options: Any) -> SaliencyDataModule:
    """SaliencyDataModule for the challenge's layout; see `from_perfect500k`."""
    return SaliencyDataModule(from_perfect500k(root, titles), **options)


def shards_datamodule(root: str, **options: Any) -> SaliencyDataModule:
    """SaliencyDataModule for the output of `beauty-bafe shards`; samples are bit-identical to those of the original files."""
    return SaliencyDataModule(from_shards(root), **options)


def split_batches(keys: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split into batches of `size`; the last may be shorter."""
    return [keys[start : start + size] for start in range(0, len(keys), size)]
