"""Poolings: how a feature map of a picture becomes its descriptor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .extractor import Extraction, resize_mask


def describe_partial(function: Any) -> str:
    """A partial as text, such as `gem(p=3.0)`; other objects by their own `str`."""
    inner = getattr(function, "func", function)
    settings = ", ".join(f"{key}={value}" for key, value in sorted(getattr(function, "keywords", {}).items()))
    return f"{inner.__name__}({settings})" if hasattr(inner, "__name__") else str(inner)


class Pooling:
    """Pools a feature map of an Extraction into descriptors (conf/pooling).

    `function`: see pooling.py. `saliency`: whether to weight the cells by the mask. `map`: "last", or the number of a tap, 1
    for the shallowest. The weight is the mask of that tap; for "last" that of the deepest tap, resized to the map (BAFE).
    With "picture" the function (retrieval/classical.py) gets the uint8 picture and the mask at the picture's size.
    """

    def __init__(self, function: Callable[..., Tensor], saliency: bool, map: str | int = "last") -> None:
        if map not in ("last", "picture") and not isinstance(map, int):
            raise ValueError(f"pooling.map={map!r}: type last, picture, or the number of a tap counted from 1")
        if isinstance(function, partial):  # Hydra's own kind checks its target again at every call, which costs a millisecond
            function = partial(function.func, *function.args, **function.keywords)
        self.function, self.saliency, self.map = function, saliency, map

    def __str__(self) -> str:
        """All settings that its descriptors depend on: `gem(p=3.0) of last under its mask`."""
        return f"{describe_partial(self.function)} of {self.map}{' under its mask' if self.saliency else ''}"

    def shallowest(self, taps: int) -> int:
        """The shallowest tap, counted from 0, whose mask or gate this pooling needs; `taps` if it needs none."""
        if self.map == "picture":
            return 0 if self.saliency else taps
        if self.map == "last":
            return taps - 1 if self.saliency else taps
        return max(0, int(self.map) - 1)

    def __call__(self, extraction: Extraction) -> Tensor:
        """Descriptors, float32 (B, C), not normalised. Raises ValueError for a tap that the network does not have."""
        if self.map == "picture":
            size = extraction.pictures.shape[-1]
            pixels = extraction.pictures.round().clamp(0, 255).to(torch.uint8)  # views return floats
            return self.function(pixels, extraction.saliency(size) if self.saliency else None)
        if self.map == "last":
            maps, level = extraction.last, -1
        elif 1 <= int(self.map) <= len(extraction.taps):
            maps, level = extraction.taps[int(self.map) - 1], int(self.map) - 1 - len(extraction.taps)
        else:
            raise ValueError(f"pooling.map={self.map}: this network has the taps 1 to {len(extraction.taps)}, and last")
        weight = resize_mask(extraction.masks[level], maps.shape[-2:]) if self.saliency else None
        return self.function(maps.float(), weight)
