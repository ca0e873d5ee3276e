"""Descriptors on disk: numbered shards, each written atomically, and a manifest of the settings that they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..manifest import check_manifest, digest, replace_file

Picture = tuple[str, str]  # id and stamp (size and time of the file), so that a changed picture counts as new


class Store:
    """The descriptors of one checkpoint and pooling over one catalogue, in `folder`.

    `key`: plain values that every vector depends on; they are written to the manifest, with the catalogue's fingerprint and
    the plan given to `begin`. Open, write and read it inside `manifest.locked`, as other runs may write to the same folder.
    Raises ValueError naming the key that differs from the folder's, or the damaged shard.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, dict(key)
        self.rows: dict[Picture, tuple[int, int]] = {}  # position of a picture's vector: shard, row
        self.unreadable: dict[Picture, str] = {}
        self.manifest: dict[str, Any] = {}
        self._shards: dict[int, list[Picture]] = {}  # their pictures
        self._mapped: dict[int, dict[str, Any]] = {}
        if (folder / "manifest.json").is_file():
            self.manifest = check_manifest(
                folder / "manifest.json",
                self.key,
                f"type another features=DIR, or delete {folder} to describe everything again",
            )
            for file in sorted(folder.glob("*.safetensors")):
                self._register(int(file.stem), *_about(file))

    def _register(self, shard: int, pictures: list[Picture], unreadable: Mapping[Picture, str]) -> None:
        self._shards[shard] = pictures
        self.rows |= {picture: (shard, row) for row, picture in enumerate(pictures)}
        known = {**self.unreadable, **unreadable}
        self.unreadable = {picture: reason for picture, reason in known.items() if picture not in self.rows}

    def __contains__(self, picture: Picture) -> bool:
        return picture in self.rows or picture in self.unreadable

    def plan(self, pictures: Sequence[Picture]) -> dict[str, Any]:
        """The plan that `begin` was given for exactly this catalogue; empty if there was none."""
        return self.manifest if self.manifest.get("catalogue") == _fingerprint(pictures) else {}

    def begin(self, pictures: Sequence[Picture], plan: Mapping[str, Any]) -> None:
        """Prepare for this catalogue: drop pictures that are no longer in it, and write the manifest."""
        manifest = {**self.key, **plan, "catalogue": _fingerprint(pictures), "pictures": len(pictures)}
        if self.manifest == manifest:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.part"):  # of a run that was killed
            leftover.unlink()
        current = set(pictures)
        if not current.issuperset(self.rows) or not current.issuperset(self.unreadable):
            self._drop(current)
        self.manifest = manifest
        text = json.dumps(manifest, indent=1)
        replace_file(self.folder / "manifest.json", lambda part: part.write_text(text, encoding="utf-8"))

    def _drop(self, current: set[Picture]) -> None:
        unread, self.rows, self.unreadable = self.unreadable, {}, {}
        for file in sorted(self.folder.glob("*.safetensors")):
            pictures, unreadable = _about(file)
            keep = [row for row, picture in enumerate(pictures) if picture in current]
            kept = {picture: reason for picture, reason in unreadable.items() if picture in current and picture in unread}
            if len(keep) < len(pictures) or len(kept) < len(unreadable):
                arrays = {name: array[keep] for name, array in _arrays(file).items()}
                pictures = [pictures[row] for row in keep]
                _write(file, arrays, pictures, kept)
            self._register(int(file.stem), pictures, kept)

    def free_shards(self) -> Iterator[int]:
        """Unused shard numbers, lowest first.

        Workers that are killed leave gaps. Filled in this order, they get the same pictures as if none had been killed.
        """
        return (number for number in count() if number not in self._shards)

    def append(self, pictures: Sequence[Picture], arrays: Mapping[str, np.ndarray], unreadable: Mapping[Picture, str]) -> int:
        """Write another shard; `arrays` have one row per picture. Returns its size in bytes."""
        shard = next(self.free_shards())
        file = self.file(shard)
        _write(file, arrays, pictures, unreadable)
        self._register(shard, list(pictures), unreadable)
        return file.stat().st_size

    def register(self, shard: int) -> None:
        """Add a shard that another process has written with `write_shard`."""
        self._register(shard, *_about(self.file(shard)))

    def file(self, shard: int) -> Path:
        """The path of a shard, written or not."""
        return self.folder / f"{shard:06d}.safetensors"

    def _checked(self, shard: int) -> Path:
        """The path of a shard. Raises ValueError if another run has changed its rows."""
        file = self.file(shard)
        if _about(file)[0] != self._shards[shard]:
            raise ValueError(f"another run has changed '{file}' since this one opened it; run the same command again")
        return file

    def map(self, pictures: Iterable[Picture]) -> None:
        """Memory-map the shards of these pictures for `row`; later writes of other runs do not affect them."""
        from safetensors import safe_open

        for shard in {self.rows[picture][0] for picture in pictures}.difference(self._mapped):
            opened = safe_open(self._checked(shard), framework="numpy")
            self._mapped[shard] = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict

    def is_mapped(self, picture: Picture) -> bool:
        return picture in self.rows and self.rows[picture][0] in self._mapped

    def files(self) -> dict[str, tuple[int, int]]:
        """Inode and time of every shard and of the manifest, to detect changes by other runs."""
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry.stat() for entry in entries if entry.name.endswith((".safetensors", ".json"))}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}

    def row(self, picture: Picture) -> dict[str, np.ndarray]:
        """One mapped picture's row of every array."""
        shard, row = self.rows[picture]
        return {name: array[row] for name, array in self._mapped[shard].items()}

    def read(self, pictures: Iterable[Picture]) -> dict[str, np.ndarray]:
        """The arrays of these pictures, in this order; vectors as float32. Raises ValueError if a vector is not finite."""
        places = np.array([self.rows[picture] for picture in pictures], np.int64).reshape(-1, 2)
        result: dict[str, np.ndarray] = {}
        for shard in np.unique(places[:, 0]):
            file = self._checked(int(shard))
            here = np.flatnonzero(places[:, 0] == shard)
            rows = places[here, 1]
            for name, array in _arrays(file).items():
                if name == "vectors":
                    array = array.astype(np.float32)
                    broken = np.flatnonzero(~np.isfinite(array).all(axis=1))
                    if len(broken):
                        raise ValueError(
                            f"'{file}', row {broken[0]} ('{_about(file)[0][broken[0]][0]}') is not finite; "
                            "delete the file and run the same command again to describe its pictures"
                        )
                if name not in result:
                    result[name] = np.zeros((len(places), *array.shape[1:]), array.dtype)
                result[name][here] = array[rows]
        return result


