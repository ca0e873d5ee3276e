"""List what earlier commands have cached, or remove some of it: beauty-bafe cache remove=photos"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import hydra
from omegaconf import DictConfig

from beauty_bafe import cli
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")

KINDS = ("descriptors", "keypoints", "photos", "views", "vocabulary")


class Entry(NamedTuple):
    """One folder or file of a cache. `made`: what it was made from. `days`: since it was last written or used."""

    kind: str
    path: Path
    size: int
    days: float
    made: str


def cache(cfg: DictConfig) -> list[Entry]:
    """List the entries of `cfg.folder`, or remove those of the kind `cfg.remove`; returns the entries listed or removed.

    Raises ValueError for an unknown kind or a negative number of days.
    """
    kinds = KINDS if cfg.remove == "all" else () if cfg.remove is None else (cfg.remove,)
    if unknown := set(kinds).difference(KINDS):
        raise ValueError(f"remove={min(unknown)}: type {', '.join(KINDS)}, or all")
    if cfg.days < 0:
        raise ValueError(f"days={cfg.days}: type 0 or more")
    folder = Path(cfg.folder)
    entries = [entry for entry in find_entries(folder) if entry.days >= cfg.days and (not kinds or entry.kind in kinds)]
    for entry in entries:
        if kinds:
            _remove(entry)
        text = f"{entry.kind:12}{entry.size / 1e6:10.1f} MB  {entry.days:6.1f} days  {entry.path.relative_to(folder)}"
        log.info(text + (f": {entry.made}" if entry.made else ""))
    total = sum(entry.size for entry in entries) / 1e6
    done = "removed" if kinds else "kept"
    log.info(f"{len(entries)} entries, {total:.1f} MB {done} in {folder}")
    return entries


def find_entries(folder: Path) -> Iterator[Entry]:
    """The entries of retrieve.py and train.py in `folder` and its subfolders, without other files."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if found := _recognise(path):
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            stats = [file.stat() for file in files]
            days = (time.time() - max(stat.st_mtime for stat in stats)) / 86400
            yield Entry(found[0], path, sum(stat.st_size for stat in stats), max(days, 0.0), found[1])


def _recognise(path: Path) -> tuple[str, str] | None:
    """Kind of an entry and what it was made from; None for other files and folders."""
    if path.match("vocabulary-*.npy"):
        return "vocabulary", "of VLAD"
    if not path.is_dir() or all(file.name == "lock" for file in path.iterdir()):
        return None
    if (path / "photos.jsonl").is_file():
        return "photos", "catalogue photos and their masks, for training"
    if path.match("rehearsal-*"):
        return "views", "street views of catalogue photos, to learn probabilities and re-ranking weights"
    if (path / "manifest.json").is_file() and (path / "lock").is_file():
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        what = f"{manifest.get('pictures', 0)} pictures"
        if "pooling" in manifest:
            return "descriptors", f"{what} of {manifest.get('source')}, {manifest['pooling']}"
        return "keypoints", what
    return None


def _remove(entry: Entry) -> None:
    from beauty_bafe.manifest import locked

    # The lock is kept, as other runs may be waiting for it; they then find the folder empty.
    with nullcontext() if entry.path.is_file() else locked([entry.path]):
        for path in [entry.path] if entry.path.is_file() else entry.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="cache")
def _run(cfg: DictConfig) -> None:
    cli.run(cache, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "cache", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
