"""From what the network says of a picture to its descriptor: which map, pooled how."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .extractor import Extraction, resize_mask


class Pooling:
    """From an extraction to descriptors: which map, which function, weighted by the saliency mask or not (conf/pooling).

    `map`: "last", or the number of a tap, 1 for the shallowest. The weight is that tap's own mask; "last" takes the
    deepest tap's, resized to the map (paper).
    """

    def __init__(self, function: Callable[..., Tensor], saliency: bool, map: str | int = "last") -> None:
        if map != "last" and not isinstance(map, int):
            raise ValueError(f"pooling.map={map!r}: type last, or the number of a tap counted from 1")
        self.function, self.saliency, self.map = function, saliency, map

    def __str__(self) -> str:
        """What tells its descriptors from another pooling's: `gem(p=3.0) of last under its mask`."""
        inner = getattr(self.function, "func", self.function)
        settings = ", ".join(f"{key}={value}" for key, value in sorted(getattr(self.function, "keywords", {}).items()))
        return f"{inner.__name__}({settings}) of {self.map}{' under its mask' if self.saliency else ''}"

    def shallowest(self, taps: int) -> int:
        """The first of `taps` taps, counted from 0, whose mask (or gate, which takes deeper masks) this pooling needs."""
        if self.map == "last":
            return taps - 1 if self.saliency else taps
        return max(0, int(self.map) - 1)

    def __call__(self, extraction: Extraction) -> Tensor:
        """Float32 (B, C), not normalised. Raises ValueError for a tap the network does not have."""
        if self.map == "last":
            maps, level = extraction.last, -1
        elif 1 <= int(self.map) <= len(extraction.taps):
            maps, level = extraction.taps[int(self.map) - 1], int(self.map) - 1 - len(extraction.taps)
        else:
            raise ValueError(f"pooling.map={self.map}: this network has the taps 1 to {len(extraction.taps)}, and last")
        weight = resize_mask(extraction.masks[level], maps.shape[-2:]) if self.saliency else None
        return self.function(maps.float(), weight)
