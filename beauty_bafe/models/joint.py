"""Joint training of backbone, mask and descriptor, on pairs of a catalogue photo and a street view of the same product."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone
from .distributed import gather_rows
from .extractor import Extraction, resize_mask
from .module import SaliencyModule
from .objectives import contrast_loss, distillation_loss, overlap_loss
from .pooling import gem

log = logging.getLogger("beauty_bafe")


class JointModule(SaliencyModule):
    """Trains the mask with the overlap loss and the descriptor with InfoNCE between catalogue photo and street view.

    `model`: see SaliencyModule; its `frozen` is ignored. `decoder`: see BackgroundAgnosticExtractor. `lr`: learning rate of
    the decoder; `backbone_lr`: of the backbone; both rise over `warmup` steps, but at most a tenth of all steps, then
    follow a cosine to 0. A `backbone_lr` of 0 freezes the backbone, so that only the decoder learns; `contrast` must then be 0.
    `freeze`: number of the shallowest taps that, with all layers before them, keep their pretrained weights.

    `contrast`: weight of InfoNCE at `temperature` between the products of a batch; the descriptor is GeM of power `p` under
    the predicted mask. `distill`: weight of the distance of the street views' feature map from the pretrained network's.
    `average`: weight of the pretrained network, 0..1, in the final backbone (WiSE-FT, Wortsman et al., CVPR 2022): in the last
    `settle` of the epochs, 0..1 (never the first), the backbone is this average, frozen, while the decoder adapts to it.

    Raises ValueError for shares outside 0..1, `average` without `settle`, `contrast` with a frozen backbone, and `average` or
    `distill` without pretrained weights.
    """

    averaged: Tensor

    def __init__(
        self,
        model: Mapping[str, Any],
        lr: float,
        warmup: int,
        decoder: Mapping[str, Any],
        backbone_lr: float,
        contrast: float,
        temperature: float,
        p: float,
        distill: float,
        average: float,
        settle: float,
        freeze: int,
    ) -> None:
        for name, share in {"average": average, "settle": settle}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"objective.{name}={share}: type a share from 0 to 1")
        if average and not settle:
            raise ValueError(
                f"objective.average={average} with objective.settle=0: the decoder would not be trained on the averaged "
                "network; type objective.settle=0.2, or objective.average=0"
            )
        frozen = backbone_lr == 0
        if frozen and contrast != 0:
            raise ValueError(
                f"objective.backbone_lr=0 freezes the network, so objective.contrast={contrast} has nothing to train; "
                "type objective.contrast=0 as well, or objective=frozen for both"
            )
        if not frozen and (average or distill) and not (model.get("pretrained", True) or model.get("weights")):
            raise ValueError(
                f"objective.average={average} and objective.distill={distill} need the pretrained network, but "
                "model.pretrained=false starts from random weights; type model.pretrained=true, model.weights=FILE, or "
                "objective.average=0 objective.distill=0"
            )
        super().__init__({**model, "frozen": frozen, "decoder": decoder}, lr, warmup)
        extra = {"decoder": dict(decoder), "backbone_lr": backbone_lr, "contrast": contrast, "temperature": temperature, "p": p}
        extra |= {"distill": distill, "average": average, "settle": settle, "freeze": freeze}
        self.save_hyperparameters(extra)
        self.backbone_lr, self.contrast, self.temperature, self.p = backbone_lr, contrast, temperature, p
        self.distill, self.average, self.settle = distill, average, settle
        self.extractor.backbone.freeze_through(freeze)
        self.register_buffer("averaged", torch.tensor(False))
        # In a tuple, so that PyTorch neither saves nor trains it.
        self._pretrained: tuple[Backbone, ...] = (
            (copy.deepcopy(self.extractor.backbone),) if not frozen and (average or distill) else ()
        )

    def describe(self, extraction: Extraction) -> Tensor:
        # Without gradient, or the mask would grow over everything that discriminates products.
        weight = resize_mask(extraction.masks[-1].detach(), extraction.last.shape[-2:])
        return F.normalize(gem(extraction.last.float(), weight, self.p))

    def on_train_epoch_start(self) -> None:
        if self.extractor.frozen:
            return
        epochs = self.trainer.max_epochs or 0
        if self.average and epochs < 1:
            raise ValueError(
                f"objective.average={self.average} needs a number of epochs, but trainer.max_epochs={self.trainer.max_epochs}; "
                "type trainer.max_epochs=N, or objective.average=0"
            )
        begin = max(1, epochs - max(1, round(self.settle * epochs)))  # a single epoch trains the backbone
        if self.average and not self.averaged and self.current_epoch >= begin:
            average_weights(self.extractor.backbone, self._pretrained[0], self.average)
            self.averaged.fill_(True)
        if self.averaged and self.current_epoch < begin:
            log.info("the backbone of this run has been averaged already; more epochs train only the decoder")
        if self.averaged:  # also if resumed from a checkpoint of the averaged network
            self.extractor.frozen = True
            self.extractor.backbone.requires_grad_(False)
            self._pretrained = ()
            for name in ("mask", "contrast", "distill"):  # or Lightning would keep showing the last values
                self.trainer.callback_metrics.pop(f"train/{name}", None)

    def training_loss(self, extraction: Extraction, label: Tensor) -> Tensor:
        mask = self.validation_loss(extraction, label)
        if self.extractor.frozen:
            return mask
        clean, street = self.describe(extraction).unflatten(0, (-1, 2)).unbind(1)
        # Of this step only: descriptors kept from earlier batches are outdated and lower the accuracy (benchmarks/accuracy.md).
        contrast = contrast_loss(gather_rows(street), gather_rows(clean), self.temperature)
        for name, value in {"mask": mask, "contrast": contrast}.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(clean))
        loss = mask + self.contrast * contrast
        if self.distill:
            with torch.no_grad():
                known = self._teacher()(self.extractor.normalise(extraction.pictures[1::2])).last
            kept = distillation_loss(extraction.last[1::2], known)
            self.log("train/distill", kept, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(clean))
            loss = loss + self.distill * kept
        return loss

    def _teacher(self) -> Backbone:
        return self._pretrained[0].to(self.device).eval()

    def validation_loss(self, extraction: Extraction, label: Tensor) -> Tensor:
        assert extraction.logits is not None
        return overlap_loss(extraction.logits, label)

    def configure_optimizers(self) -> Any:
        decoder = self.extractor.decoder
        assert decoder is not None
        groups = [{"params": list(decoder.parameters()), "lr": self.lr}]
        if not self.extractor.frozen:
            learning = [weight for weight in self.extractor.backbone.parameters() if weight.requires_grad]
            groups.append({"params": learning, "lr": self.backbone_lr})
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
        trainer = self.trainer

        def factor(step: int) -> float:
            # Computed at every step: trainer.estimated_stepping_batches would create the loader now, before a resumed run
            # knows its epoch, and thus with the order of the first epoch.
            steps = (trainer.max_epochs or 0) * trainer.num_training_batches / trainer.accumulate_grad_batches
            done = min(1.0, step / steps) if steps > 0 else 0.0
            rise = min(self.warmup, steps / 10) if steps > 0 else self.warmup  # small catalogues make few steps
            return min(1.0, (step + 1) / (rise + 1)) * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def average_weights(network: nn.Module, other: nn.Module, share: float) -> None:
    """Set every parameter and buffer of `network` to (1 - share) x its own value + share x that of `other`."""
    theirs = other.state_dict()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name].to(value.device), share)