def is_written(file: Path, pictures: Sequence[Picture], unreadable: Iterable[Picture]) -> bool:
    """Whether a shard was written. Raises ValueError if it contains other pictures, or is damaged."""
    if not file.exists():
        return False
    found, reasons = _about(file)
    if {*found, *reasons} != {*pictures, *unreadable}:
        raise ValueError(f"another run has written '{file}' since this one started; run the same command again")
    return True


def write_shard(
    file: Path, pictures: Sequence[Picture], arrays: Mapping[str, np.ndarray], unreadable: Mapping[Picture, str]
) -> int:
    """Write a shard from a worker process, to a file chosen by the process that owns the store.

    An existing shard with the same pictures is kept: a worker that was assumed dead may have written it. Raises ValueError
    if it has other pictures. Returns its size in bytes.
    """
    if not is_written(file, pictures, unreadable):
        _write(file, arrays, pictures, unreadable)
    return file.stat().st_size


def _fingerprint(pictures: Sequence[Picture]) -> str:
    return digest(*(part for picture in pictures for part in picture))


def _write(
    file: Path, arrays: Mapping[str, np.ndarray], pictures: Sequence[Picture], unreadable: Mapping[Picture, str]
) -> None:
    from safetensors.numpy import save_file

    # One metadata entry, as the order of several is not deterministic.
    about = json.dumps({"pictures": list(pictures), "unreadable": [[*key, reason] for key, reason in unreadable.items()]})
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_file(file, lambda part: save_file(whole, part, {"about": about}))


def _about(file: Path) -> tuple[list[Picture], dict[Picture, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as shard:
            about = json.loads(shard.metadata()["about"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise _damaged(file, error) from error
    pictures = [(name, stamp) for name, stamp in about["pictures"]]
    return pictures, {(name, stamp): reason for name, stamp, reason in about["unreadable"]}


def _arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"'{file}' is damaged ({error}); delete it and run the same command again to describe its pictures")
