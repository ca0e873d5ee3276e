"""The background-agnostic feature extractor: saliency masks and feature maps of pictures. Independent of the trainer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone
from .decoder import TopDownDecoder, make_decoder
from .pooling import EPSILON, spoc


class Extraction(NamedTuple):
    """The output of the network for B pictures.

    `masks`: float32 (B, 1, H_l, W_l) in 0..1, one per tap, shallow to deep; only the deepest ones if the extractor's
    `shallowest` is above 0. `taps`: the (gated) feature maps. `last`: float (B, C, H, W), the map that descriptors pool.
    `pictures`: (B, 3, S, S), the input. `logits`: those of the decoder, float32 (B, 1, H, W) each, if there is one;
    `masks` are then the first of them at the size of each tap.
    """

    masks: list[Tensor]
    taps: list[Tensor]
    last: Tensor
    pictures: Tensor
    logits: list[Tensor] | None = None

    def saliency(self, size: int | Sequence[int]) -> Tensor:
        """The mask at `size` (pixels): float32 (B, 1, H, W) in 0..1, from the decoder or from all taps combined.

        The logits of the taps are summed, which is better than their mean (benchmarks/dev.md).
        """
        if self.logits is not None:
            return resize_mask(self.logits[0], size).sigmoid()  # in this order edges stay sharp
        masks = [resize_mask(mask, size).clamp(EPSILON, 1 - EPSILON) for mask in self.masks]
        logits = [(mask / (1 - mask)).log() for mask in masks]
        return torch.stack(logits).sum(dim=0).sigmoid()


def resize_mask(mask: Tensor, size: int | Sequence[int]) -> Tensor:
    """Resize float (B, 1, H, W), by area averages when shrinking and bilinearly when enlarging."""
    height, width = (size, size) if isinstance(size, int) else size
    if mask.shape[-2] > height:
        return F.adaptive_avg_pool2d(mask, (height, width))
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)


def check_pictures(pictures: Tensor) -> None:
    """Raise ValueError unless pictures are uint8 (B, 3, S, S): floats could be in 0..1, and would be treated as black."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be uint8 (B, 3, S, S), got {pictures.dtype} {tuple(pictures.shape)}")


class MaskEncoder(nn.Sequential):
    """Conv3x3 (C to hidden), ReLU, Conv1x1 (hidden to 1): logits of the mask of one tap (BAFE)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1))


class ChannelGate(nn.Sequential):
    """The pooled vector of a deeper tap -> weights in 0..1 for the channels of a shallower one, by `layers` Conv1x1 (BAFE)."""

    def __init__(self, deep: int, shallow: int, layers: int) -> None:
        widths = [deep] + [shallow] * layers
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Conv2d(before, after, 1), nn.ReLU(inplace=True)]
        super().__init__(*steps[:-1], nn.Sigmoid())


class BackgroundAgnosticExtractor(nn.Module):
    """A backbone, and saliency masks predicted from its taps.

    `name`, `taps`, `last`, `pretrained`, `weights` and `options` go to `Backbone`. `size`: the side of the input in pixels;
    `pad`: the value around oblong pictures; `mean`, `std`: on the scale 0..1, None for the backbone's own. `frozen`: the
    backbone is not trained. `decoder`: None for BAFE's (2019) mask encoder of `hidden` channels per tap, with attention
    pooling and channel gates of `gate_layers` layers from deep to shallow; or the `_target_` and settings of a decoder that
    makes one mask from all taps (decoder.py).

    All arguments are plain values, so that a checkpoint suffices to rebuild it. Raises ValueError for an unknown decoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        taps: Sequence[str],
        last: str,
        size: int,
        pad: int = 255,
        hidden: int = 512,
        gate_layers: int = 1,
        frozen: bool = True,
        pretrained: bool = True,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        options: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__()
        self.size, self.pad, self.frozen = size, pad, frozen
        self.shallowest = 0  # the first tap that gets a mask; raise it to save time if only the deepest masks are needed
        self.backbone = Backbone(name, taps, last, size, pretrained, weights, options)
        self.register_buffer("mean", torch.tensor(mean or self.backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std or self.backbone.std).view(1, 3, 1, 1))
        channels = self.backbone.channels
        if isinstance(decoder, str):  # checkpoints of earlier versions store taps or topdown
            settings = {"_target_": f"{TopDownDecoder.__module__}.TopDownDecoder", "width": hidden}
            decoder = {"taps": None, "topdown": settings}.get(decoder, {"_target_": decoder})
        self.decoder = None if decoder is None else make_decoder(decoder, channels)
        if self.decoder is None:
            self.encoders = nn.ModuleList(MaskEncoder(width, hidden) for width in channels)
            pairs = itertools.pairwise(channels)
            self.gates = nn.ModuleList(ChannelGate(deep, shallow, gate_layers) for shallow, deep in pairs)
        if frozen:
            self.backbone.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 1.6 times faster on CPUs, needed for tensor cores on GPUs
        self.train()

    def train(self, mode: bool = True) -> BackgroundAgnosticExtractor:
        """Like nn.Module.train, but the backbone keeps its batch statistics, as half of a batch is photos on white."""
        super().train(mode)
        self.backbone.eval()
        return self

    def normalise(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S), 0..255 -> float (B, 3, S, S), the input of the backbone."""
        return ((pictures.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Extraction:
        """uint8 (B, 3, S, S), RGB, letterboxed -> Extraction. Raises ValueError for other inputs."""
        check_pictures(pictures)
        return self.extract(pictures)

    def extract(self, pictures: Tensor) -> Extraction:
        """Like `forward`, but without checks: (B, 3, S, S), uint8 or float in 0..255 (see views.py) -> Extraction."""
        inputs = self.normalise(pictures)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.backbone(inputs)
        taps = list(maps.taps)
        if self.decoder is not None:
            if self.shallowest == len(taps):
                return Extraction([], taps, maps.last, pictures)
            logits = self.decoder(taps)
            fine = logits[0].sigmoid()
            return Extraction([resize_mask(fine, tap.shape[-2:]) for tap in taps], taps, maps.last, pictures, logits)
        masks: list[Tensor] = []
        for level in reversed(range(self.shallowest, len(taps))):
            if level + 1 < len(taps):
                vector = spoc(taps[level + 1], masks[0].to(taps[level + 1].dtype))
                taps[level] = taps[level] * self.gates[level](vector[..., None, None])
            masks.insert(0, self.encoders[level](taps[level]).float().sigmoid())
        return Extraction(masks, taps, maps.last, pictures)
