"""Pictures given in memory or as paths, read one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image
from torch import Tensor

from .catalog import Catalog
from .pictures import MAX_PIXELS, Picture, UnreadablePicture, convert_image, read_picture, shrink

ImageLike = str | Path | Image | bytes | np.ndarray | Tensor
KINDS = "a path, a PIL image, an encoded file's bytes, or a uint8 array or tensor (H, W, 3) in RGB"


class Pictures(Protocol):
    """A source of pictures: `ids` names them, `read(row, longest)` decodes one, `files`: those that are files."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def files(self) -> Catalog: ...

    def __len__(self) -> int: ...

    def read(self, row: int, longest: int | None = None) -> Picture:
        """See `read_picture`. Raises UnreadablePicture."""


@dataclass(frozen=True)
class Images:
    """Pictures of any of `KINDS`, with ids. Raises TypeError or ValueError for anything else, saying what it got."""

    ids: tuple[str, ...]
    images: tuple[ImageLike, ...]

    def __post_init__(self) -> None:
        for name, image in zip(self.ids, self.images, strict=True):
            check_image(image, f"image '{name}'")

    @classmethod
    def numbered(cls, images: Iterable[ImageLike]) -> Images:
        """Images whose ids are their numbers from 0. Raises TypeError if `images` is a single image."""
        if isinstance(images, ImageLike) and not (hasattr(images, "ndim") and images.ndim == 4):
            raise TypeError(f"got one {type(images).__name__}; give a list of images, [image] for a single one")
        if isinstance(images, Mapping) or not isinstance(images, Iterable):
            raise TypeError(f"got a {type(images).__name__}; give a list of images, each {KINDS}")
        listed = tuple(images)
        return cls(tuple(map(str, range(len(listed)))), listed)

    @classmethod
    def named(cls, images: Mapping[str, ImageLike]) -> Images:
        """Images by id. Raises TypeError if it is not a mapping or an id is not a str."""
        if not isinstance(images, Mapping):
            raise TypeError(f"got a {type(images).__name__}; give a dict of id -> image, the image being {KINDS}")
        for name in images:
            if not isinstance(name, str):
                raise TypeError(f"the id {name!r} is of type {type(name).__name__}; ids are strings, type {str(name)!r}")
        return cls(tuple(images), tuple(images.values()))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def files(self) -> Catalog:
        found = {name: Path(image) for name, image in zip(self.ids, self.images, strict=True) if isinstance(image, str | Path)}
        return Catalog(tuple(found), tuple(found.values()))

    def read(self, row: int, longest: int | None = None) -> Picture:
        """See `read_picture`. Raises ValueError naming the image."""
        image = self.images[row]
        try:
            if isinstance(image, str | Path | bytes):
                return read_picture(image, longest)
            if isinstance(image, Image):
                return convert_image(image, longest)
        except (UnreadablePicture, OSError) as error:
            name = f"'{image}'" if isinstance(image, str | Path) else f"image '{self.ids[row]}' ({type(image).__name__})"
            raise ValueError(f"{name} cannot be read: {error}") from error
        pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
        return shrink(Picture(np.ascontiguousarray(pixels), None), longest)


def check_image(image: Any, name: str) -> None:
    """Raise TypeError or ValueError if `image` is none of `KINDS`; `name` identifies it in the message."""
    if not isinstance(image, ImageLike):
        raise TypeError(f"{name} is of type {type(image).__name__}; it must be {KINDS}")
    if isinstance(image, np.ndarray | Tensor):
        shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
        if dtype != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            hint = "; type image.permute(1, 2, 0)" if len(shape) == 3 and shape[0] == 3 and dtype == "uint8" else ""
            raise ValueError(f"{name} is {dtype} {shape}; arrays and tensors must be uint8 (H, W, 3) in RGB{hint}")
        if shape[0] * shape[1] > MAX_PIXELS:
            raise ValueError(f"{name} is {shape[1]} x {shape[0]}, over {MAX_PIXELS:,} pixels; shrink it first")
