"""How a picture is looked at before it is described: at several sizes, mirrored, without its background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptor import describe_partial


@dataclass(frozen=True)
class View:
    """How a query is looked at once its mask is known (conf/query).

    `change(pictures, saliency, pad)` makes the picture that is described: uint8 (B, 3, S, S) and float (B, 1, S, S), 0..1, to
    uint8 (B, 3, S, S). `whole`: share of the picture as it came in the descriptor, 0..1. `detail`: how many times the network's
    size S is, so that what is enlarged stays sharp.
    """

    change: Callable[[Tensor, Tensor, int], Tensor]
    whole: float = 0.0
    detail: float = 1.0

    def __str__(self) -> str:
        """What tells its descriptors from another view's."""
        return f"{describe_partial(self.change)} at {self.detail}, {self.whole} whole"


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


def cut_out(pictures: Tensor, saliency: Tensor, pad: int, fill: float, least: float) -> Tensor:
    """`whiten`, then move and scale the product so that its longer side fills `fill` of the canvas, as in catalogue photos.

    Pictures whose mask covers less than `least` of them, or nearly everything, stay as they are: such a mask is wrong.
    """
    size = pictures.shape[-1]
    inside = saliency[:, 0] > 0.5
    share = inside.float().mean(dim=(1, 2))
    # First and last row (column) that the product touches; of none, the whole canvas.
    rows, columns = inside.any(dim=2).float(), inside.any(dim=1).float()
    top, left = (edge.argmax(dim=1).float() for edge in (rows, columns))
    bottom, right = (size - edge.flip(1).argmax(dim=1).float() for edge in (rows, columns))
    zoom = torch.maximum(bottom - top, right - left) / (fill * size)
    theta = pictures.new_zeros(len(pictures), 2, 3, dtype=torch.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, 0, 2], theta[:, 1, 2] = (left + right) / size - 1, (top + bottom) / size - 1
    white = whiten(pictures, saliency, pad, None)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(white.float() - pad, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + pad
    trusted = ((share > least) & (share < 0.9))[:, None, None, None]
    return torch.where(trusted, (moved + 0.5).clamp(0, 255).to(torch.uint8), pictures)
