"""The background-agnostic feature extractor: saliency masks and feature maps of a picture. Knows no trainer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import Backbone
from .decoder import TopDownDecoder
from .pooling import EPSILON, spoc


class Extraction(NamedTuple):
    """What the network says of B pictures.

    `masks`: one float32 (B, 1, H_l, W_l) per tap, 0..1, shallow to deep; fewer, the deepest ones, from an extractor whose
    `shallowest` is above 0. `taps`: the maps they were read from (gated).
    `last`: float (B, C, H, W), the map that descriptors pool. `pictures`: (B, 3, S, S), what was looked at.
    `logits`: where a decoder drew one mask from all taps, its logits, float32 (B, 1, H_l, W_l), shallow to deep; `masks` are
    then the finest one at each tap's size.
    """

    masks: list[Tensor]
    taps: list[Tensor]
    last: Tensor
    pictures: Tensor
    logits: list[Tensor] | None = None

    def saliency(self, size: int | Sequence[int]) -> Tensor:
        """The mask at the given size (pixels): float32 (B, 1, H, W), 0..1; the decoder's finest, or the taps' as one.

        Their logits are added, as evidence from independent witnesses is; measured in benchmarks/dev.md against their mean.
        """
        if self.logits is not None:
            return resize_mask(self.logits[0], size).sigmoid()  # in this order edges stay sharp
        logits = [resize_mask(mask, size).clamp(EPSILON, 1 - EPSILON).logit() for mask in self.masks]
        return torch.stack(logits).sum(dim=0).sigmoid()


def resize_mask(mask: Tensor, size: int | Sequence[int]) -> Tensor:
    """Float (B, 1, H, W) to another size: the mean of the cells when shrinking, bilinear when enlarging."""
    height, width = (size, size) if isinstance(size, int) else size
    if mask.shape[-2] > height:
        return F.adaptive_avg_pool2d(mask, (height, width))
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)


def check_pictures(pictures: Tensor) -> None:
    """Raise ValueError where pictures are not uint8 (B, 3, S, S): floats could be 0..1, which it takes for black."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be uint8 (B, 3, S, S), got {pictures.dtype} {tuple(pictures.shape)}")


class MaskEncoder(nn.Sequential):
    """Conv3x3 (C to hidden), ReLU, Conv1x1 (hidden to 1): the logits of one tap's mask (BAFE)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(hidden, 1, 1))


class ChannelGate(nn.Sequential):
    """A deeper tap's pooled vector -> weights in 0..1 for a shallower tap's channels: `layers` Conv1x1, then sigmoid (BAFE)."""

    def __init__(self, deep: int, shallow: int, layers: int) -> None:
        widths = [deep] + [shallow] * layers
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Conv2d(before, after, 1), nn.ReLU(inplace=True)]
        super().__init__(*steps[:-1], nn.Sigmoid())


class BackgroundAgnosticExtractor(nn.Module):
    """A backbone whose taps are read for saliency masks, and its last map.

    `decoder`: "taps" for BAFE's (2019) mask encoder per tap, attention pooling and channel gates from deep to shallow, or
    "topdown" for one sharp mask from all taps (decoder.py); `hidden`: its channels. `frozen`: the backbone does not learn.
    `name`, `taps`, `last`, `pretrained`, `weights` and `options` go to `Backbone`; `size` is the input's side in pixels,
    `pad` the canvas value around oblong pictures; `mean` and `std` (0..1 scale) default to the backbone's own.
    All arguments are plain values, so that a checkpoint rebuilds the network alone. Raises ValueError for another decoder.
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
        decoder: str = "taps",
    ) -> None:
        super().__init__()
        if decoder not in ("taps", "topdown"):
            raise ValueError(f"model.decoder={decoder}: type taps (BAFE's, a mask a tap) or topdown (one from all)")
        self.size, self.pad, self.frozen = size, pad, frozen
        self.shallowest = 0  # the first tap that gets a mask; who needs only the deepest ones saves the others' time
        self.backbone = Backbone(name, taps, last, size, pretrained, weights, options)
        self.register_buffer("mean", torch.tensor(mean or self.backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std or self.backbone.std).view(1, 3, 1, 1))
        channels = self.backbone.channels
        self.decoder = TopDownDecoder(channels, hidden) if decoder == "topdown" else None
        if self.decoder is None:
            self.encoders = nn.ModuleList(MaskEncoder(width, hidden) for width in channels)
            pairs = itertools.pairwise(channels)
            self.gates = nn.ModuleList(ChannelGate(deep, shallow, gate_layers) for shallow, deep in pairs)
        if frozen:
            self.backbone.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 1.6 times faster on CPUs, needed for tensor cores on GPUs
        self.train()

    def train(self, mode: bool = True) -> BackgroundAgnosticExtractor:
        """As nn.Module.train, but the backbone keeps its batch statistics: half of a batch is white catalogue photos."""
        super().train(mode)
        self.backbone.eval()
        return self

    def normalise(self, pictures: Tensor) -> Tensor:
        """(B, 3, S, S), 0..255 -> float (B, 3, S, S) as the backbone takes it."""
        return ((pictures.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Extraction:
        """uint8 (B, 3, S, S), RGB, letterboxed -> Extraction. Raises ValueError for others."""
        check_pictures(pictures)
        return self.look(pictures)

    def look(self, pictures: Tensor) -> Extraction:
        """(B, 3, S, S), uint8, or float of 0..255 as views.py makes them -> Extraction."""
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
