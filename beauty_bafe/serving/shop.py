"""The gallery that is served: searched through one snapshot, changed by building the next one beside it."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import re
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from ..data.pictures import letterbox, read_picture
from ..manifest import replace_file
from ..retriever import Hit, Retriever
from ..versions import Versions
from .limits import Refused, Upload

LOCK = "changes.lock"  # in the folder; held by who changes it


class Served(NamedTuple):
    """What requests see: replaced as a whole, never changed. `version`: the name of its folder in index_dir."""

    retriever: Retriever
    version: str


class Found(NamedTuple):
    """The answer to one picture. `mask`: uint8 (112, 112) of its letterboxed square, None where the network makes none."""

    hits: list[Hit]
    mask: np.ndarray | None
    version: str


class Described(NamedTuple):
    """`vector`: float32 (D,) of length 1; `mask` as in Found."""

    vector: np.ndarray
    mask: np.ndarray | None
    version: str


class Shop:
    """What Retriever.save wrote to `folder`. Its methods may be called from several threads at once, and other processes may
    serve and change the same folder.

    Raises ValueError where `folder` holds no retriever, or one that can only search for pictures in files.
    """

    def __init__(self, folder: str | Path, overrides: Sequence[str] = ()) -> None:
        self.folder, self._overrides = Path(folder), tuple(overrides)
        self._changing = threading.Lock()
        self.served = self._load()
        blank = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(blank, "png")
        self.served.retriever.search([blank.getvalue()], k=1)  # also shows that its re-rankers take pictures that are no files
        if os.access(self.folder, os.W_OK):
            with self._change():
                self._tidy()

    def refresh(self) -> Served:
        """Serve the newest version of the folder, which another process may have written."""
        with self._changing:
            self._refresh()
            return self.served

    def answer(self, kind: Hashable, contents: Sequence[bytes]) -> list[Any]:
        """Found for the kind ("search", k), Described for ("describe", None), or the exception, for each encoded picture."""
        try:
            return self._answer(kind, contents)
        except ValueError as error:
            if len(contents) == 1:
                return [_broken(error)]
            # One of them is broken; the others are answered all the same.
            return [self.answer(kind, [content])[0] for content in contents]

    def _answer(self, kind: Any, contents: Sequence[bytes]) -> list[Any]:
        retriever, version = self.served
        if kind[0] == "describe":
            vectors, masks = retriever.describe(contents)
            return [Described(vector, None if masks is None else masks[row], version) for row, vector in enumerate(vectors)]
        k = min(kind[1], len(retriever))
        hits, masks = retriever.search_with_masks(contents, k)
        return [Found(found, None if masks is None else masks[row], version) for row, found in enumerate(hits)]

    def add(self, name: str, upload: Upload) -> Served:
        """Add a product. Returns once it is saved and served. Raises Refused: 409 for an id that is there, 422 as above."""
        with self._change() as shop:
            if name in shop.ids:
                raise Refused(409, f"the catalogue already holds '{name}'; delete it first to replace it")
            # Named by its content, so that no id can choose where it lies.
            file = self._pictures / f"{hashlib.sha256(upload.content).hexdigest()}.{upload.kind}"
            self._pictures.mkdir(exist_ok=True)
            replace_file(file, partial(_write, upload.content))
            try:
                shop.add({name: file})
                return self._swap(shop)
            except ValueError as error:
                raise _broken(error) from error
            finally:
                self._tidy()

    def remove(self, name: str) -> Served:
        """Remove a product. Returns once that is saved and served. Raises Refused: 404 for an unknown id, 409 for the last."""
        with self._change() as shop:
            if name not in shop.ids:
                raise Refused(404, f"the catalogue holds no '{name}'")
            if len(shop) == 1:
                raise Refused(409, f"'{name}' is the last product; add another first")
            shop.remove([name])
            served = self._swap(shop)
            self._tidy()
            return served

    def thumbnail(self, name: str, size: int) -> bytes:
        """A JPEG of `size` pixels square. Raises Refused (404) where the id is unknown or its picture is not to be had."""
        path = self.served.retriever.path(name)
        if path is None:
            raise Refused(404, f"the catalogue holds no picture of '{name}'")
        if isinstance(path, Path) and path.parent.name == self._pictures.name and not path.exists():
            path = self._pictures / path.name  # the folder was moved since
        try:
            picture = read_picture(path, size)
        except ValueError as error:
            raise Refused(404, f"the picture of '{name}' cannot be read any more") from error
        content = io.BytesIO()
        Image.fromarray(letterbox(picture.rgb, size)).save(content, "jpeg", quality=85)
        return content.getvalue()

    @property
    def _pictures(self) -> Path:
        return self.folder.resolve() / "pictures"

    @contextmanager
    def _change(self) -> Iterator[Retriever]:
        """A copy of the newest version, to change while no other thread or process changes it."""
        with self._changing, FileLock(self.folder / LOCK):
            self._refresh()
            yield copy.copy(self.served.retriever)  # shares all but what `add` and `remove` replace

    def _refresh(self) -> None:
        if self._version() != self.served.version:
            self.served = self._load()

    def _load(self) -> Served:
        while True:  # the name and the content must be of one version
            version = self._version()
            retriever = Retriever.load(self.folder, self._overrides)
            if version == self._version():
                return Served(retriever, version)

    def _swap(self, shop: Retriever) -> Served:
        shop.save(self.folder)  # a kill before its last step leaves the version before
        self.served = Served(shop, self._version())
        return self.served

    def _version(self) -> str:
        current = Versions(self.folder).current()
        return "" if current is None else current.name

    def _tidy(self) -> None:
        """Remove pictures that were added and whose product is gone, or was never saved."""
        shop = self.served.retriever
        # By name, which tells the content: the paths are of another folder where this one was moved.
        used = {path.name for name in shop.ids if (path := shop.path(name)) is not None}
        for file in self._pictures.iterdir() if self._pictures.is_dir() else ():
            if file.name not in used:
                file.unlink(missing_ok=True)


def make(folder: str | Path, checkpoints: Sequence[str], gallery: str, overrides: Sequence[str]) -> None:
    """Build the retriever of a gallery in `folder`, unless it holds one; see Retriever.build for the rest."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(folder) / LOCK):
        if Versions(Path(folder)).current() is None:
            Retriever.build(checkpoints, gallery, overrides).save(folder)


def _broken(error: ValueError) -> Refused:
    reason = str(error).partition(" cannot be read: ")[2]
    return Refused(422, f"the picture is broken: {re.sub(r'^[A-Za-z]+: ', '', reason)}" if reason else str(error))


def _write(content: bytes, part: Path) -> None:
    part.write_bytes(content)


def encode_mask(mask: np.ndarray, width: int, height: int) -> bytes:
    """A PNG of the part of a letterboxed mask (S, S) that a picture of this size fills: stretched over it, it fits."""
    size = len(mask)
    scale = size / max(width, height)
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale))
    top, left = (size - rows) // 2, (size - columns) // 2
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask[top : top + rows, left : left + columns])).save(content, "png")
    return content.getvalue()
