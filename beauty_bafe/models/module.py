"""The extractor as a Lightning module: loss, steps, optimiser, logging; and loading it from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather_rows
from .exported import PREFIX, read_network
from .extractor import BackgroundAgnosticExtractor, Extraction, resize_mask
from .fast_training import optimize_for_training
from .objectives import mask_metrics, reciprocal_rank, saliency_loss
from .pooling import spoc


class SaliencyModule(pl.LightningModule):
    """Trains the mask encoders with mean squared error on augmented foregrounds (BAFE).

    `model`: the arguments of BackgroundAgnosticExtractor. `lr`: learning rate of Adam, reached after `warmup` steps.
    """

    def __init__(self, model: Mapping[str, Any], lr: float, warmup: int) -> None:
        super().__init__()
        # Through JSON, so that a value that is not plain fails here, not when the checkpoint is loaded.
        self.save_hyperparameters(json.loads(json.dumps({"model": model, "lr": lr, "warmup": warmup})))
        self.lr, self.warmup = lr, warmup
        self.extractor = BackgroundAgnosticExtractor(**model)
        self._held_out: list[dict[str, Tensor]] = []
        self._others: list[dict[str, Tensor]] = []

    def describe(self, extraction: Extraction) -> Tensor:
        """The descriptors that validation ranks, float (B, D) of length 1."""
        weight = resize_mask(extraction.masks[-1], extraction.last.shape[-2:])
        return F.normalize(spoc(extraction.last.float(), weight))

    def training_loss(self, extraction: Extraction, label: Tensor) -> Tensor:
        """The loss of 2B pictures (photo and street view in turn); `label`: their true masks, float (2B, 1, H, W) in 0..1."""
        return self.validation_loss(extraction, label)

    def validation_loss(self, extraction: Extraction, label: Tensor) -> Tensor:
        """The loss of the masks only."""
        return saliency_loss(extraction.masks, label)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["objective"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError if another class wrote the checkpoint."""
        written = checkpoint.get("objective", type(self).__name__)  # older checkpoints do not store it
        if written != type(self).__name__:
            raise ValueError(
                f"this checkpoint is of {written}, not of {type(self).__name__}; type {written}.load_from_checkpoint, "
                "or load_extractor for the network only"
            )

    def on_fit_start(self) -> None:
        if not self.extractor.frozen:
            size = self.extractor.size
            optimize_for_training(self.extractor.backbone, torch.zeros(1, 3, size, size, device=self.device))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        label = batch["masks"].flatten(0, 1).float() / 255
        loss = self.training_loss(self.extractor(batch["pictures"].flatten(0, 1)), label)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(label))
        return loss

    def on_validation_start(self) -> None:
        """Raise ValueError if training has diverged, before a checkpoint is saved: the loss can stay finite nevertheless."""
        for name, weight in self.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(
                    f"training diverged: {name} is not finite after epoch {self.current_epoch + 1}; type a smaller "
                    f"objective.lr (it is {self.lr}), and objective.backbone_lr if the objective has one"
                )

    def on_validation_epoch_start(self) -> None:
        self._held_out, self._others = [], []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Held-out photos and their street views (first loader); training photos as distractors (second loader)."""
        pictures = batch["pictures"]
        extraction = self.extractor(pictures.flatten(0, 1))
        vectors = self.describe(extraction).unflatten(0, pictures.shape[:2])
        kept = {"row": batch["row"], "vectors": vectors}
        if dataloader_idx:
            self._others.append(kept)
            return
        label = batch["masks"].flatten(0, 1).float() / 255
        found = mask_metrics(extraction.saliency(label.shape[-1]), label)
        # Of the street views only, as masks of photos are easy.
        kept |= {key: value.unflatten(0, pictures.shape[:2])[:, 1:].mean(dim=1) for key, value in found.items()}
        kept["loss"] = self.validation_loss(extraction, label).expand(len(pictures))  # their mean is the batch's
        self._held_out.append(kept)

    def on_validation_epoch_end(self) -> None:
        held_out = _gather_batches(self._held_out)
        vectors = held_out.pop("vectors")
        clean, street = vectors[:, 0], vectors[:, 1:]
        gallery = torch.cat([clean, *([_gather_batches(self._others)["vectors"][:, 0]] if self._others else [])])
        own = torch.arange(len(clean), device=clean.device).repeat_interleave(street.shape[1])
        values = {"mAP@7": reciprocal_rank(street.flatten(0, 1), gallery, own)} | held_out
        for key, value in values.items():  # the same in all processes
            self.log(f"val/{key}", value.mean(), prog_bar=key == "mAP@7", sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        # Adam's first steps move thousands of weights per output in the same direction; without warm-up they can push the
        # logits of a mask so far below 0 (most cells are background) that the sigmoid no longer has a gradient.
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (self.warmup + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _gather_batches(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the batches of all processes: each row once, sorted by `row`, which is dropped."""
    joined = {key: gather_rows(torch.cat([part[key] for part in parts])) for key in parts[0]}
    rows = joined.pop("row").tolist()
    first = {row: place for place, row in reversed(list(enumerate(rows)))}
    chosen = [first[row] for row in sorted(first)]
    return {key: value[chosen] for key, value in joined.items()}


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, or of a folder written by `beauty-bafe export`, on the CPU. Executes no code in the file.

    Tensors of a checkpoint are memory-mapped; an exported folder has no optimiser state.
    Raises ValueError if it is not a checkpoint of this project.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"checkpoint '{checkpoint}' does not exist; train.py writes RUN/checkpoints/best.ckpt")
    try:
        exported = path.is_dir()
        content = read_network(path) if exported else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        dict(content["hyper_parameters"]["model"])
        content["state_dict"].items()
    except Exception as error:
        raise ValueError(
            f"'{checkpoint}' is not a checkpoint of this project ({type(error).__name__}: {str(error)[:200]}); "
            "give a best.ckpt or last.ckpt that train.py wrote or a folder that beauty-bafe export wrote, "
            "or use model.weights=FILE for a bare state dict"
        ) from error
    return content


def load_extractor(checkpoint: str | Path) -> BackgroundAgnosticExtractor:
    """The extractor of a checkpoint, on the CPU in evaluation mode. Needs neither conf nor hub, executes no code in the file.

    Raises ValueError if the file is not a checkpoint of this project.
    """
    content = read_checkpoint(checkpoint)
    model = {**content["hyper_parameters"]["model"], "pretrained": False, "weights": None}
    named = content["state_dict"].items()  # may hold more than the network
    state = {key.removeprefix(PREFIX): value for key, value in named if key.startswith(PREFIX)}
    extractor = BackgroundAgnosticExtractor(**model)
    try:
        extractor.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"'{checkpoint}' names model {model['name']} but its weights are of another network: {error}"
        ) from error
    return extractor.eval()
