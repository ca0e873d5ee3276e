"""Pictures behind URLs: the same catalogue, pixels and descriptors as in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from beauty_bafe.data.catalog import Skipped, from_folder, from_shards, open_catalog
from beauty_bafe.data.pictures import UnreadablePicture, read_picture
from beauty_bafe.data.places import BrokenShard, Place, RemoteFile, is_url, stamp
from beauty_bafe.data.shards import make_shards
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import spoc
from beauty_bafe.retriever import Retriever


@pytest.fixture
def folder(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number, name in enumerate(("a.b.jpg", "a/z é#?%20.png", "c.PNG", ".hidden/x.jpg", "d/.x.jpg", "a/e.webp", "日本.jpg")):
        write_picture(f"shop/{name}", (40 + number, 50), seed=number)
    (tmp_path / "shop" / "notes.txt").write_text("no picture")
    return tmp_path / "shop"


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A file system in this process's memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, folder: Path, bucket: Any) -> str:
    """The pictures of `folder` once more."""
    if request.param == "file":
        return f"file://{folder}"
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    return "memory://bucket/shop"


def pixels(place: Place) -> int:
    return int(read_picture(place, 20).rgb.astype(int).sum())


def test_a_url_is_the_folder_it_names(folder: Path, url: str) -> None:
    loose, found = from_folder(folder), open_catalog(url)
    assert found.ids == loose.ids
    assert [place.read_bytes() for place in found.paths] == [path.read_bytes() for path in loose.paths]
    assert [pixels(place) for place in found.paths] == [pixels(path) for path in loose.paths]
    assert found.fingerprint() == loose.fingerprint()
    assert open_catalog(f"{url}/") == found
    assert all(is_url(str(place)) and RemoteFile(str(place)).stamp() == place.stamp() for place in found.paths)


def test_what_lies_at_a_url_is_asked_for_once(bucket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket answers in tens of milliseconds, and there are millions of pictures."""
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    listed = open_catalog("memory://bucket/shop").paths[0]
    alone = RemoteFile(str(listed))
    before = stamp(alone)
    monkeypatch.setattr(type(bucket), "info", None)
    assert stamp(listed) == stamp(alone) == before


