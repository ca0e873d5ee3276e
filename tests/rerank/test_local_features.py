"""Local features of gallery pictures: extracted once, cached on disk, shared by searches, threads and runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from beauty_bafe.data.catalog import Catalog
from beauty_bafe.data.images import Images
from beauty_bafe.data.pictures import letterbox
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.extraction.store import Store
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.rerank import local_features
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.local_features import score_candidates

SEEN: list[int] = []  # the brightness of every picture that was extracted


@dataclass(frozen=True)
class Brightness:
    """An extractor whose feature of picture i of the gallery, all of one grey, is the grey i."""

    size: int = 8

    def key(self) -> dict[str, Any]:
        return {"size": self.size}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> int:
        SEEN.append(int(rgb.mean()))
        return SEEN[-1]

    def pack(self, features: int) -> dict[str, np.ndarray]:
        return {"greys": np.full(features % 3 + 1, features, np.uint8)}  # of several lengths

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> int:
        assert len(set(arrays["greys"])) == 1
        assert len(arrays["greys"]) == arrays["greys"][0] % 3 + 1
        return int(arrays["greys"][0])


def greys(_: int, answers: Sequence[int]) -> np.ndarray:
    return np.array(answers, float)[:, None]


def search(folder: Path, count: int = 12, asked: slice = slice(0, 3), queries: int = 1) -> Candidates:
    """Queries whose answers are the gallery pictures `asked`; the gallery lies in `folder`."""
    paths = [folder / "gallery" / f"{number}.png" for number in range(count)]
    (folder / "gallery").mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            cv2.imwrite(str(path), np.full((8, 8, 3), number, np.uint8))
    gallery = Catalog(tuple(map(str, range(count))), tuple(paths))
    context = SearchContext(gallery, gallery, folder / "features")
    vectors = unit(np.random.default_rng(0).random((count, 8))).astype(np.float32)
    index = ExactIndex(device="cpu").fit(vectors, gallery.ids)
    described = Features(vectors[:queries], gallery.ids[:queries])
    found = Candidates(index.search(described.vectors, described.ids, count), described, index, context)
    return ask(found, asked)


def ask(found: Candidates, asked: slice) -> Candidates:
    positions = np.tile(np.arange(len(found.index))[asked], (len(found.queries.ids), 1))
    return replace(found, ranking=replace(found.ranking, positions=positions, scores=np.zeros(positions.shape)))


def seen(found: Candidates) -> list[int]:
    """The greys of the answers; asserts that they are right, and gives those that had to be extracted."""
    SEEN.clear()
    grey = score_candidates(found, 99, Brightness(), greys)[..., 0]
    np.testing.assert_array_equal(grey, found.ranking.positions)
    return sorted(SEEN)[len(found.queries.ids) :] if found.queries.ids == ("0",) else sorted(SEEN)


def test_a_search_costs_what_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all files of a large gallery nor the store on disk are read again."""
    found = search(tmp_path)
    assert seen(found) == [0, 1, 2]
    stamped: list[Path] = []
    stamp = local_features.stamp

    def count(path: Path) -> str:
        stamped.append(path)
        return stamp(path)

    monkeypatch.setattr(local_features, "stamp", count)
    monkeypatch.setattr(local_features, "Store", lambda *_: pytest.fail("opened again"))
    for asked, expected in ((slice(0, 3), []), (slice(1, 5), [3, 4]), (slice(3, 5), [])):
        stamped.clear()
        assert seen(ask(found, asked)) == expected
        assert len(stamped) == asked.stop - asked.start


def test_runs_that_extend_the_same_gallery_in_turns(tmp_path: Path) -> None:
    first, second = search(tmp_path), search(tmp_path)
    for turn in range(3):
        assert seen(ask(first, slice(0, 4 * turn + 2))) == list(range(4 * turn, 4 * turn + 2))
        assert seen(ask(second, slice(0, 4 * turn + 4))) == list(range(4 * turn + 2, 4 * turn + 4))
    assert seen(search(tmp_path, asked=slice(0, 12))) == [], "a third run finds what both have made"
    smaller = search(tmp_path, count=5, asked=slice(0, 5))
    assert seen(smaller) == [], "its store holds what the gallery still has"
    assert seen(ask(first, slice(0, 10))) == [], "what is mapped stays, whatever other runs do"
    assert seen(search(tmp_path, asked=slice(3, 7))) == [5, 6]


def test_another_gallery_and_a_changed_picture_are_extracted(tmp_path: Path) -> None:
    found = search(tmp_path)
    assert seen(found) == [0, 1, 2]
    path = tmp_path / "gallery" / "1.png"
    path.write_bytes(path.read_bytes() + b" ")
    assert seen(found) == [1]
    assert found.context is not None
    names, paths = found.context.gallery.ids, found.context.gallery.paths
    grown = Catalog((*names[:2], "2"), (*paths[:2], paths[7]))
    changed = replace(found, context=replace(found.context, gallery=grown))
    SEEN.clear()
    assert score_candidates(changed, 3, Brightness(), greys)[0, :, 0].tolist() == [0, 1, 7]


