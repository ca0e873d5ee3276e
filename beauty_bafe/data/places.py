"""Where a picture lies: in a file of its own, or elsewhere: in a shard, or behind a URL that fsspec opens."""

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
# Of these a file system tells one or another.
STAMP_KEYS = ("ETag", "md5Hash", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created")
SHARD_MEMBER = re.compile(r"(.+)/([^/]+)#(\d+)\+(\d+)=([0-9a-f]{8})")  # as `str` of a ShardMember


class VirtualFile(ABC):
    """A picture without a file of its own. `str` names it, and `locate` takes that name; what reads it knows only this much."""

    @abstractmethod
    def read_bytes(self) -> bytes:
        """The encoded picture. Raises OSError."""

    @abstractmethod
    def stamp(self) -> str:
        """See `stamp`."""

    @abstractmethod
    def resolve(self) -> Self:
        """The same place, named so that every working directory knows it."""

    @property
    def size(self) -> int:
        """Bytes of the encoded picture."""
        return int(self.stamp().partition("-")[0])

    @property
    def name(self) -> str:
        """As a file's: with the suffix, which tells the format."""
        return PurePosixPath(str(self)).name

    @property
    def parent(self) -> PurePosixPath:
        return PurePosixPath(str(self)).parent


Place = Path | VirtualFile


class BrokenShard(OSError):
    """A shard that is not there, or not as its list says; the message says what to type."""


@dataclass(frozen=True, slots=True)
class ShardMember(VirtualFile):
    """`member` of the tar file `file`, a path or URL: `length` bytes from `start`; every reading compares their CRC-32, `crc`.

    The file is opened for each reading, so that processes share no position in it.
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
            raise broken_shard(self.file, "is not there") from error
        if zlib.crc32(content) != self.crc:
            raise broken_shard(self.file, f"holds other bytes where {self.member} was")
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
    """What lies at a URL. `seen`: its stamp as a list told it; where none did, it is asked for once, and kept."""

    url: str
    seen: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.url

    def read_bytes(self) -> bytes:
        content: bytes = _call_filesystem(self.url, lambda system, path: system.cat_file(path))
        return content

    def stamp(self) -> str:
        if not self.seen:
            try:
                seen = _stamp_of(_call_filesystem(self.url, lambda system, path: system.info(path)))
            except OSError:
                seen = "missing"
            object.__setattr__(self, "seen", seen)
        return self.seen

    def resolve(self) -> RemoteFile:
        return self


def is_url(source: object) -> TypeGuard[str]:
    return isinstance(source, str) and URL.match(source) is not None


def absolute(source: str) -> str:
    """A source of pictures, named so that every working directory knows it."""
    return source if is_url(source) else str(Path(source).expanduser().resolve())


def list_files(url: str) -> list[tuple[tuple[str, ...], RemoteFile]]:
    """Every file below a URL, with the parts of its name there, sorted by them. Raises OSError."""

    def listed(system: Any, root: str) -> list[tuple[tuple[str, ...], RemoteFile]]:
        system.invalidate_cache()  # it would answer with the list of another day
        found = system.find(root, detail=True).items()
        return [
            # A list of links, as over HTTP, tells no sizes: each is asked for then.
            (PurePosixPath(name).relative_to(root).parts, RemoteFile(system.unstrip_protocol(name), _stamp_of(info)))
            for name, info in found
        ]

    return sorted(_call_filesystem(url, listed), key=lambda file: file[0])


def _call_filesystem(url: str, question: Callable[[Any, str], T]) -> T:
    """What the file system of a URL answers. Raises OSError saying what to look after, ImportError for a missing package."""
    from fsspec.core import url_to_fs  # slow to import

    try:
        return question(*url_to_fs(url))  # one object a process: fsspec makes another one after a fork
    except (OSError, ImportError):
        raise
    except Exception as error:  # each file system has errors of its own
        raise OSError(
            f"'{url}' does not answer ({type(error).__name__}: {error}); check the address, and keys as fsspec takes them"
        ) from error


def _stamp_of(info: dict[str, Any]) -> str:
    if info.get("size") is None:
        return ""
    mark = next((info[key] for key in STAMP_KEYS if info.get(key)), "")
    # Lists and single answers may write the same differently.
    return f"{info['size']}-{mark.timestamp() if isinstance(mark, datetime) else str(mark).strip(chr(34))}"


def broken_shard(file: str, what: str) -> BrokenShard:
    """`what` is wrong with the shard, and what to do about it."""
    folder = "SHARDS" if is_url(file) else PurePosixPath(file).parent
    return BrokenShard(
        f"the shard '{file}' {what}; copy it again from where it was made, or make it anew: delete it and type "
        f"beauty-bafe shards pictures=GALLERY output_dir={folder}, with the GALLERY of the first time"
    )


def locate(text: str, folder: str | Path) -> Place:
    """The place that `str` named so; a relative one starts at `folder`."""
    if found := SHARD_MEMBER.fullmatch(text):
        file, member, start, length, crc = found.groups()
        return ShardMember(file if is_url(file) else str(Path(folder) / file), member, int(start), int(length), int(crc, 16))
    if is_url(text) or is_url(folder):
        return RemoteFile(text if is_url(text) else f"{folder}/{text}")
    return Path(folder) / text


def stamp(place: Place) -> str:
    """What changes when a picture has to be read again: its size and time, or that it could not be read at all."""
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
