"""Views of a picture that are described: cropped to the product, resized, without its background.

Results stay float, 0 to 255: rounding to bytes would turn differences in the last digit between processors, or between
onnxruntime and PyTorch, into differences of 1/255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptor import describe_partial
from .extractor import resize_mask

VERSION = 5  # increase it when the same settings give other descriptors or masks
MAX_SHARE = 0.9  # of the picture; a mask that covers more is considered wrong
EDGE_STRIDE = 8  # pixels per cell of the grid on which the guided filter is fitted
REGULARISATION = 1e-4  # variance of colours in 0..1: edges with a contrast below 0.01 are ignored
STEEPNESS = 3.0  # where colours separate only in part, the result lies between 0 and 1


@dataclass(frozen=True)
class View:
    """How a query is cropped or changed once its mask is known (conf/query).

    `closer`: side of a square crop around the product, as a multiple of the product's longer side; a second forward pass on
    it gives a finer mask and the descriptor. `edges`: radius of the `guided_filter` that aligns the mask with colour edges,
    as a share of the picture or crop, 0..1; 0: no filter. `change(pictures, saliency, pad)` returns other pictures to
    describe: (B, 3, S, S), 0..255, and float (B, 1, S, S), 0..1, to float (B, 3, S, S). `whole`: weight of the unchanged
    picture in the descriptor, 0..1. `detail`: S as a multiple of the network's size, so that crops stay sharp. `least`: share
    of the picture; a mask that covers less, or nearly everything, is considered wrong, and the picture is left unchanged; 0
    accepts every mask. Raises ValueError for values outside these ranges.
    """

    closer: float | None = None
    edges: float = 0.0
    change: Callable[[Tensor, Tensor, int], Tensor] | None = None
    whole: float = 0.0
    detail: float = 1.0
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.closer is None and self.change is None:
            raise ValueError("query.view has neither closer nor change; type query=whole for the unchanged picture")
        if self.closer is not None and self.closer < 1:
            raise ValueError(f"query.view.closer={self.closer}: type a multiple of the product's side, 1 or more, or null")
        if not 0 <= self.edges <= 1:
            raise ValueError(f"query.view.edges={self.edges}: type a share from 0 (no filter) to 1")
        if not 0 <= self.whole < 1:
            raise ValueError(
                f"query.view.whole={self.whole}: type a share from 0 to below 1, or query=whole for the unchanged picture only"
            )
        if self.detail < 1:
            raise ValueError(f"query.view.detail={self.detail}: type a multiple of the network's size, 1 or more")

    def __str__(self) -> str:
        """All settings that its descriptors depend on."""
        change = None if self.change is None else describe_partial(self.change)
        seen = f"closer {self.closer}, edges {self.edges}, {change} at {self.detail}, {self.whole} whole, least {self.least}"
        return f"{seen}, version {VERSION}"

    def trusts(self, saliency: Tensor) -> Tensor:
        """Which masks, float (B, 1, S, S), are plausible: bool (B, 1, 1, 1)."""
        share = (saliency > 0.5).float().mean(dim=(1, 2, 3), keepdim=True)
        plausible = (share > self.least) & (share < MAX_SHARE)
        return plausible if self.least > 0 else torch.ones_like(plausible)


def resize(pictures: Tensor, side: int) -> Tensor:
    """(B, 3, S, S), uint8 or float -> float (B, 3, side, side), antialiased when shrinking; unchanged if S is `side`."""
    if pictures.shape[-1] == side:
        return pictures
    # To half the size, plain bilinear interpolation is the mean of 2 x 2 pixels, four times as fast as antialiasing.
    antialias = pictures.shape[-1] != 2 * side
    return F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=antialias, align_corners=False)


def guided_filter(saliency: Tensor, pictures: Tensor, radius: float) -> Tensor:
    """Align the mask with the picture's colour edges by a guided filter (He et al., TPAMI 2013), with increased contrast.

    In a window of `radius` (share of the side) around each cell of a coarser grid (He and Sun, 2015) the mask is fitted as a
    linear function of the colour; at each pixel the mean of the fits that cover it is evaluated for its colour.
    `saliency`: float (B, 1, M, M), 0..1. `pictures`: (B, 3, S, S), uint8 or float, 0..255, resized to M. Returns float
    (B, 1, M, M), 0..1.
    """
    # Centred on 0, where float32 is most precise: below are small differences of means of squares.
    colour, cells = resize(pictures, saliency.shape[-1]) / 255 - 0.5, max(1, int(pictures.shape[-1]) // EDGE_STRIDE)
    at = torch.arange(cells, device=pictures.device)
    near = ((at[:, None] - at).abs() <= round(radius * cells)).to(colour.dtype)
    near = near / near.sum(dim=1, keepdim=True)

    def mean(*values: Tensor) -> Tensor:
        return near @ torch.cat(values, dim=1) @ near.T  # fifty times as fast as avg_pool2d

    guide, mask = F.adaptive_avg_pool2d(colour, cells), resize_mask(saliency, cells) - 0.5
    products = [guide[:, channel:] * guide[:, channel : channel + 1] for channel in range(3)]
    middle, level, *squares, common = mean(guide, mask, *products, guide * mask).split([3, 1, 3, 2, 1, 3], dim=1)
    covariance = [part - middle[:, channel:] * middle[:, channel : channel + 1] for channel, part in enumerate(squares)]
    slope = _solve(covariance, common - middle * level)
    offset = level - (slope * middle).sum(dim=1, keepdim=True)
    fit = F.interpolate(mean(slope, offset), saliency.shape[-2:], mode="bilinear", align_corners=False)
    fitted = (fit[:, :3] * colour).sum(dim=1, keepdim=True) + fit[:, 3:]
    return (STEEPNESS * fitted + 0.5).clamp(0, 1)


def _solve(covariance: list[Tensor], wanted: Tensor) -> Tensor:
    """Solve (C + REGULARISATION I) x = `wanted`, (B, 3, H, W), at each cell; `covariance`: C's rows from the diagonal on.

    By LDL elimination: C is nearly singular for grey pictures, and inverting it by cross products is off by some percent.
    """
    (xx, xy, xz), (yy, yz), (zz,) = (row.split(1, dim=1) for row in covariance)
    x, y, z = wanted.split(1, dim=1)
    xx, yy, zz = xx + REGULARISATION, yy + REGULARISATION, zz + REGULARISATION
    yx, zx = xy / xx, xz / xx
    yy, yz, y = yy - yx * xy, yz - yx * xz, y - yx * x
    zy = yz / yy
    z = (z - zx * x - zy * y) / (zz - zx * xz - zy * yz)
    y = y / yy - zy * z
    return torch.cat([x / xx - yx * y - zx * z, y, z], dim=1)


def whiten(pictures: Tensor, saliency: Tensor, pad: int, threshold: float | None) -> Tensor:
    """Replace the background by the catalogue's backdrop: w x + (1 - w) `pad` (Yu et al., ACM MM 2020, for queries).

    `pictures`: (B, 3, S, S), 0..255. `saliency`: float (B, 1, S, S), 0..1, w; with a `threshold`, 1 above it, else 0.

    >>> picture, mask = torch.full((1, 3, 1, 2), 55, dtype=torch.uint8), torch.tensor([[[[1.0, 0.4]]]])
    >>> whiten(picture, mask, 255, None)[0, 0].tolist(), whiten(picture, mask, 255, 0.5)[0, 0].tolist()
    ([[55.0, 175.0]], [[55.0, 255.0]])
    """
    weight = saliency if threshold is None else (saliency > threshold).to(saliency.dtype)
    return pictures * weight + pad * (1 - weight)


def cut_out(pictures: Tensor, saliency: Tensor, pad: int, fill: float) -> Tensor:
    """`whiten`, then move and scale the product so that its longer side fills `fill` of the canvas, as in catalogue photos."""
    return sample_window(whiten(pictures, saliency, pad, None), product_window(saliency, 1 / fill), pad)


def product_window(saliency: Tensor, margin: float) -> Tensor:
    """The square of `margin` times the product's longer side around its centre: float (B, 3), x and y of the centre, -1 to 1,
    and the side as a share of the canvas; `margin` times the canvas for an empty mask.

    >>> mask = torch.zeros(1, 1, 8, 8)
    >>> mask[..., 2:6, 0:2] = 1
    >>> product_window(mask, 1.5).tolist()
    [[-0.75, 0.0, 0.75]]
    """
    height, width = saliency.shape[-2:]
    rows, columns = saliency[:, 0].amax(dim=2), saliency[:, 0].amax(dim=1)
    top, left = _first(rows), _first(columns)
    bottom, right = height - _first(rows.flip(1)), width - _first(columns.flip(1))
    side = torch.maximum((bottom - top) / height, (right - left) / width) * margin
    return torch.cat([(left + right) / width - 1, (top + bottom) / height - 1, side], dim=1)


def _first(values: Tensor) -> Tensor:
    """Where rows of values, float (B, S), first exceed one half, in cells from their start: float (B, 1); 0 if they never do.

    Interpolated linearly between cell centres. With whole cells, the last digit of a value, in which onnxruntime and PyTorch
    differ, would move the window, and change the mask computed in it by up to a third.

    >>> _first(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 0.75, 1.0], [0.0, 0.5, 0.5, 0.0]]))[:, 0].tolist()
    [2.0, 2.0, 0.0]
    """
    inside = values > 0.5
    at = inside.float().argmax(dim=1, keepdim=True)
    above, below = values.gather(1, at), F.pad(values, (1, 0)).gather(1, at)
    return torch.where(inside.any(dim=1, keepdim=True), at - 0.5 + (0.5 - below) / (above - below), 0)


def clamp_window(window: Tensor) -> Tensor:
    """Move the window, and shrink it if necessary, so that it lies inside the canvas."""
    side = window[:, 2:].clamp(max=1)
    return torch.cat([torch.minimum(torch.maximum(window[:, :2], side - 1), 1 - side), side], dim=1)


def inverse_window(window: Tensor) -> Tensor:
    """The window whose `sample_window` undoes that of `window`."""
    middle, side = window[:, :2], window[:, 2:]
    return torch.cat([-middle, torch.ones_like(side)], dim=1) / side


def sample_window(pictures: Tensor, window: Tensor, outside: float | None, side: int | None = None) -> Tensor:
    """Resample a window (see `product_window`): (B, C, S, S) -> float (B, C, side, side); None: S.

    `outside`: the value beyond the canvas; None: that of the nearest pixel, which is faster. Bilinear and not antialiased: if
    it shrinks, the finest texture can alias.
    """
    side = pictures.shape[-1] if side is None else side
    at = (torch.arange(side, device=window.device) * 2 + 1) / side - 1
    x, y = (window[:, number, None] + window[:, 2:] * at for number in range(2))
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=3)
    pictures = pictures.float()
    if outside is None:
        return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(pictures - outside, grid, padding_mode="zeros", align_corners=False) + outside
