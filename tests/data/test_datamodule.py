from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import albumentations as A
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from beauty_bafe.data.augmentation.street import CAMERA
from beauty_bafe.data.datamodule import VALIDATION_EPOCH, SaliencyDataModule
from beauty_bafe.data.sampling import EpochSampler


@pytest.fixture
def module(toy: Path, configure) -> Callable[..., SaliencyDataModule]:
    def build(*overrides: str) -> SaliencyDataModule:
        cfg = configure(
            "train", "data=folder", f"data.root={toy / 'gallery'}", "data.batch_size=4", "data.num_workers=0", *overrides
        )
        data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=64, seed=cfg.seed)
        data.setup()
        return data

    return build


def epoch(data: SaliencyDataModule, number: int) -> list[dict[str, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(number)  # type: ignore[union-attr]
    return list(loader)


@pytest.mark.parametrize("augmentation", ["paper", "street"])
def test_same_samples_with_any_number_of_workers_and_new_ones_every_epoch(module, augmentation: str) -> None:
    batches = {
        workers: [epoch(module(f"data.num_workers={workers}", f"augmentation={augmentation}"), number) for number in (0, 1)]
        for workers in (0, 2, 8)
    }
    for workers in (2, 8):
        for number in (0, 1):
            assert len(batches[0][number]) == len(batches[workers][number])
            for one, other in zip(batches[0][number], batches[workers][number], strict=True):
                assert torch.equal(one["pictures"], other["pictures"])
                assert torch.equal(one["masks"], other["masks"])
    data = module(f"augmentation={augmentation}")
    assert data.train_set is not None
    first, second = (data.train_set[(number, 5)]["pictures"] for number in (0, 1))
    assert torch.equal(first[0], second[0]), "the original stays"
    assert not torch.equal(first[1], second[1]), "the augmented one is new"
    again = torch.cat([batch["pictures"][:, 1].flatten(1).float().mean(1) for number in (0, 1) for batch in batches[2][number]])
    assert len(again.unique()) == len(again), "no sample repeats within or across epochs"


class Together:
    """What the data module asks of one of several trainers."""

    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    fit_loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=0)))

    def __init__(self, processes: int, rank: int) -> None:
        self.world_size, self.global_rank = processes, rank


def test_processes_share_out_the_photos_of_validation(module) -> None:
    data = module("data.val_max=3")
    alone = [torch.cat([batch["row"] for batch in loader]).tolist() for loader in data.val_dataloader()]
    shares = []
    for rank in range(2):
        data.trainer = Together(2, rank)
        shares.append([torch.cat([batch["row"] for batch in loader]).tolist() for loader in data.val_dataloader()])
    for one, other, expected in zip(*shares, alone, strict=True):
        assert len(one) == len(other) == 2, "or one would wait for the other"
        assert {*one, *other} == set(expected) == {0, 1, 2}


def test_more_processes_than_photos_are_refused(module) -> None:
    data = module("data.epoch_size=4")
    data.trainer = Together(8, 0)
    with pytest.raises(ValueError, match=r"4 photos per epoch for 8 processes; type trainer.devices=4 or fewer, or a larger"):
        data.train_dataloader()


def test_batches_hold_originals_and_augmented_pictures(module) -> None:
    batch = next(iter(module().train_dataloader()))
    assert batch["pictures"].shape == (4, 2, 3, 64, 64)
    assert batch["masks"].shape == (4, 2, 1, 64, 64)
    assert batch["pictures"].dtype == batch["masks"].dtype == torch.uint8
    originals, masks = batch["pictures"][:, 0], batch["masks"][:, 0].expand(-1, 3, -1, -1)
    assert originals[masks == 0].float().mean() > 235, "around an original's product is its backdrop"


def test_split_is_seeded_disjoint_and_complete(module) -> None:
    data, same, other = module(), module(), module("seed=7")
    assert data.train_set is not None
    assert data.val_set is not None
    train, val = set(data.train_set.catalog.ids), set(data.val_set.catalog.ids)
    assert len(val) == 5  # a tenth of 48
    assert train | val == set(data.catalog.ids)
    assert not train & val
    assert val == set(same.val_set.catalog.ids)
    assert val != set(other.val_set.catalog.ids)


def test_validation_pictures_never_change(module) -> None:
    data = module()
    first, second = (torch.cat([batch["pictures"] for batch in data.val_dataloader()[0]]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], data.val_set[(VALIDATION_EPOCH, 0)]["pictures"])


def test_validation_tells_held_out_photos_from_training_photos(module) -> None:
    data = module("data.val_max=3")
    held_out, others = data.val_dataloader()
    seen = torch.cat([batch["pictures"] for batch in held_out])
    assert seen.shape == (3, 5, 3, 64, 64), "each with four street views"
    assert all(len(item.flatten(1).unique(dim=0)) == 5 for item in seen), "no two of them the same"
    pictures = torch.cat([batch["pictures"] for batch in others])[:, 0]
    assert len(pictures) == 3, "as many as val_max"
    assert torch.equal(pictures[1], data.train_set[(0, 1)]["pictures"][0]), "as they are"


