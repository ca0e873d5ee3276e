"""The gallery's side from pictures to answers, kept for other days."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.extraction.members import load_members
from beauty_bafe.index.base import Index
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem
from beauty_bafe.rerank.candidates import Candidates, reorder
from beauty_bafe.retrieval.ensemble import Concatenation, Fusion
from beauty_bafe.versions import Versions

from ..shop import Shop


@pytest.fixture(params=["concat", "fusion"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> Shop:
    if request.param == "concat":
        return Shop(tmp_path, toy, tiny_checkpoint, Concatenation, zscore=True, weights=None, pca=8, whiten=True)
    return Shop(tmp_path, toy, tiny_checkpoint, Fusion, method="rank", weights=None, depth=20)


def test_one_query_a_year_later_without_the_gallery(shop: Shop) -> None:
    today = shop.answer()
    shutil.rmtree(shop.root / "gallery")
    shutil.rmtree(shop.root / "features")
    later = shop.answer(gallery=False)
    assert later.answers(0) == today.answers(0)
    np.testing.assert_allclose(later.scores, today.scores, atol=1e-6)


def test_a_changed_catalogue_changes_the_kept_index(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    first = shop.answer()
    best = first.answers(0)[0]
    (shop.root / "gallery" / f"{best}.jpg").unlink()
    shutil.copy(shop.query, shop.root / "gallery" / "the_query_itself.jpg")
    second = shop.answer()
    assert "1 removed, 1 added, 47 kept, ensemble as first learned" in capsys.readouterr().out
    assert second.answers(0)[0] == "the_query_itself"
    assert best not in second.answers(0)
    assert shop.answer(gallery=False).answers(0) == second.answers(0)


def test_what_is_kept_is_refused_to_others(shop: Shop) -> None:
    shop.answer()
    shop.members = shop.members[:1]
    with pytest.raises(ValueError, match=r"made with members=.*; type another index_dir"):
        shop.answer()


def test_queries_are_described_like_the_gallery(shop: Shop) -> None:
    shop.answer()
    shop.extraction.flip = True
    with pytest.raises(ValueError, match="made with flip=False, now it is flip=True; type another index_dir"):
        shop.answer(gallery=False)


def test_nothing_kept_and_no_gallery(shop: Shop) -> None:
    with pytest.raises(ValueError, match="holds no index yet; type gallery=DIR_OR_CSV"):
        shop.answer(gallery=False)


def test_more_answers_than_pictures(shop: Shop) -> None:
    with pytest.raises(ValueError, match=r"k=49, but the gallery has 48 readable pictures"):
        shop.answer(kept=False, k=49)
    if shop.kind is Concatenation:
        assert len(set(shop.answer(kept=False, k=48).answers(0))) == 48


class FirstThree:
    """A re-ranker that keeps three answers."""

    depth = 3

    def __call__(self, candidates: Candidates) -> Candidates:
        return reorder(candidates, candidates.ranking.scores[:, :3])


def test_fusion_of_re_rankers_less_deep_than_k_says_what_to_raise(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    gallery = Shop(tmp_path, toy, tiny_checkpoint, Fusion, method="score", weights=None, depth=20).open(kept=False)
    gallery.steps = [[FirstThree()] for _ in gallery.indexes]
    queries = from_folder(toy / "queries").subset([0, 1])
    described = gallery.describe(queries, "queries", "queries", Skipped())
    assert gallery.answer(queries, described, 3).positions.shape == (2, 3)
    with pytest.raises(ValueError, match=r"k=7, but re-ranking or fusion kept 3 answers; raise their depth"):
        gallery.answer(queries, described, 7)


def test_twelve_fused_members_keep_their_vectors(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    """As text, view10 comes before view2."""
    shop = Shop(tmp_path, toy, tiny_checkpoint, Fusion, method="rank", weights=None, depth=20)
    powers = [Pooling(partial(gem, p=float(p)), saliency=False) for p in range(1, 13)]
    shop.members = load_members(str(tiny_checkpoint), dict(enumerate(powers)))
    built = shop.open()
    for gallery in (True, False):
        kept = shop.open(gallery=gallery)
        for index, expected in zip(kept.indexes, built.indexes, strict=True):
            assert np.array_equal(index.get(index.ids), expected.get(index.ids))


def test_an_index_that_has_no_array_of_its_vectors(shop: Shop, index_by_id: type[Index]) -> None:
    """A database: built, kept, changed by what changed, and asked again, it gives the answers of one in memory."""

    def answers(index: Callable[[], Index]) -> list[list[str]]:
        shop.index = index
        first = shop.answer().answers(0)
        picture = shop.root / "gallery" / f"{first[0]}.jpg"
        picture.rename(shop.root / "away.jpg")
        later = shop.answer().answers(0)
        kept = shop.answer(gallery=False).answers(0)
        (shop.root / "away.jpg").rename(picture)
        shutil.rmtree(shop.root / "index")
        return [first, later, kept]

    expected = answers(shop.index)
    assert answers(index_by_id) == expected
    assert expected[0] != expected[1] == expected[2]
    assert shop.open().costs()["dimensions"] == (8 if shop.kind is Concatenation else 512)


def test_an_unchanged_catalogue_rewrites_nothing(shop: Shop) -> None:
    shop.open()
    before = shop.files()
    shop.open()
    assert shop.files() == before


def test_pictures_that_moved_are_found_again(shop: Shop) -> None:
    shop.open()
    (shop.root / "gallery").rename(shop.root / "moved")
    (shop.root / "gallery").symlink_to(shop.root / "moved")
    shop.open()
    assert all(path.is_file() for path in shop.open(gallery=False).catalog.paths)


def test_a_reader_never_sees_half_an_index(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a changed catalogue is written, and after the writer died on the way."""
    before = shop.answer()
    save, read = ExactIndex.save, []

    def read_meanwhile(index: ExactIndex, folder: Path, about: dict[str, object]) -> None:
        read.append(shop.answer(gallery=False))
        save(index, folder, about)
        read.append(shop.answer(gallery=False))
        raise KeyboardInterrupt

    (shop.root / "gallery" / f"{before.answers(0)[0]}.jpg").unlink()
    monkeypatch.setattr(ExactIndex, "save", read_meanwhile)
    with pytest.raises(KeyboardInterrupt):
        shop.open()
    monkeypatch.undo()
    read.append(shop.answer(gallery=False))
    assert [ranking.answers(0) for ranking in read] == [before.answers(0)] * 3
    assert shop.answer().answers(0) == shop.answer(gallery=False).answers(0) != before.answers(0)


def test_two_runs_at_once_on_one_index(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    expected = shop.open(kept=False)
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(shop.open) for _ in range(3)]
        for run in runs:
            for index, alone in zip(run.result().indexes, expected.indexes, strict=True):
                assert np.array_equal(index.get(index.ids), alone.get(index.ids))
    printed = capsys.readouterr().out
    assert printed.count(", built in") == 2, "once without a folder, once for all three"
    assert printed.count("0 removed, 0 added, 48 kept") == 2


def test_a_version_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.write(lambda place: (place / "a.txt").write_text("old"))

    def read(place: Path) -> str:
        if place.name == "000001":
            versions.write(lambda place: (place / "a.txt").write_text("new"))
        return (place / "a.txt").read_text()

    assert versions.read(read) == "new"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000002", "current"]
    with pytest.raises(FileNotFoundError):
        versions.read(lambda place: (place / "b.txt").read_text())
    with pytest.raises(ValueError, match="holds nothing yet"):
        Versions(tmp_path / "nowhere").read(read)
