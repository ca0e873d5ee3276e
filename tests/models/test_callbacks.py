from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from beauty_bafe.models.callbacks import Checkpoints, History, SamplePictures
from beauty_bafe.models.module import SaliencyModule


class Pictures(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
        return {"pictures": pictures, "masks": pictures[:, :1], "row": torch.tensor(index)}


def fit(
    folder: Path, tiny: dict[str, Any], epochs: int, ckpt_path: Path | None = None, extra: list[Any] | None = None
) -> pl.Trainer:
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            History(str(folder)),
            SamplePictures(str(folder / "samples"), 2),
            *(extra or []),
            Checkpoints(str(folder), "val/mAP@7", {}),
        ],
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    trainer.fit(SaliencyModule(tiny, lr=1e-2, warmup=0), loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_history_goes_on_across_a_resume(tmp_path: Path, tiny: dict[str, Any]) -> None:
    fit(tmp_path / "whole", tiny, epochs=3)
    fit(tmp_path / "parts", tiny, epochs=1)
    fit(tmp_path / "parts", tiny, epochs=3, ckpt_path=tmp_path / "parts" / "last.ckpt")
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert [row["epoch"] for row in parts["epochs"]] == [0, 1, 2]
    for one, other in zip(whole["epochs"], parts["epochs"], strict=True):
        assert one["train/loss"] == other["train/loss"]
        assert one["val/iou"] == other["val/iou"]
    assert whole["train/loss"] == whole["epochs"][-1]["train/loss"]
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 5000
    assert sorted(path.name for path in (tmp_path / "whole" / "samples").iterdir()) == [f"epoch_00{e}.jpg" for e in range(3)]


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("stopped")


def test_a_run_that_dies_in_its_first_epoch_can_be_resumed(tmp_path: Path, tiny: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path / "cut", tiny, epochs=2, extra=[Stop()])
    fit(tmp_path / "cut", tiny, epochs=2, ckpt_path=tmp_path / "cut" / "last.ckpt")
    fit(tmp_path / "whole", tiny, epochs=2)
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, tiny, epochs=1)
    good = (tmp_path / "last.ckpt").read_bytes()

    def full(self: pl.Trainer, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"could not write .*last.ckpt.*No space left.*is the disk full.*ckpt_path="):
        fit(tmp_path, tiny, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == good
    assert not [*tmp_path.glob("*.part"), *tmp_path.glob("*.copy")]


def test_best_is_the_epoch_of_the_highest_score_the_newest_of_equals(tmp_path: Path) -> None:
    class Trainer:
        is_global_zero = True

        def __init__(self, score: float, epoch: int) -> None:
            self.callback_metrics, self.epoch = {"val/mAP@7": torch.tensor(score)}, epoch

        def save_checkpoint(self, path: Path) -> None:
            Path(path).write_text(str(self.epoch))

    callback = Checkpoints(str(tmp_path), "val/mAP@7", {})
    for epoch, score in enumerate((0.5, 0.75, 0.75, 0.25)):
        callback.on_train_epoch_end(Trainer(score, epoch), None)  # type: ignore[arg-type]
    assert (tmp_path / "best.ckpt").read_text() == "2"
    assert (tmp_path / "last.ckpt").read_text() == "3"
    resumed = Checkpoints(str(tmp_path), "val/mAP@7", {})
    resumed.load_state_dict(callback.state_dict())
    resumed.on_train_epoch_end(Trainer(0.5, 4), None)  # type: ignore[arg-type]
    assert (tmp_path / "best.ckpt").read_text() == "2"
