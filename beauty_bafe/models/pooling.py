"""From a feature map to one vector, optionally weighted by a saliency mask.

Every function takes `maps`, float (B, C, H, W), and `weight`, float (B, 1, H, W) in 0..1 or None, and gives
float (B, C). Each row depends on its own picture alone.
"""

from __future__ import annotations

from torch import Tensor

EPSILON = 1e-6  # keeps an empty mask and a dead channel finite


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
