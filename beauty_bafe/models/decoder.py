"""Decoders: one saliency mask from all taps of a backbone.

A decoder is a module of this file, made from the taps' channels, shallow to deep, and the settings of a file in conf/decoder.
It takes the taps, float (B, C_l, H_l, W_l), and returns logits, float32 (B, 1, H, W) each, of which the first are the mask;
the others are auxiliary outputs for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import SharedBatchNorm2d


class TopDownDecoder(nn.Module):
    """A feature pyramid (Lin et al., CVPR 2017) with logits at every level.

    From deep to shallow: a 1x1 convolution of the tap to `width` channels, plus the upsampled output of the level below, then
    a depthwise 3x3 and a 1x1 convolution, batch norm and ReLU.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.Conv2d(width, width, 1, bias=False),
                SharedBatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for _ in channels
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Float (B, C_l, H_l, W_l), shallow to deep -> logits, float32 (B, 1, H_l, W_l), shallow to deep."""
        logits: list[Tensor] = []
        carried: Tensor | None = None
        for level in reversed(range(len(taps))):
            here = self.lateral[level](taps[level])
            if carried is not None:
                here = here + F.interpolate(carried, here.shape[-2:], mode="bilinear", align_corners=False)
            carried = self.smooth[level](here)
            logits.insert(0, self.heads[level](carried).float())
        return logits


def make_decoder(settings: Mapping[str, Any], channels: Sequence[int]) -> nn.Module:
    """The decoder that `_target_` names, with the other settings, for taps of these `channels`, shallow to deep.

    Raises ValueError for anything but a module of this file: a checkpoint must not choose which code to run.
    """
    known = {f"{__name__}.{name}": kind for name, kind in globals().items() if getattr(kind, "__module__", "") == __name__}
    modules = {name: kind for name, kind in known.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    values = dict(settings)
    target = values.pop("_target_", None)
    if target not in modules:
        raise ValueError(f"objective.decoder._target_={target}: type {' or '.join(modules)}")
    return modules[target](channels, **values)
