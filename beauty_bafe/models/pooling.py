"""Pooling functions: from a feature map to one vector, optionally weighted by a saliency mask.

Every function takes `maps`, float (B, C, H, W), and `weight`, float (B, 1, H, W) in 0..1 or None, and returns
float (B, C), `scda` (B, 2C). Each row depends only on its own picture. In the formulas x is a channel of a picture's map,
w the weight, and A the activation, the sum of w x over channels. The result is not normalised unless the formula says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # keeps results finite for empty masks and dead channels


def spoc(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Average pooling (SPoC, Babenko & Lempitsky, ICCV 2015); with a weight, BAFE's attention pooling.

    sum(w x) / sum(w) over space. An empty mask gives the zero vector, not NaN.

    >>> import torch
    >>> maps, mask = torch.tensor([[[[1., 3.], [5., 7.]]]]), torch.tensor([[[[1., 1.], [0., 0.]]]])
    >>> spoc(maps).item(), round(spoc(maps, mask).item(), 4)
    (4.0, 2.0)
    """
    if weight is None:
        return maps.mean(dim=(2, 3))
    return (maps * weight).sum(dim=(2, 3)) / (weight.sum(dim=(2, 3)) + EPSILON)


def mac(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Largest value of each channel (MAC, Tolias et al., ICLR 2016); with a weight, of w x.

    >>> import torch
    >>> maps, mask = torch.tensor([[[[1., 3.], [5., 7.]]]]), torch.tensor([[[[1., 1.], [0., 0.]]]])
    >>> mac(maps).item(), mac(maps, mask).item()
    (7.0, 3.0)
    """
    return (maps if weight is None else maps * weight).amax(dim=(2, 3))


def gem(maps: Tensor, weight: Tensor | None = None, p: float = 3.0) -> Tensor:
    """Generalised mean (GeM, Radenovic et al., TPAMI 2019): (sum(w max(x, eps)^p) / sum(w))^(1/p); p = 1 is SPoC.

    >>> import torch
    >>> maps, mask = torch.tensor([[[[1., 3.], [5., 7.]]]]), torch.tensor([[[[1., 1.], [0., 0.]]]])
    >>> round(gem(maps, p=2.0).item(), 3), round(gem(maps, mask, p=2.0).item(), 3)  # sqrt(84 / 4), sqrt(10 / 2)
    (4.583, 2.236)
    """
    return spoc(maps.clamp(min=EPSILON) ** p, weight).clamp(min=EPSILON**p) ** (1 / p)


def rmac(maps: Tensor, weight: Tensor | None = None, levels: int = 3) -> Tensor:
    """Regional maxima (R-MAC, Tolias et al., ICLR 2016): the sum over square regions R of MAC_R / ||MAC_R||.

    With a weight, of w x, and each region is multiplied by the mean of w inside it, as normalisation would undo low weights.

    >>> maps = torch.tensor([[[[3., 0.], [0., 1.]], [[4., 0.], [0., 0.]]]])  # 2 x 2 has one region a level: itself, its cells
    >>> [round(value, 4) for value in rmac(maps, levels=1)[0].tolist()]  # (3, 4) / 5
    [0.6, 0.8]
    >>> [round(value, 4) for value in rmac(maps, levels=2)[0].tolist()]  # and (3, 4) / 5 and (1, 0) of its four cells
    [2.2, 1.6]
    """
    return _regional(maps, weight, None, levels)


def ramac(maps: Tensor, weight: Tensor | None = None, levels: int = 3, least: float = 0.0) -> Tensor:
    """R-MAC with attention (RA-MAC, Lin et al., ACM MM 2018): regions are weighted by their share of cells with A > mean(A).

    `least`: regions whose share is not above it are left out (1/3 in the authors' code), unless none would be left.

    >>> maps = torch.tensor([[[[3., 0.], [0., 1.]], [[4., 0.], [0., 0.]]]])  # A = 7, 0, 0, 1; its mean 2
    >>> [round(value, 4) for value in ramac(maps, levels=2)[0].tolist()]  # 1/4 (3, 4) / 5 of all, (3, 4) / 5 of the first cell
    [0.75, 1.0]
    """
    activation = _activation(maps, weight)
    return _regional(maps, weight, activation > activation.mean(dim=(2, 3), keepdim=True), levels, least)


def grmac(maps: Tensor, weight: Tensor | None = None, levels: int = 3, p: float = 3.5, least: float = 1 / 3) -> Tensor:
    """R-MAC with generalised attention (GRMAC, Yu et al., ACM MM 2019): RA-MAC above another threshold.

    Cells with A - min(A) > mean((A - min(A))^p)^(1/p) are attended to, fewer for larger p; p = 1 is RA-MAC.

    >>> maps = torch.tensor([[[[3., 0.], [0., 2.]], [[4., 0.], [0., 3.]]]])  # A = 7, 0, 0, 5; its mean for p = 3.5: 5.1
    >>> [round(value, 4) for value in grmac(maps, levels=2)[0].tolist()]  # of the first cell only: (3, 4) / 5
    [0.6, 0.8]
    """
    activation = _activation(maps, weight)
    above = activation - activation.amin(dim=(2, 3), keepdim=True)
    largest = above.amax(dim=(2, 3), keepdim=True) + EPSILON  # large powers of sums over channels would overflow
    threshold = (above / largest).pow(p).mean(dim=(2, 3), keepdim=True).pow(1 / p) * largest
    return _regional(maps, weight, above > threshold, levels, least)


def amac(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attention-based MAC (AMAC, Yu et al., ACM MM 2020): MAC over the cells with A >= mean(A); with a weight, of w x.

    >>> maps = torch.tensor([[[[1., 9.], [5., 0.]], [[9., 1.], [8., 0.]], [[1., 1.], [9., 1.]]]])  # A = 11, 11, 22, 1
    >>> mac(maps).tolist(), amac(maps).tolist()  # mean 11.25: the third cell only
    ([[9.0, 9.0, 9.0]], [[5.0, 8.0, 9.0]])
    """
    activation = _activation(maps, weight)
    attended = _or_all(activation >= activation.mean(dim=(2, 3), keepdim=True))
    weighted = maps if weight is None else maps * weight
    return weighted.where(attended, -torch.inf).amax(dim=(2, 3))


def crow(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-dimensional weighting (CroW, Kalantidis et al., ECCV workshops 2016); with a weight, of w x.

    I_k sum(S x_k): cells are weighted by S = (A / ||A||)^(1/2), channels by I = log(sum(Q) / Q), where Q is the (weighted)
    share of cells in which a channel is active, so that rare channels count more.

    >>> maps = torch.tensor([[[[9., 0.], [0., 0.]], [[7., 12.], [0., 0.]]]])  # A = 16, 12, 0, 0; S = sqrt(0.8), sqrt(0.6)
    >>> [round(value, 2) for value in crow(maps)[0].tolist()]  # Q = 1/4, 2/4; I = log(3), log(1.5)
    [8.84, 6.31]
    """
    activation = _activation(maps, weight).clamp(min=0)
    length = activation.square().sum(dim=(2, 3), keepdim=True).clamp(min=EPSILON**2).sqrt()
    cells = (activation / length + EPSILON**2).sqrt()  # without EPSILON the slope at 0 is infinite
    share = spoc((maps > 0).to(maps.dtype), weight)
    channels = ((share.sum(dim=1, keepdim=True) + EPSILON) / (share + EPSILON)).log()
    return channels * (maps * cells if weight is None else maps * weight * cells).sum(dim=(2, 3))


def scda(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Selective convolutional descriptor aggregation (SCDA, Wei et al., TIP 2017): (B, 2C).

    Average and maximum, each of length 1, over the largest 8-connected component of the cells with A > mean(A) (of several
    equally large ones, the last in reading order); with a weight, of w x.

    >>> maps = torch.tensor([[[[8., 0., 6.], [0., 0., 6.], [0., 0., 0.]], [[6., 0., 0.], [0., 0., 8.], [0., 0., 0.]]]])
    >>> [round(value, 3) for value in scda(maps)[0].tolist()]  # the two cells on the right: mean (6, 4), maximum (6, 8)
    [0.832, 0.555, 0.6, 0.8]
    """
    activation = _activation(maps, weight)
    part = _largest_part(_or_all(activation > activation.mean(dim=(2, 3), keepdim=True)))
    inside = part.to(maps.dtype) if weight is None else part * weight
    largest = (maps if weight is None else maps * weight).where(part, -torch.inf).amax(dim=(2, 3))
    return torch.cat([F.normalize(spoc(maps, inside)), F.normalize(largest)], dim=1)


def _activation(maps: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of w x over channels, (B, 1, H, W)."""
    total = maps.sum(dim=1, keepdim=True)
    return total if weight is None else total * weight


def _or_all(chosen: Tensor) -> Tensor:
    """bool (B, 1, H, W): `chosen`, or all cells of a map in which none is chosen, as rounding can cause in a constant map."""
    some = chosen.flatten(2).any(dim=2)  # OpenVINO converts `any` over two dimensions wrongly
    return chosen | ~some[..., None, None]


def regions(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    """R-MAC's squares as (top, left, side): at level l, l x l overlapping ones of side 2 min(H, W) / (l + 1).

    There are more along the longer side of an oblong map, so that the largest squares overlap by about 40 %.

    >>> regions(3, 3, 2)
    [(0, 0, 3), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    """
    short, long = min(height, width), max(height, width)
    more = min(range(1, 7), key=lambda steps: abs(1 - (long - short) / steps / short - 0.4)) if long > short else 0
    found = []
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        tops, lefts = (
            sorted({(extent - side) * step // max(1, count - 1) for step in range(count)})
            for extent, count in (
                (height, level + (more if height > width else 0)),
                (width, level + (more if width > height else 0)),
            )
        )
        found += [(top, left, side) for top in tops for left in lefts]
    return found


def _regional(maps: Tensor, weight: Tensor | None, attended: Tensor | None, levels: int, least: float = 0.0) -> Tensor:
    """Sum of the regions' normalised maxima, weighted by their share of attended cells and their mean weight: (B, C)."""
    weighted = maps if weight is None else maps * weight
    places = [
        (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
        for top, left, side in regions(int(maps.shape[2]), int(maps.shape[3]), levels)
    ]
    vectors = torch.stack([F.normalize(weighted[place].amax(dim=(2, 3))) for place in places], dim=1)
    importance = maps.new_ones(vectors.shape[:2])
    if attended is not None:
        shares = torch.stack([attended[place].to(maps.dtype).mean(dim=(1, 2, 3)) for place in places], dim=1)
        kept = shares.where(shares > least, 0)
        importance = kept.where((kept > 0).any(dim=1, keepdim=True), 1)
    if weight is not None:
        importance = importance * torch.stack([weight[place].mean(dim=(1, 2, 3)) for place in places], dim=1)
    return (vectors * importance[..., None]).sum(dim=1)


def _largest_part(chosen: Tensor) -> Tensor:
    """The largest 8-connected component of bool (B, 1, H, W); of several equally large ones, the last in reading order."""
    height, width = map(int, chosen.shape[2:])
    labels = torch.arange(1, height * width + 1, device=chosen.device, dtype=torch.float32).view(1, 1, height, width) * chosen
    # A label crosses a component in at most half as many steps as there are cells; a fixed number can be compiled.
    for _ in range((height * width + 1) // 2):
        labels = F.max_pool2d(labels, 3, stride=1, padding=1) * chosen
    flat = labels.flatten(1).long()
    sizes = flat.new_zeros(len(flat), height * width + 1).scatter_add_(1, flat, torch.ones_like(flat))
    sizes[:, 0] = 0
    last = height * width - sizes.flip(1).argmax(dim=1)
    return (flat == last[:, None]).view(chosen.shape)