@pytest.fixture
def enclosing(tmp_path: Path) -> str:
    """Two photos whose product encloses what may be a hole or a white label: one picture cannot tell."""
    for name in ("a", "b"):
        photo = np.full((64, 64, 3), 255, np.uint8)
        photo[10:54, 10:54] = (40, 70, 160)
        photo[20:40, 20:40] = 255
        Image.fromarray(photo).save(tmp_path / f"{name}.png")
    return f"data.root={tmp_path}"


def test_what_a_photo_cannot_tell_is_labelled_half(module, enclosing: str) -> None:
    label = module(enclosing).train_set[(0, 0)]["masks"][0, 0]
    assert label[30, 30] == 128
    assert (label[15, 15], label[5, 5]) == (255, 0)
    told = module(enclosing, "augmentation=paper").train_set[(0, 0)]["masks"][0, 0]
    assert told[30, 30] == 255, "the paper's views never see through it"


@pytest.mark.parametrize("holes", [0, 1])
def test_what_a_product_encloses_is_seen_through_at_times(module, enclosing: str, holes: int) -> None:
    names = ["clutter", "occlusion", "shadow", "light", "bars", "hand", "solid", "shelf"]
    names += [f"camera.{name}" for name in ("glare", "colour", "defocus", *CAMERA)]
    quiet = [f"augmentation.{name}=0" for name in names]
    data = module(enclosing, *quiet, f"augmentation.holes={holes}")
    kind = data.augmentation
    kind.warp = kind.product_color = A.Compose([])
    for epoch in range(5):
        sample = data.train_set[(epoch, 0)]
        picture, mask = sample["pictures"][1], sample["masks"][1, 0]
        assert (mask[22:38, 22:38] == 255 * (1 - holes)).all()
        assert (mask[13:17, 13:17] == 255).all()
        assert (picture[:, 22:38, 22:38] > 230).all() != bool(holes), "the background is behind it"


def test_with_a_cache_the_same_samples_come_from_one_file(module, tmp_path: Path) -> None:
    plain, cached = (epoch(module(f"data.cache={cache}"), 0) for cache in ("null", tmp_path))
    for one, other in zip(plain, cached, strict=True):
        assert torch.equal(one["pictures"], other["pictures"])
        assert torch.equal(one["masks"], other["masks"])
    assert (tmp_path / "photos-64-v2" / "photos.u8").stat().st_size == 48 * 64 * 64 * 4
    assert module(f"data.cache={tmp_path}", "data.cache_gb=0").cache is None


def test_unusable_photos_are_counted_and_left_out(toy: Path, tmp_path: Path, configure) -> None:
    for number, file in enumerate(sorted((toy / "gallery").iterdir())[:6]):
        (tmp_path / f"good{number}.jpg").symlink_to(file)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "scene.jpg").symlink_to(sorted((toy / "queries").iterdir())[1])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    torch_free = tmp_path / "noise.png"
    from PIL import Image

    Image.fromarray(noise).save(torch_free)
    cfg = configure("train", "data=folder", f"data.root={tmp_path}", "data.num_workers=0")
    data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=64, seed=0)
    data.setup()
    reasons = {row[0]: row[2] for row in data.skipped.rows}
    assert "cannot identify" in reasons["broken"]
    assert "mask not trusted" in reasons["noise"]
    assert [row[0] for row in data.skipped.unreadable] == ["broken"]
    assert f"{len(reasons)} skipped" in data.describe()


def test_too_few_photos_are_refused(tmp_path: Path, toy: Path, configure) -> None:
    (tmp_path / "one.jpg").symlink_to(sorted((toy / "gallery").iterdir())[0])
    cfg = configure("train", "data=folder", f"data.root={tmp_path}", "data.num_workers=0")
    data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=64, seed=0)
    with pytest.raises(ValueError, match=r"1 of 1 catalogue photos are usable.*at least 2"):
        data.setup()


def drawn(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert {number for number, _ in keys} == {epoch}
    return [index for _, index in keys]


def test_sampler_visits_everything_in_another_order_every_epoch() -> None:
    sampler = EpochSampler(10, seed=1)
    first, second = drawn(sampler, 0), drawn(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert drawn(EpochSampler(10, seed=1), 0) == first


def test_short_epochs_pass_over_the_whole_catalogue_before_repeating() -> None:
    sampler = EpochSampler(10, seed=1, epoch_size=4)
    seen = [index for number in range(5) for index in drawn(sampler, number)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_processes_share_an_epoch() -> None:
    parts = [drawn(EpochSampler(10, seed=1, replicas=3, rank=rank), 2) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert len(set().union(*parts)) == 9


@pytest.mark.skipif(not hasattr(os, "nice"), reason="a system without niceness")
def test_loaders_leave_the_cores_to_the_network(module: Callable[..., SaliencyDataModule]) -> None:
    class Niceness(Dataset[int]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, _: int) -> int:
            return os.nice(0)

    loader = module().train_dataloader()
    assert list(DataLoader(Niceness(), num_workers=1, worker_init_fn=loader.worker_init_fn)) == [min(19, os.nice(0) + 15)]