def test_galleries_do_not_push_each_other_out(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    searches = [search(tmp_path / name) for name in ("first", "second")]
    for turn in range(2):
        for found in searches:
            assert found.context is not None
            shared = replace(found.context, folder=tmp_path / "features", cache={})
            assert seen(replace(found, context=shared)) == ([] if turn else [0, 1, 2])


@pytest.mark.parametrize("what", ["MASKS", "PREPROCESSING"])
def test_other_pixels_or_masks_are_extracted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    assert [seen(search(tmp_path)) for _ in range(2)] == [[0, 1, 2], []]
    monkeypatch.setattr(local_features, what, "other")
    assert seen(search(tmp_path)) == [0, 1, 2]


def test_relative_and_resolved_paths_are_one_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """retrieve.py has what is typed; an index_dir, and a gallery that has changed, the resolved paths."""
    found = search(tmp_path)
    assert seen(found) == [0, 1, 2]
    monkeypatch.chdir(tmp_path)
    assert found.context is not None
    relative = Catalog(found.context.gallery.ids, tuple(path.relative_to(tmp_path) for path in found.context.gallery.paths))
    assert seen(replace(found, context=replace(found.context, gallery=relative, cache={}))) == []


def test_threads_extract_a_picture_once(tmp_path: Path) -> None:
    found = search(tmp_path)
    asked = [ask(found, slice(start, start + 6)) for start in [0, 3, 1, 4, 2, 5] * 2]
    SEEN.clear()
    with ThreadPoolExecutor(4) as threads:
        scored = list(threads.map(lambda part: score_candidates(part, 9, Brightness(), greys)[..., 0], asked))
    for part, grey in zip(asked, scored, strict=True):
        np.testing.assert_array_equal(grey, part.ranking.positions)
    assert sorted(SEEN) == sorted([*range(11), *[0] * len(asked)]), "each picture, and each query"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 after two shards and while the third is made; then the same again."""
    monkeypatch.setattr(local_features, "SHARD", 2)
    monkeypatch.setattr(local_features, "default_workers", lambda: 1)
    found = search(tmp_path, asked=slice(0, 12))
    child = os.fork()
    if child == 0:
        append = Store.append

        def die(store: Store, pictures: Any, arrays: Any, unreadable: Any) -> int:
            if next(store.free_shards()) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return append(store, pictures, arrays, unreadable)

        monkeypatch.setattr(Store, "append", die)
        try:
            seen(found)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert seen(search(tmp_path, asked=slice(0, 12))) == list(range(4, 12))
    assert seen(search(tmp_path, asked=slice(0, 12))) == []


@pytest.mark.parametrize("queries", [2, 40])
def test_progress_is_shown_of_long_work_and_to_those_who_want_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, queries: int
) -> None:
    """A service, and a program that imports the package, hear nothing of each search."""
    found = search(tmp_path, count=40, queries=queries)
    seen(found)
    printed = capsys.readouterr().out
    assert printed.count("40 queries with 3 candidates each") == (2 if queries == 40 else 0), "the progress bar, and the speed"
    assert bool(printed) == (queries == 40)
    with caplog.at_level("WARNING", "beauty_bafe"):
        seen(found)
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class Recorder:
    """An extractor whose features are the picture and the mask on a canvas of 64 px; no mask is all 7."""

    size: int = 64

    def key(self) -> dict[str, Any]:
        return {}

    def extract(self, rgb: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        shown = np.full((64, 64), 7, np.uint8) if mask is None else cv2.resize(mask, (64, 64))
        return np.dstack([letterbox(rgb, 64), shown])

    def pack(self, features: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": features}

    def unpack(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.asarray(arrays["features"])


def recorded(found: Candidates, turns: int = 1) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """The features of each query in each rotation, and those of the candidates it was scored with."""
    pairs: list[tuple[np.ndarray, list[np.ndarray]]] = []

    def note(query: np.ndarray, answers: Sequence[np.ndarray]) -> np.ndarray:
        pairs.append((query, list(answers)))
        return np.zeros((len(answers), 1))

    score_candidates(found, 9, Recorder(), note, turns)
    return pairs


def test_gallery_pictures_come_with_the_product_that_stands_before_a_plain_backdrop(tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    packshot = np.full((60, 120, 3), 255, np.uint8)
    cv2.rectangle(packshot, (20, 15), (60, 45), (40, 90, 160), -1)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for number, picture in enumerate((packshot, noise)):
        cv2.imwrite(str(tmp_path / "gallery" / f"{number}.png"), picture)
    ((_, (shown, scene)),) = recorded(search(tmp_path, count=2))
    np.testing.assert_array_equal(scene[..., :3], noise[..., ::-1])
    assert (scene[..., 3] == 7).all(), "no mask"
    mask = shown[..., 3]
    assert mask[26:38, 14:30].min() == 255
    for beside in (mask[:20], mask[44:], mask[:, :6], mask[:, 40:]):
        assert not beside.any(), "beside the product, or above and below the picture"


def test_queries_come_with_their_own_pixels_and_mask_in_every_turn(tmp_path: Path) -> None:
    """Also where descriptors are in another order than the pictures, and some pictures are left out."""
    found = search(tmp_path, count=3, queries=2)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (4, 64, 64, 3), np.uint8)
    masks = rng.integers(0, 255, (2, 64, 64), np.uint8)
    asked = Features(found.queries.vectors, ("d", "b"), masks)
    ranking = replace(found.ranking, query_ids=asked.ids)
    assert found.context is not None
    context = replace(found.context, queries=Images(tuple("abcd"), tuple(pictures)))
    pairs = recorded(replace(found, ranking=ranking, queries=asked, context=context), turns=4)
    expected = [np.dstack([pictures[row], masks[number]]) for number, row in enumerate((3, 1))]
    extracted = {query.tobytes() for query, _ in pairs}
    assert extracted == {np.rot90(picture, turn).tobytes() for picture in expected for turn in range(4)}
    assert len(pairs) == 8
