"""How a picture is looked at before it is described: at several sizes, mirrored, without its background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(pictures: Tensor, side: int) -> Tensor:
    """uint8 (B, 3, S, S) -> uint8 (B, 3, side, side), smoothed before shrinking."""
    if pictures.shape[-1] == side:
        return pictures
    resized = F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    return (resized + 0.5).clamp(0, 255).to(torch.uint8)


def whiten(pictures: Tensor, saliency: Tensor, pad: int, threshold: float | None) -> Tensor:
    """Lay the product on the catalogue's backdrop: w x + (1 - w) `pad` (Yu et al., ACM MM 2020, for queries).

    `pictures`: uint8 (B, 3, S, S). `saliency`: float (B, 1, S, S), 0..1, the w; with `threshold` 1 above it and 0 below.

    >>> picture, mask = torch.full((1, 3, 1, 2), 55, dtype=torch.uint8), torch.tensor([[[[1.0, 0.4]]]])
    >>> whiten(picture, mask, 255, None)[0, 0].tolist(), whiten(picture, mask, 255, 0.5)[0, 0].tolist()
    ([[55, 175]], [[55, 255]])
    """
    weight = saliency if threshold is None else (saliency > threshold).to(saliency.dtype)
    return (pictures.float() * weight + pad * (1 - weight) + 0.5).clamp(0, 255).to(torch.uint8)
