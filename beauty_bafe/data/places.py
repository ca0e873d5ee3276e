"""Locations of pictures: a file, a member of a shard, or a URL that fsspec can open."""

from __future__ import annotations

import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeGuard, TypeVar

T = TypeVar("T")
URL = re.compile(r"[a-z][a-z0-9+.-]*://.")
# A file system provides one of these.
STAMP_KEYS = ("ETag", "md5Hash", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created")
SHARD_MEMBER = re.compile(r"(.+)/([^/]+)#(\d+)\+(\d+)=([0-9a-f]{8})")  # str(ShardMember)


class VirtualFile(ABC):
    """A picture that is not a plain local file. `locate` is the inverse of `str`."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The encoded picture. Raises OSError."""

    @abstractmethod
    def stamp(self) -> str:
        """See `stamp`."""

    @abstractmethod
    def resolve(self) -> Self:
        """The same location, independent of the working directory."""

    @property
    def size(self) -> int:
        """Bytes of the encoded picture."""
        return int(self.stamp().partition("-")[0])

    @property
    def name(self) -> str:
        """Like that of a file, with the suffix."""
        return PurePosixPath(str(self)).name

    @property
    def parent(self) -> PurePosixPath:
        return PurePosixPath(str(self)).parent


Place = Path | VirtualFile


class BrokenShard(OSError):
    """A shard that is missing or differs from its listing; the message says what to type."""


@dataclass(frozen=True, slots=True)
class ShardMember(VirtualFile):
    """`member` of the tar file `file`, a path or URL: `length` bytes from `start`, verified against the CRC-32 `crc`.

    The file is opened for each read, so that processes do not share a file position.
    """

    file: str
    member: str
    start: int
    length: int
    crc: int

    def __str__(self) -> str:
        return f"{self.file}/{self.member}#{self.start}+{self.length}={self.crc:08x}"

    def read_bytes(self) -> bytes:
        """See VirtualFile. Raises BrokenShard."""
        try:
            if is_url(self.file):
                content = _call_filesystem(
                    self.file, lambda system, path: system.cat_file(path, self.start, self.start + self.length)
                )
            else:
                with open(self.file, "rb") as stream:
                    stream.seek(self.start)
                    content = stream.read(self.length)
        except FileNotFoundError as error:
            raise broken_shard(self.file, "is missing") from error
        if zlib.crc32(content) != self.crc:
            raise broken_shard(self.file, f"contains other bytes in the place of {self.member}")
        return content

    def stamp(self) -> str:
        return f"{self.length}-{self.crc:08x}"

    def resolve(self) -> ShardMember:
        return replace(self, file=self.file if is_url(self.file) else os.path.abspath(self.file))

    @property
    def name(self) -> str:
        return self.member


@dataclass(frozen=True)
class RemoteFile(VirtualFile):
    """A file at a URL. `known_stamp`: its stamp from a listing; without one, it is requested once."""

    url: str
    known_stamp: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.url

    def read_bytes(self) -> bytes:
        content: bytes = _call_filesystem(self.url, lambda system, path: system.cat_file(path))
        return content

    def stamp(self) -> str:
        if not self.known_stamp:
            try:
                known = _stamp_of(_call_filesystem(self.url, lambda system, path: system.info(path)))
            except OSError:
                known = "missing"
            object.__setattr__(self, "known_stamp", known)
        return self.known_stamp

    def resolve(self) -> RemoteFile:
        return self


def is_url(source: object) -> TypeGuard[str]:
    return isinstance(source, str) and URL.match(source) is not None


def absolute(source: str) -> str:
    """A source of pictures, independent of the working directory."""
    return source if is_url(source) else str(Path(source).expanduser().resolve())


def list_files(url: str) -> list[tuple[tuple[str, ...], RemoteFile]]:
    """Every file below a URL, with the parts of its relative path, sorted by them. Raises OSError."""

    def listed(system: Any, root: str) -> list[tuple[tuple[str, ...], RemoteFile]]:
        system.invalidate_cache()  # which may contain an outdated listing
        found = system.find(root, detail=True).items()
        return [
            # A listing of links, as over HTTP, has no sizes, which are then requested one by one.
            (PurePosixPath(name).relative_to(root).parts, RemoteFile(system.unstrip_protocol(name), _stamp_of(info)))
            for name, info in found
        ]

    return sorted(_call_filesystem(url, listed), key=lambda file: file[0])


def _call_filesystem(url: str, call: Callable[[Any, str], T]) -> T:
    """Call the fsspec file system of a URL. Raises OSError, saying what to check, or ImportError for a missing package."""
    from fsspec.core import url_to_fs  # slow to import

    try:
        return call(*url_to_fs(url))  # one instance per process: fsspec creates another after a fork
    except (OSError, ImportError):
        raise
    except Exception as error:  # each file system has its own exceptions
        raise OSError(
            f"'{url}' does not respond ({type(error).__name__}: {error}); check the address, and the credentials for fsspec"
        ) from error


def _stamp_of(info: dict[str, Any]) -> str:
    if info.get("size") is None:
        return ""
    mark = next((info[key] for key in STAMP_KEYS if info.get(key)), "")
    # Listings and single requests may format the same value differently.
    return f"{info['size']}-{mark.timestamp() if isinstance(mark, datetime) else str(mark).strip(chr(34))}"


def broken_shard(file: str, what: str) -> BrokenShard:
    """The error for a shard; `what`: what is wrong with it."""
    folder = "SHARDS" if is_url(file) else PurePosixPath(file).parent
    return BrokenShard(
        f"the shard '{file}' {what}; copy it again from its source, or recreate it: delete it and type "
        f"beauty-bafe shards pictures=GALLERY output_dir={folder}, with the original GALLERY"
    )


def locate(text: str, folder: str | Path) -> Place:
    """The location with this `str`; paths are relative to `folder`."""
    if found := SHARD_MEMBER.fullmatch(text):
        file, member, start, length, crc = found.groups()
        return ShardMember(file if is_url(file) else str(Path(folder) / file), member, int(start), int(length), int(crc, 16))
    if is_url(text) or is_url(folder):
        return RemoteFile(text if is_url(text) else f"{folder}/{text}")
    return Path(folder) / text


def stamp(place: Place) -> str:
    """Changes if a picture must be read again: its size and time, or why it cannot be read."""
    if isinstance(place, VirtualFile):
        return place.stamp()
    try:
        status = os.stat(place)
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}" if os.access(place, os.R_OK) else "no access"


def size_of(place: Place) -> int:
    """Bytes of the encoded picture. Raises OSError."""
    return place.size if isinstance(place, VirtualFile) else os.stat(place).st_size