def test_a_list_without_sizes(folder: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of links, over HTTP."""
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    whole = open_catalog("memory://bucket/shop")
    names = {name: {"name": name, "size": None} for name in bucket.find("/bucket/shop")}
    monkeypatch.setattr(type(bucket), "find", lambda *_, **__: names)
    bare = open_catalog("memory://bucket/shop")
    assert [stamp(place) for place in bare.paths] == [stamp(place) for place in whole.paths]
    assert bare.fingerprint() == whole.fingerprint()


def test_a_picture_that_changed_has_another_stamp(url: str) -> None:
    before = open_catalog(url).paths[0]
    system, path = fsspec.url_to_fs(str(before))
    system.pipe_file(path, before.read_bytes()[::-1])
    if url.startswith("file"):
        os.utime(path, (1, 1))
    after = open_catalog(url).paths[0]
    assert after == before
    assert stamp(after) != stamp(before)
    system.rm(path)
    assert stamp(RemoteFile(str(before))) == "missing"
    with pytest.raises(UnreadablePicture, match="no such file"):
        read_picture(before)


def test_lists_of_pictures(bucket: Any, folder: Path, tmp_path: Path) -> None:
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    text = "id,path\n1,shop/a.b.jpg\n2,memory://bucket/shop/c.PNG\n"
    bucket.pipe_file("/bucket/list.csv", text.encode("utf-8-sig"))
    expected = [(folder / name).read_bytes() for name in ("a.b.jpg", "c.PNG")]
    assert [place.read_bytes() for place in open_catalog("memory://bucket/list.csv").paths] == expected
    (tmp_path / "list.csv").write_text(text)
    assert [place.read_bytes() for place in open_catalog(tmp_path / "list.csv").paths] == expected


def test_shards_in_a_bucket(folder: Path, tmp_path: Path, bucket: Any) -> None:
    loose = from_folder(folder)
    make_shards(loose.ids, loose.paths, tmp_path / "shards", 2)
    bucket.put(f"{tmp_path / 'shards'}/", "/bucket/shards/", recursive=True)
    for packed in (open_catalog("memory://bucket/shards"), from_shards(f"file://{tmp_path / 'shards'}")):
        assert packed.ids == loose.ids
        assert [pixels(place) for place in packed.paths] == [pixels(path) for path in loose.paths]
        assert packed.fingerprint() == loose.fingerprint()
    bucket.pipe_file("/bucket/shards/photos-000001.tar", b"")
    with pytest.raises(BrokenShard, match=r"'memory://bucket/shards/photos-000001.tar' has 0 bytes.* output_dir=SHARDS"):
        open_catalog("memory://bucket/shards")
    bucket.rm("/bucket/shards/photos-000001.tar")
    with pytest.raises(BrokenShard, match="is missing"):
        open_catalog("memory://bucket/shards")
    with pytest.raises(ValueError, match=r"'memory://bucket/shop' contains no shards, .* output_dir=SHARDS and copy it there"):
        from_shards("memory://bucket/shop")


def test_processes_read_what_their_parent_opened(folder: Path, url: str) -> None:
    places = open_catalog(url).paths
    with ProcessPoolExecutor(2, get_context("fork")) as processes:
        assert list(processes.map(pixels, places * 5)) == [pixels(place) for place in places] * 5


def describe(store: Path, source: str, checkpoint: Path) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
    members, skipped = load_members(str(checkpoint), {"spoc": Pooling(spoc, saliency=False)}), Skipped()
    extraction = FeatureExtraction(store, device="cpu", precision="32-true", num_workers=0, max_skipped=0.5)
    return extraction(members, open_catalog(source), source, "pictures", skipped)[0].vectors, skipped.rows


def test_descriptors_are_those_of_the_files(
    folder: Path, bucket: Any, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    expected, rows = describe(tmp_path / "store", str(folder), tiny_checkpoint)
    found, remote = describe(tmp_path / "store", "memory://bucket/shop", tiny_checkpoint)
    assert np.array_equal(found, expected)
    assert [row[::2] for row in remote] == [row[::2] for row in rows] == [("broken", rows[0][2])]
    kept = sorted(file for file in (tmp_path / "store").rglob("*.safetensors"))
    assert len(kept) == 2
    monkeypatch.chdir(folder)
    found, _ = describe(tmp_path / "store", "memory://bucket/shop", tiny_checkpoint)
    assert sorted(file for file in (tmp_path / "store").rglob("*.safetensors")) == kept, "found again from anywhere"
    bucket.pipe_file("/bucket/shop/a.b.jpg", (folder / "c.PNG").read_bytes())
    found, _ = describe(tmp_path / "store", "memory://bucket/shop", tiny_checkpoint)
    rows_of = dict(zip(from_folder(folder).subset([0, 1, 2, 4, 5]).ids, found, strict=False))
    assert np.abs(rows_of["a.b"] - rows_of["c"]).max() < 1e-6


def test_a_retriever_remembers_urls(folder: Path, bucket: Any, tmp_path: Path, tiny_checkpoint: Path) -> None:
    bucket.put(f"{folder}/", "/bucket/shop/", recursive=True)
    shop = Retriever.build(tiny_checkpoint, "memory://bucket/shop", ["device=cpu", "precision=32-true", "rehearsal.views=0"])
    shop.save(tmp_path / "kept")
    kept = Retriever.load(tmp_path / "kept")
    assert kept.search([folder / "日本.jpg"], k=1)[0][0].id == "日本"
    assert pixels(kept.path("c")) == pixels(folder / "c.PNG")


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("memory://bucket/none", ValueError, r"no pictures under 'memory://bucket/none'; supported suffixes: .*\.jpg"),
        (
            "s4://bucket/shop",
            OSError,
            r"'s4://bucket/shop' does not respond \(ValueError: Protocol not known: s4.*\); check the a",
        ),
    ],
)
def test_urls_that_lead_nowhere(bucket: Any, url: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_catalog(url)


def test_errors_of_a_file_system_say_what_to_check(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_: object, **__: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(bucket), "find", find)
    with pytest.raises(
        OSError, match=r"'memory://bucket' does not respond \(RuntimeError: no credentials\); .*credentials for fsspec"
    ):
        open_catalog("memory://bucket")
