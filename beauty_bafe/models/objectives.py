"""What training minimises, and what it reports of masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .extractor import resize_mask


def saliency_loss(masks: Sequence[Tensor], label: Tensor) -> Tensor:
    """Sum over the taps of the mean square error between mask and label, the label resized to each tap (BAFE, 2019).

    `masks`: float (B, 1, H_l, W_l) in 0..1. `label`: float (B, 1, H, W) in 0..1. Gives a scalar.
    """
    return sum((F.mse_loss(mask, resize_mask(label, mask.shape[-2:])) for mask in masks), label.new_zeros(()))


def mask_metrics(mask: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Per picture, float (B,): `mae`, mean |mask - label|; `f_beta` with beta^2 = 0.3 and `iou`, both of the mask cut at 0.5.

    `mask` and `label`: float (B, 1, H, W) in 0..1, the label cut at 0.5 as well. Two empty masks agree: 1.
    F-beta as in Achanta et al. (CVPR 2009): (1 + b) precision recall / (b precision + recall).
    """
    predicted, true = mask > 0.5, label > 0.5
    both = (predicted & true).sum(dim=(1, 2, 3)).float()
    found, wanted = predicted.sum(dim=(1, 2, 3)).float(), true.sum(dim=(1, 2, 3)).float()
    either = found + wanted - both
    return {
        "mae": (mask - label).abs().mean(dim=(1, 2, 3)),
        # With precision = both / found and recall = both / wanted the fraction simplifies to this.
        "f_beta": (1.3 * both / (0.3 * wanted + found).clamp(min=1e-9)).where(either > 0, 1.0),
        "iou": (both / either.clamp(min=1)).where(either > 0, 1.0),
    }
