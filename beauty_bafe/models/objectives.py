"""Loss functions, and the metrics of validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .extractor import resize_mask


def saliency_loss(masks: Sequence[Tensor], label: Tensor) -> Tensor:
    """Sum over the taps of the mean squared error between the mask and the label at its size (BAFE, 2019).

    `masks`: float (B, 1, H_l, W_l) in 0..1. `label`: float (B, 1, H, W) in 0..1. Returns a scalar.
    """
    return sum((F.mse_loss(mask, resize_mask(label, mask.shape[-2:])) for mask in masks), label.new_zeros(()))


def overlap_loss(logits: Sequence[Tensor], label: Tensor) -> Tensor:
    """Cross entropy + Dice (Milletari et al., 3DV 2016) of the first logits at the label's size, and a quarter of the others.

    `logits`: float32 (B, 1, H_l, W_l), those of the mask first. `label`: float (B, 1, H, W) in 0..1. Returns a scalar.
    """
    total = label.new_zeros(())
    for level, logit in enumerate(logits):
        if level == 0:  # an edge may run through a cell
            logit = resize_mask(logit, label.shape[-2:])
        wanted, mask = resize_mask(label, logit.shape[-2:]), logit.sigmoid()
        both = (mask * wanted).sum(dim=(1, 2, 3))
        dice = 1 - (2 * both + 1) / (mask.sum(dim=(1, 2, 3)) + wanted.sum(dim=(1, 2, 3)) + 1)
        loss = F.binary_cross_entropy_with_logits(logit, wanted) + dice.mean()
        total = total + (loss if level == 0 else loss / 4)
    return total


def contrast_loss(street: Tensor, clean: Tensor, temperature: float) -> Tensor:
    """InfoNCE (Oord et al., 2018) in both directions between float (B, D) of length 1; row i of each is product i. A scalar."""
    own = torch.arange(len(street), device=street.device)
    with torch.autocast(street.device.type, enabled=False):  # bfloat16 rounding, divided by 0.05, would change logits by 0.04
        scores = street.float() @ clean.float().T / temperature
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def distillation_loss(maps: Tensor, known: Tensor) -> Tensor:
    """Mean cosine distance between the cells of two feature maps, float (B, C, H, W) each. A scalar."""
    return (1 - F.cosine_similarity(maps.float(), known.float(), dim=1)).mean()


def reciprocal_rank(queries: Tensor, gallery: Tensor, own: Tensor, k: int = 7) -> Tensor:
    """AP@k of queries with a single match, row own[i] of the gallery: 1 / rank, or 0 for ranks beyond k; float (N,).

    `queries`: float (N, D), `gallery`: (M, D), both of length 1. `own`: int64 (N,). Ties count against the query.

    >>> reciprocal_rank(torch.eye(2), torch.tensor([[0.0, 1], [0.6, 0.8], [0.8, 0.6]]), torch.tensor([0, 1])).tolist()
    [0.3333333432674408, 0.5]
    """
    scores = queries @ gallery.T
    rank = (scores >= scores.gather(1, own[:, None])).sum(dim=1).float()
    return (1 / rank).where(rank <= k, 0.0)


def mask_metrics(mask: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Per picture, float (B,): `mae`, mean |mask - label|; `f_beta` with beta^2 = 0.3 and `iou`, both thresholded at 0.5.

    `mask` and `label`: float (B, 1, H, W) in 0..1. Two empty masks have `f_beta` and `iou` 1.
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
