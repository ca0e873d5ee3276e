"""Pictures packed into shards: numbered tar files in webdataset's format, each with a listing of its members' positions.

Picture n of the catalogue is the member n.jpg (the unchanged bytes and suffix of its file), and n.json contains its id.
webdataset itself reads shards as streams, so that the order depends on the number of workers and samples are not determined
by (seed, epoch, index); with the listings, pictures are accessed at random, and training samples are the same as from files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import track

from ..manifest import locked, replace_file
from .pictures import SUFFIXES
from .places import BrokenShard, Place, ShardMember, broken_shard, is_url, list_files, locate, stamp
from .workers import default_workers

INDEX = "shards.json"  # written when all shards are complete


def read_shards(folder: str | Path) -> tuple[list[str], list[ShardMember]]:
    """Ids and locations of the pictures in a folder or URL of shards. Raises ValueError if it has none, or BrokenShard."""
    if is_url(folder):
        there = {place.name: place.size for _, place in list_files(folder)}
    else:
        there = {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if Path(folder).is_dir() else {}
    if INDEX not in there:
        raise ValueError(
            f"'{folder}' contains no shards, or is incomplete; type beauty-bafe shards pictures=GALLERY output_dir="
            + ("SHARDS and copy it there" if is_url(folder) else str(folder))
        )
    ids: list[str] = []
    places: list[ShardMember] = []
    for number in range(json.loads(locate(INDEX, folder).read_bytes())["shards"]):
        tar, listing = (locate(name, folder) for name in _names(number))
        for file in (tar, listing):
            if file.name not in there:
                raise broken_shard(str(file), "is missing")
        listed = json.loads(listing.read_bytes())
        if there[tar.name] != listed["bytes"]:
            raise broken_shard(str(tar), f"has {there[tar.name]} bytes instead of {listed['bytes']}")
        archive = str(tar)  # one string shared by all of its pictures
        for name, _, *where in listed["pictures"]:
            ids.append(name)
            places.append(ShardMember(archive, *where))
    return ids, places


def make_shards(ids: Sequence[str], places: Sequence[Place], folder: Path, each: int) -> dict[int, str]:
    """Copy pictures into shards of `each` pictures in `folder`; returns the reasons of unreadable pictures, by number.

    Complete shards whose pictures have not changed are kept: after a kill or a change of the catalogue, only the others are
    written. Raises OSError if the disk is full.
    """

    def make(number: int) -> dict[int, str]:
        rows = range(number * each, min((number + 1) * each, len(ids)))
        wanted = [[ids[row], stamp(places[row])] for row in rows]
        tar, listing = (folder / name for name in _names(number))
        if _read_listing(tar, listing) == wanted:
            return {}
        (folder / INDEX).unlink(missing_ok=True)  # until all shards are consistent again
        pictures: list[list[Any]] = []
        reasons: dict[int, str] = {}

        def write(part: Path) -> None:
            with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive:
                for row, about in zip(rows, wanted, strict=True):
                    try:
                        content = places[row].read_bytes()
                    except BrokenShard:
                        raise
                    except OSError as error:
                        missing = isinstance(error, FileNotFoundError)
                        reasons[row] = "no such file" if missing else f"{type(error).__name__}: {error}"
                        continue
                    suffix = Path(places[row].name).suffix.lower()
                    name = f"{row:09d}{suffix if suffix in SUFFIXES else '.bin'}"
                    start = _add(archive, name, content)
                    _add(archive, f"{row:09d}.json", json.dumps({"id": ids[row]}).encode())
                    pictures.append([*about, name, start, len(content), zlib.crc32(content)])

        replace_file(tar, write)
        text = json.dumps({"bytes": tar.stat().st_size, "pictures": pictures})
        replace_file(listing, lambda part: part.write_text(text, encoding="utf-8"))
        return reasons

    numbers = range(-(-len(ids) // each))
    left_out: dict[int, str] = {}
    with locked([folder]):
        for leftover in folder.glob("*.part"):  # of a run that was killed
            leftover.unlink()
        with ThreadPoolExecutor(default_workers()) as threads:
            for reasons in track(threads.map(make, numbers), f"packing {len(ids)} pictures", total=len(numbers)):
                left_out |= reasons
        text = json.dumps({"shards": len(numbers), "pictures": len(ids) - len(left_out)})
        replace_file(folder / INDEX, lambda part: part.write_text(text + "\n", encoding="utf-8"))
        surplus = len(numbers)  # from a larger catalogue, or smaller shards
        while files := [folder / name for name in _names(surplus) if (folder / name).exists()]:
            for file in files:
                file.unlink()
            surplus += 1
    return left_out


def _names(number: int) -> tuple[str, str]:
    """File names of a shard and its listing."""
    return f"photos-{number:06d}.tar", f"photos-{number:06d}.json"


def _read_listing(tar: Path, listing: Path) -> list[list[str]] | None:
    """Id and stamp of each picture of a shard; None if the shard is not complete."""
    try:
        listed = json.loads(listing.read_bytes())
        return [picture[:2] for picture in listed["pictures"]] if tar.stat().st_size == listed["bytes"] else None
    except (OSError, ValueError):
        return None


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member, deterministically for the same content; returns the offset of the content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    return archive.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
