"""Photos decoded once: the same as from their files, after a kill and after a change."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.data.catalog import Catalog, from_folder
from beauty_bafe.data.photos import LoadResult, PhotoCache, inspect_photo, load_photo


class Inspector:
    """Inspects photos one by one, counts them, and dies when told to."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.seen = after, [""] * 0

    def __call__(self, catalog: Catalog) -> Iterable[LoadResult]:
        for name, path in zip(catalog.ids, catalog.paths, strict=True):
            if len(self.seen) == self.after:
                raise KeyboardInterrupt
            self.seen.append(name)
            yield inspect_photo(path, 64)


@pytest.fixture
def shop(toy: Path, tmp_path: Path) -> Catalog:
    (tmp_path / "shop").mkdir()
    for file in sorted((toy / "gallery").iterdir())[:6]:
        (tmp_path / "shop" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "shop" / "broken.jpg").write_bytes(b"no picture")
    return from_folder(tmp_path / "shop")


def test_cached_photos_are_the_files(shop: Catalog, tmp_path: Path) -> None:
    cache, inspect = PhotoCache(tmp_path / "cache", 64), Inspector()
    results = cache.fill(shop, inspect)
    assert [name for name, found in zip(shop.ids, results, strict=True) if found.unreadable] == ["broken"]
    for path, found in zip(shop.paths, results, strict=True):
        if not found.reason:
            for one, other in zip(cache(path), load_photo(path, 64), strict=True):
                assert np.array_equal(one, other)
                assert one.flags.writeable
    again, idle = PhotoCache(tmp_path / "cache", 64), Inspector(0)
    assert [found[:2] for found in again.fill(shop, idle)] == [found[:2] for found in results], "nothing is inspected twice"


def test_a_file_with_two_ids_takes_one_row(shop: Catalog, tmp_path: Path) -> None:
    double = Catalog(("one", "two", "three"), (shop.paths[1], shop.paths[1], shop.paths[2]))
    cache = PhotoCache(tmp_path / "cache", 64)
    assert len(cache.fill(double, Inspector())) == 3
    for path in double.paths:
        assert np.array_equal(cache(path).photo, load_photo(path, 64).photo)
    assert cache.pixels.stat().st_size == 2 * 64 * 64 * 4


def test_a_killed_run_goes_on(shop: Catalog, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        PhotoCache(tmp_path / "cache", 64).fill(shop, Inspector(4))
    cache, rest = PhotoCache(tmp_path / "cache", 64), Inspector()
    with cache.list.open("ab") as lines:
        lines.write(b'["cut sh')  # the kill came while a line was written
    cache.fill(shop, rest)
    assert rest.seen == list(shop.ids[4:])
    assert np.array_equal(cache(shop.paths[5]).photo, load_photo(shop.paths[5], 64).photo)
    assert np.array_equal(PhotoCache(tmp_path / "cache", 64).fill(shop, Inspector(0)), cache.fill(shop, Inspector(0)))


def test_pixels_that_were_cut_off_are_noticed(shop: Catalog, tmp_path: Path) -> None:
    cache = PhotoCache(tmp_path / "cache", 64)
    cache.fill(shop, Inspector())
    os.truncate(cache.pixels, cache.pixels.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"photos\.u8' is too short for the \d+ photos that photos\.jsonl lists.*delete"):
        PhotoCache(tmp_path / "cache", 64).fill(shop, Inspector())
    cache.pixels.unlink()
    with pytest.raises(ValueError, match="too short"):
        PhotoCache(tmp_path / "cache", 64).fill(shop, Inspector())


def test_a_full_disk_says_what_to_type(shop: Catalog, tmp_path: Path) -> None:
    cache = PhotoCache(tmp_path / "cache", 64)
    cache.folder.mkdir(parents=True)
    cache.pixels.symlink_to("/dev/full")  # takes nothing
    with pytest.raises(OSError, match=r"could not write '.*cache.*'.*data.cache=null"):
        cache.fill(shop, Inspector())


def test_a_changed_photo_is_inspected_again(shop: Catalog, tmp_path: Path) -> None:
    cache = PhotoCache(tmp_path / "cache", 64)
    cache.fill(shop, Inspector())
    shop.paths[2].write_bytes(shop.paths[3].read_bytes())
    os.utime(shop.paths[2], (1, 1))
    with pytest.raises(ValueError, match="changed during training"):
        cache(shop.paths[2])
    inspect = Inspector()
    cache.fill(shop, inspect)
    assert inspect.seen == [shop.ids[2]]
    assert np.array_equal(cache(shop.paths[2]).photo, cache(shop.paths[3]).photo)
