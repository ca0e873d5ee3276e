"""The gallery that is served: searches use a snapshot, and changes build the next one."""

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

LOCK = "changes.lock"  # in the folder; held while it is changed


class Served(NamedTuple):
    """The snapshot that requests use: replaced as a whole, never modified. `version`: the name of its folder in index_dir."""

    retriever: Retriever
    version: str


class SearchResult(NamedTuple):
    """The result of a search by `retriever`. `mask`: uint8 (112, 112) of the letterboxed picture, None if the network makes
    none.
    """

    hits: list[Hit]
    mask: np.ndarray | None
    version: str
    retriever: Retriever


class Descriptor(NamedTuple):
    """`vector`: float32 (D,) of length 1; `mask` as in SearchResult."""

    vector: np.ndarray
    mask: np.ndarray | None
    version: str


class Shop:
    """A saved Retriever in `folder`. Thread-safe; other processes may serve and change the same folder.

    Raises ValueError if `folder` holds no retriever, or one whose re-rankers need queries as files.
    """

    def __init__(self, folder: str | Path, overrides: Sequence[str] = ()) -> None:
        self.folder, self._overrides = Path(folder), tuple(overrides)
        self._changing = threading.Lock()
        self.served = self._load()
        blank = io.BytesIO()
        Image.new("RGB", (64, 64), "white").save(blank, "png")
        self.served.retriever.search([blank.getvalue()], k=1)  # also checks that its re-rankers accept pictures in memory
        if os.access(self.folder, os.W_OK):
            with self._change():
                self._tidy()

    def refresh(self) -> Served:
        """Switch to the newest version in the folder, which another process may have written."""
        with self._changing:
            self._refresh()
            return self.served

    def answer(self, kind: Hashable, contents: Sequence[bytes]) -> list[Any]:
        """For each encoded picture: SearchResult for kind ("search", k), Descriptor for ("describe", None), or an exception."""
        try:
            return self._answer(kind, contents)
        except ValueError as error:
            if len(contents) == 1:
                return [_broken(error)]
            # One of them is broken; the others are still answered.
            return [self.answer(kind, [content])[0] for content in contents]

    def _answer(self, kind: Any, contents: Sequence[bytes]) -> list[Any]:
        retriever, version = self.served
        if kind[0] == "describe":
            vectors, masks = retriever.describe(contents)
            return [Descriptor(vector, None if masks is None else masks[row], version) for row, vector in enumerate(vectors)]
        k = min(kind[1], len(retriever))
        hits, masks = retriever.search_with_masks(contents, k)
        return [
            SearchResult(found, None if masks is None else masks[row], version, retriever) for row, found in enumerate(hits)
        ]

    def add(self, name: str, upload: Upload) -> Served:
        """Add a product. Returns when it is saved and served. Raises Refused: 409 for an existing id, 422 for a bad picture."""
        with self._change() as shop:
            if name in shop.ids:
                raise Refused(409, f"the catalogue already holds '{name}'; delete it first to replace it")
            # Named by its content, so that no id can choose the path.
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
        """Remove a product. Returns when that is saved and served. Raises Refused: 404 for an unknown id, 409 for the last."""
        with self._change() as shop:
            if name not in shop.ids:
                raise Refused(404, f"the catalogue holds no product '{name}'")
            if len(shop) == 1:
                raise Refused(409, f"'{name}' is the last product; add another first")
            shop.remove([name])
            served = self._swap(shop)
            self._tidy()
            return served

    def thumbnail(self, name: str, size: int) -> bytes:
        """A square JPEG of `size` pixels. Raises Refused (404) for an unknown id or a picture that cannot be read."""
        path = self.served.retriever.path(name)
        if path is None:
            raise Refused(404, f"the catalogue holds no picture of '{name}'")
        if isinstance(path, Path) and path.parent.name == self._pictures.name and not path.exists():
            path = self._pictures / path.name  # the folder has been moved
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
        """A copy of the newest version, to be changed while all other threads and processes wait to change it."""
        with self._changing, FileLock(self.folder / LOCK):
            self._refresh()
            yield copy.copy(self.served.retriever)  # shares everything that `add` and `remove` do not replace

    def _refresh(self) -> None:
        if self._version() != self.served.version:
            self.served = self._load()

    def _load(self) -> Served:
        while True:  # name and content must be of the same version
            version = self._version()
            retriever = Retriever.load(self.folder, self._overrides)
            if version == self._version():
                return Served(retriever, version)

    def _swap(self, shop: Retriever) -> Served:
        shop.save(self.folder)  # if killed before its last step, the previous version stays valid
        self.served = Served(shop, self._version())
        return self.served

    def _version(self) -> str:
        current = Versions(self.folder).current()
        return "" if current is None else current.name

    def _tidy(self) -> None:
        """Delete added pictures of products that were removed, or never saved."""
        shop = self.served.retriever
        # By name, a hash of the content, as the paths differ if the folder was moved.
        used = {path.name for name in shop.ids if (path := shop.path(name)) is not None}
        for file in self._pictures.iterdir() if self._pictures.is_dir() else ():
            if file.name not in used:
                file.unlink(missing_ok=True)


def build_if_missing(folder: str | Path, checkpoints: Sequence[str], gallery: str, overrides: Sequence[str]) -> None:
    """Build and save the retriever of a gallery, unless `folder` holds one; see Retriever.build."""
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
    """A PNG of the part of a letterboxed mask (S, S) that the picture fills, to be stretched over a picture of this size."""
    size = len(mask)
    scale = size / max(width, height)
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale))
    top, left = (size - rows) // 2, (size - columns) // 2
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask[top : top + rows, left : left + columns])).save(content, "png")
    return content.getvalue()
