from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from beauty_bafe.models.module import SaliencyModule, load_extractor


def test_a_checkpoint_alone_rebuilds_the_network(tiny: dict[str, Any], tiny_checkpoint: Path) -> None:
    extractor = load_extractor(tiny_checkpoint)
    content = torch.load(tiny_checkpoint, weights_only=True)
    assert content["hyper_parameters"]["model"]["size"] == extractor.size == 64
    assert not extractor.training
    for key, value in extractor.state_dict().items():
        assert torch.equal(value, content["state_dict"][f"extractor.{key}"])


def test_pretrained_weights_are_not_fetched_again(tiny: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["hyper_parameters"]["model"] |= {"pretrained": True, "weights": "/gone/away.pth"}
    torch.save(content, tmp_path / "a.ckpt")
    load_extractor(tmp_path / "a.ckpt")


def write(kind: str, good: Path, file: Path) -> None:
    content = torch.load(good, weights_only=True)
    if kind == "cut short":
        file.write_bytes(good.read_bytes()[:5000])
    elif kind == "text":
        file.write_text("not a checkpoint")
    elif kind == "bare state dict":
        torch.save(content["state_dict"], file)
    elif kind == "another network":
        content["hyper_parameters"]["model"]["hidden"] = 16
        torch.save(content, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", "not a checkpoint of this project"),
        ("text", "not a checkpoint of this project"),
        ("bare state dict", r"not a checkpoint of this project.*model.weights=FILE"),
        ("another network", "names model test_efficientnet but its weights are of another network"),
        ("missing", "does not exist; train.py writes"),
    ],
)
def test_other_files_are_refused(tiny_checkpoint: Path, tmp_path: Path, kind: str, message: str) -> None:
    write(kind, tiny_checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        load_extractor(tmp_path / "a.ckpt")


class Held(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Photos of squares, each with one street view that is the photo itself; `wrong` labels of the photos."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        photo = torch.full((3, 64, 64), 255, dtype=torch.uint8)
        photo[:, 8 + 8 * index : 40, 8:40] = torch.tensor([60 * index, 200 - 50 * index, 90], dtype=torch.uint8)[:, None, None]
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        mask[:, 8 + 8 * index : 40, 8:40] = 255
        masks = torch.stack([255 - mask if self.wrong else mask, mask])
        return {"pictures": torch.stack([photo, photo]), "masks": masks, "row": torch.tensor(index)}


class Others(Held):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pictures": super().__getitem__(index)["pictures"][:1], "row": torch.tensor(index)}


def validate(module: SaliencyModule, *sets: torch.utils.data.Dataset[dict[str, torch.Tensor]]) -> dict[str, float]:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loaders = [torch.utils.data.DataLoader(one, batch_size=2) for one in sets]
    return dict(trainer.validate(module, loaders, verbose=False)[0])


def test_held_out_photos_are_told_apart_from_those_of_the_training_set(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = SaliencyModule(tiny, lr=1e-3, warmup=0)
    assert validate(module, Held())["val/mAP@7"] == 1
    assert validate(module, Held(), Others())["val/mAP@7"] == 0.5, "each has its double among the others, and ties count"


def test_mask_metrics_are_of_street_views_alone(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = SaliencyModule(tiny, lr=1e-3, warmup=0)
    right, wrong = (validate(module, Held(wrong)) for wrong in (False, True))
    for name in ("val/mae", "val/iou", "val/f_beta"):
        assert right[name] == wrong[name]
    assert right["val/loss"] != wrong["val/loss"]


def test_only_plain_values_become_hyper_parameters(tiny: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        SaliencyModule(tiny | {"pad": torch.tensor(255)}, lr=1e-3, warmup=0)


def test_a_training_that_diverges_ends_before_it_is_saved(tiny: dict[str, Any], tmp_path: Path) -> None:
    module = SaliencyModule(tiny, lr=1e-3, warmup=0)
    weight = module.extractor.encoders[0][0].weight
    pictures = torch.zeros(2, 2, 3, 64, 64, dtype=torch.uint8)
    batch = {"pictures": pictures, "masks": pictures[:, :, :1], "row": torch.arange(2)}
    checkpoints = ModelCheckpoint(tmp_path, save_last=True)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoints],
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader([batch], batch_size=None)
    handle = weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(ValueError, match=r"training diverged: extractor.encoders.0.0.weight is not finite after epoch 1; .*lr"):
        trainer.fit(module, loader, loader)
    handle.remove()
    assert not list(tmp_path.iterdir())
