"""Pictures that cannot be read, for good or this time only, and what the stores remember of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.data import catalog
from beauty_bafe.data.catalog import Skipped
from beauty_bafe.data.pictures import UnreadablePicture, read_picture
from beauty_bafe.extraction.features import Features

from .conftest import ATTENTION, GEM


def unreadable(folder: Path) -> dict[str, str]:
    """One file of every kind that cannot be read; file name to reason."""
    Image.effect_noise((200, 200), 80).convert("RGB").save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    kinds = {"cut.jpg": data[: len(data) // 2], "empty.jpg": b"", "text.png": b"hello", "header.gif": b"GIF89a"}
    for name, content in kinds.items():
        (folder / name).write_bytes(content)
    Image.new("1", (30_000, 30_000)).save(folder / "vast.png")
    (folder / "dangling.jpg").symlink_to(folder / "nothing.jpg")
    return {
        "cut": "truncated",
        "empty": "cannot identify",
        "text": "cannot identify",
        "header": "",
        "vast": "is over",
        "dangling": "no such file",
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unreadable_kind_inside_a_gallery_of_many(
    toy: Path, tmp_path: Path, describe: Callable[..., list[Features]], workers: int
) -> None:
    shutil.copytree(toy / "gallery", tmp_path / "many")
    reasons = unreadable(tmp_path / "many")
    skipped = Skipped()
    (features,) = describe(tmp_path / "many", skipped=skipped, num_workers=workers, shard=10)
    assert {row[0] for row in skipped.rows} == set(reasons)
    for name, _, reason in skipped.rows:
        assert reasons[name] in reason, (name, reason)
    (clean,) = describe(toy / "gallery", store="clean")
    rows = [features.ids.index(name) for name in clean.ids]
    assert rows == sorted(rows)
    np.testing.assert_allclose(features.vectors[rows], clean.vectors, atol=1e-5)
    again = Skipped()
    describe(tmp_path / "many", skipped=again)
    assert again.rows == skipped.rows, "remembered, with the reason"


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the picture of this name give a read error, as a network drive does; of no name, let all be read again."""

    def fail(name: str) -> None:
        def read(path: Path, size: int) -> object:
            if path.stem == name:
                raise UnreadablePicture("OSError: [Errno 5] Input/output error")
            return read_picture(path, size)

        monkeypatch.setattr(catalog, "read_picture", read)

    return fail


def test_a_read_error_that_passes_is_not_remembered(
    folder: Path, describe: Callable[..., list[Features]], fail: Callable[[str], None]
) -> None:
    fail("p1")
    skipped = Skipped()
    (without,) = describe(folder, skipped=skipped)
    assert [row[0] for row in skipped.rows] == ["p1", "p3"]
    fail("")
    skipped = Skipped()
    for _ in range(2):  # the second time from disk
        (after,) = describe(folder, skipped=skipped)
        assert after.ids == ("p0", "p1", "p2", "p4", "p5", "p6")
    assert {row[0] for row in skipped.rows} == {"p3"}
    (folder / "p0.jpg").unlink()  # rows of the store are dropped, and with them the old note
    (dropped,) = describe(folder)
    assert np.array_equal(dropped.vectors, after.vectors[1:])
    assert not np.array_equal(without.vectors[1], after.vectors[1])


@pytest.mark.parametrize("failing", [True, False])
def test_stores_that_disagree_on_what_can_be_read(
    folder: Path, describe: Callable[..., list[Features]], fail: Callable[[str], None], failing: bool
) -> None:
    """One pooling's store has the picture, the other's does not: both have a row, or neither."""
    describe(folder, GEM)
    fail("p1")
    describe(folder, ATTENTION)
    fail("p1" if failing else "")
    skipped = Skipped()
    for poolings in ((ATTENTION, GEM), (GEM, ATTENTION)):
        one, other = describe(folder, *poolings, skipped=skipped)
        assert one.ids == other.ids
        assert ("p1" in one.ids) is not failing
    assert {row[0] for row in skipped.rows} == ({"p1", "p3"} if failing else {"p3"})


def test_too_many_unreadable_pictures_stop(folder: Path, describe: Callable[..., list[Features]]) -> None:
    with pytest.raises(ValueError, match=r"1 of 7 pictures cannot be read, more than max_skipped=0.1 allows"):
        describe(folder, max_skipped=0.1)


def test_a_folder_of_broken_files_stops(tmp_path: Path, describe: Callable[..., list[Features]]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 pictures can be read; the first: .*a.jpg: .*cannot identify"):
        describe(tmp_path / "broken")
