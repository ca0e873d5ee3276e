"""Where a picture lies: in a file of its own, or elsewhere."""

from __future__ import annotations

import os
import re
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

PACKED = re.compile(r"(.+)/([^/]+)#(\d+)\+(\d+)=([0-9a-f]{8})")  # as `str` of a Packed


class Elsewhere(ABC):
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


Place = Path | Elsewhere


class BrokenShard(OSError):
    """A shard that is not there, or not as its list says; the message says what to type."""


@dataclass(frozen=True, slots=True)
class Packed(Elsewhere):
    """`member` of the tar file `file`: `length` bytes from `start`, whose checksum `crc` (CRC-32) every reading compares.

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
        """See Elsewhere. Raises BrokenShard."""
        try:
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

    def resolve(self) -> Packed:
        return replace(self, file=os.path.abspath(self.file))

    @property
    def name(self) -> str:
        return self.member


def broken_shard(file: str, what: str) -> BrokenShard:
    """`what` is wrong with the shard, and what to do about it."""
    folder = PurePosixPath(file).parent
    return BrokenShard(
        f"the shard '{file}' {what}; copy it again from where it was made, or make it anew: delete it and type "
        f"beauty-bafe shards pictures=GALLERY output_dir={folder}, with the GALLERY of the first time"
    )


def locate(text: str, folder: Path) -> Place:
    """The place that `str` named so; a relative one starts at `folder`."""
    if found := PACKED.fullmatch(text):
        file, member, start, length, crc = found.groups()
        return Packed(str(folder / file), member, int(start), int(length), int(crc, 16))
    return folder / text


def stamp(place: Place) -> str:
    """What changes when a picture has to be read again: its size and time, or that it could not be read at all."""
    if isinstance(place, Elsewhere):
        return place.stamp()
    try:
        status = os.stat(place)
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}" if os.access(place, os.R_OK) else "no access"


def size_of(place: Place) -> int:
    """Bytes of the encoded picture. Raises OSError."""
    return place.size if isinstance(place, Elsewhere) else os.stat(place).st_size
