"""The extractor under Lightning: loss, steps, optimiser, logging; and loading it back from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from .extractor import BackgroundAgnosticExtractor
from .objectives import mask_metrics, saliency_loss


class SaliencyModule(pl.LightningModule):
    """Trains the mask encoders by mean square error on foreground augmentation (BAFE).

    `model`: the plain arguments of BackgroundAgnosticExtractor. `lr`: Adam's step size, reached after `warmup` steps.
    """

    def __init__(self, model: Mapping[str, Any], lr: float, warmup: int) -> None:
        super().__init__()
        # Through JSON: what is no plain value fails here, not when somebody loads the checkpoint.
        self.save_hyperparameters(json.loads(json.dumps({"model": model, "lr": lr, "warmup": warmup})))
        self.lr, self.warmup = lr, warmup
        self.extractor = BackgroundAgnosticExtractor(**model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = saliency_loss(self.extractor(batch["pictures"]).masks, batch["masks"].float() / 255)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch["masks"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        label = batch["masks"].float() / 255
        extraction = self.extractor(batch["pictures"])
        # Originals stand at even places; only the augmented pictures tell something.
        metrics = {key: value[1::2].mean() for key, value in mask_metrics(extraction.saliency(label.shape[-1]), label).items()}
        metrics["loss"] = saliency_loss(extraction.masks, label)
        for key, value in metrics.items():
            self.log(f"val/{key}", value, prog_bar=key == "iou", batch_size=len(label) // 2, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        # Adam's first steps move thousands of weights per output the same way; at full size they can push a mask so far
        # below 0 (most cells are background) that the sigmoid's gradient is gone for good.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (self.warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load_extractor(checkpoint: str | Path) -> BackgroundAgnosticExtractor:
    """The extractor of a checkpoint, on the CPU in evaluation mode; needs no conf and no hub, and runs no code of the file.

    Raises ValueError where the file is no checkpoint of ours.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"checkpoint '{checkpoint}' does not exist; train.py writes RUN/checkpoints/best.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        model = {**content["hyper_parameters"]["model"], "pretrained": False, "weights": None}
        state = {key.removeprefix("extractor."): value for key, value in content["state_dict"].items()}
    except Exception as error:
        raise ValueError(
            f"'{checkpoint}' is no checkpoint of this project ({type(error).__name__}: {str(error)[:200]}); "
            "give a best.ckpt or last.ckpt that train.py wrote, or use model.weights=FILE for a bare state dict"
        ) from error
    extractor = BackgroundAgnosticExtractor(**model)
    try:
        extractor.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"'{checkpoint}' names model {model['name']} but its weights are of another network: {error}"
        ) from error
    return extractor.eval()


def check_resumable(module: pl.LightningModule, checkpoint: str | Path) -> None:
    """Raise ValueError where a run cannot go on from `checkpoint`: not ours, or made with another hyper-parameter (named)."""
    load_extractor(checkpoint)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    old, new = _flat(content["hyper_parameters"]), _flat(dict(module.hparams))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"ckpt_path='{checkpoint}' was trained with {key}={old.get(key)}, now it is {new.get(key)}; "
                "type the command that started the run, with ckpt_path added"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
