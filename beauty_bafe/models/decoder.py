"""One sharp mask from all taps: coarse meaning carried down to fine detail."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .together import SharedBatchNorm2d


class TopDownDecoder(nn.Module):
    """Taps to logits at the shallowest tap's size, as a feature pyramid does (Lin et al., CVPR 2017).

    From deep to shallow: the tap by Conv1x1 to `width`, plus the deeper sum enlarged, through a depthwise 3x3 and a 1x1
    convolution, batch norm, ReLU. Every level has logits of its own, which training may look at as well.
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
