"""Catalogue photos and masks, the input of augmentation: from their files, or from a cache of decoded photos."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..manifest import locked
from .augmentation import Sample
from .catalog import Catalog
from .foreground import find_foreground
from .pictures import UnreadablePicture, letterbox, read_picture
from .places import Place, stamp, stamps

VERSION = 2  # increase it when the same file gives other pixels or another mask


class LoadResult(NamedTuple):
    """The result of inspecting a file. `reason`: why it cannot be used, "" if it can. `unreadable`: it cannot be read.

    `pixels`: uint8 (S, S, 4), photo and mask, of a usable catalogue photo.
    """

    reason: str = ""
    unreadable: bool = False
    pixels: np.ndarray | None = None


def load_photo(path: Place, size: int) -> Sample:
    """A catalogue photo and its foreground mask on a `size` canvas. Raises UnreadablePicture or ValueError (untrusted mask)."""
    picture = read_picture(path, size)
    foreground = find_foreground(picture)
    if not foreground.trusted:
        raise ValueError(foreground.reason)
    return Sample(letterbox(picture.rgb, size), letterbox(foreground.mask, size, fill=0))


def inspect_photo(path: Place, size: int) -> LoadResult:
    """`load_photo`, with its errors as reasons."""
    try:
        photo, mask = load_photo(path, size)
    except UnreadablePicture as error:
        return LoadResult(str(error), unreadable=True)
    except ValueError as error:
        return LoadResult(f"mask not trusted: {error}")
    return LoadResult(pixels=np.dstack([photo, mask]))


class PhotoCache:
    """Photos and masks of one size in `folder`: photos.u8, uint8 (N, S, S, 4), and photos.jsonl.

    Photos are identified by path and stamp, so that a changed file is inspected again; catalogues can share a cache.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        self.folder, self.size = Path(folder) / f"photos-{size}-v{VERSION}", size
        self.pixels, self.list = self.folder / "photos.u8", self.folder / "photos.jsonl"
        self.results: dict[str, LoadResult] = {}
        self.rows: dict[str, int] = {}

    def fill(self, catalog: Catalog, inspect: Callable[[Catalog], Iterable[LoadResult]]) -> list[LoadResult]:
        """The result of each photo; `inspect` is called only for new ones. The pixels of usable photos are cached.

        A photo is listed only when its pixels are on disk, so that a killed run can continue. Only one process at a time
        fills the cache. Raises OSError if the disk is full, ValueError if a part of the cache is missing.
        """
        names = [_identify(path, found) for path, found in zip(catalog.paths, stamps(catalog.paths), strict=True)]
        with locked([self.folder]):
            self._read()
            # Each file once, even if it has several ids, as rows are numbered by files.
            missing = list({name: index for index, name in enumerate(names) if name not in self.results}.values())
            if missing:
                for index, result in zip(missing, inspect(catalog.subset(missing)), strict=True):
                    self._keep(names[index], result)
        return [self.results[name] for name in names]

    def __call__(self, path: Place) -> Sample:
        """The photo and its mask. Raises ValueError if it is not in the cache, or not usable."""
        name = _identify(path, stamp(path))
        if name not in self.rows:
            raise ValueError(f"'{path}' changed during training; run the same command again, which will inspect it again")
        count = self.size * self.size * 4
        pixels = np.fromfile(self.pixels, np.uint8, count, offset=self.rows[name] * count).reshape(self.size, self.size, 4)
        return Sample(cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3))

    def _keep(self, name: str, result: LoadResult) -> None:
        row = None
        try:
            if result.pixels is not None:
                row = len(self.rows)
                with self.pixels.open("r+b" if self.pixels.exists() else "wb") as pixels:
                    pixels.seek(row * result.pixels.nbytes)
                    pixels.write(result.pixels.tobytes())
            with self.list.open("ab") as lines:
                lines.write((json.dumps([name, row, result.reason, result.unreadable]) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"could not write '{self.folder}' ({error}); its contents are kept. Type data.cache=FOLDER on a disk with more "
                "space, or data.cache=null to read the files every time"
            ) from error
        self._add(name, row, result.reason, result.unreadable)

    def _read(self) -> None:
        self.results, self.rows = {}, {}
        lines = self.list.read_bytes() if self.list.exists() else b""
        whole = lines[: lines.rfind(b"\n") + 1]
        if len(whole) < len(lines):  # the last line is incomplete after a kill
            self.list.write_bytes(whole)
        for line in whole.splitlines():
            self._add(*json.loads(line))
        held = self.pixels.stat().st_size if self.pixels.exists() else 0
        if held < len(self.rows) * self.size * self.size * 4:
            raise ValueError(
                f"'{self.pixels}' is too short for the {len(self.rows)} photos that {self.list.name} lists: it was cut off, or "
                f"not copied completely; delete the folder '{self.folder}' and run the same command again"
            )

    def _add(self, name: str, row: int | None, reason: str, unreadable: bool) -> None:
        self.results[name] = LoadResult(reason, unreadable)
        if row is not None:
            self.rows[name] = row


def _identify(place: Place, stamp: str) -> str:
    """A photo's absolute location and stamp."""
    return f"{os.path.abspath(place) if isinstance(place, Path) else place.resolve()} {stamp}"
