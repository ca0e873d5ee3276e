"""Which first pass the exact index chooses, and how it is kept while the gallery changes and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.index import exact, fastest, vectors
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.fastest import FastestIndex

from .conftest import gathered, names, slow, unit

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("first_pass", ["bfloat16", "float32", "int8"])
def test_answers_do_not_depend_on_the_other_queries(first_pass: str) -> None:
    gallery, queries = gathered(2000, 40, 0), gathered(33, 40, 1)
    index = ExactIndex(device="cpu", first_pass=first_pass).fit(gallery, names(2000))
    together = index.search(queries, names(33), 7)
    for row in range(33):
        alone = index.search(queries[row : row + 1], ("q",), 7)
        assert np.array_equal(alone.positions[0], together.positions[row])
        assert np.array_equal(alone.scores[0], together.scores[row])


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", ["exact", "fastest"])
def test_growth_shrinkage_and_another_process(kind: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "LARGE", 500)
    monkeypatch.setattr(fastest, "SMALL", 500)
    rows, queries = gathered(1200, 40, 0), gathered(20, 40, 1)
    make = {"exact": ExactIndex, "fastest": FastestIndex}[kind]
    index = make(metric, "cpu").fit(rows[:800], names(1200)[:800])
    before = index.clone()
    index.add(rows[800:], names(1200)[800:])
    index.remove(names(1200)[100:300])
    assert "int8, 8 of 40 dimensions first" in str(index)
    index.save(tmp_path, {})
    monkeypatch.setattr(exact, "learn_axes", None)  # what is saved is not made again
    for searched in (index, make(metric, "cpu").load(tmp_path, {})):
        for count in (3, 20):
            ranking = searched.search(queries[:count], names(count), 7)
            kept = np.delete(np.arange(1200), np.arange(100, 300))
            positions, scores = slow(rows[kept], queries[:count], metric, 7)
            assert np.array_equal(ranking.positions, positions)
            assert np.array_equal(ranking.scores, scores)
    assert np.array_equal(before.search(queries, names(20), 7).positions, slow(rows[:800], queries, metric, 7)[0])


def test_codes_of_other_vectors_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = gathered(600, 40, 0), gathered(5, 40, 1)
    ExactIndex("ip", "cpu", "int8").fit(rows, names(600)).save(tmp_path, {})
    codes = {file: file.read_bytes() for file in tmp_path.glob("leading_*.npy")}
    for other in (rows[::-1], rows[:, ::-1], rows[:, :30]):
        ExactIndex("ip", "cpu", "bfloat16").fit(other, names(600)).save(tmp_path, {})
        assert not list(tmp_path.glob("leading_*.npy"))
        for file, content in codes.items():  # as if by a version of the package that does not know them
            file.write_bytes(content)
        index = ExactIndex("ip", "cpu", "int8").load(tmp_path, {})
        asked = queries[:, : other.shape[1]]
        assert np.array_equal(index.search(asked, names(5), 7).positions, slow(other, asked, "ip", 7)[0])


@pytest.mark.parametrize(
    ("draw", "integers", "chosen"),
    [(gathered, True, "int8, 8 of"), (gathered, False, "int8, 8 of"), (unit, True, "int8"), (unit, False, "float")],
)
def test_the_first_pass_is_chosen_by_the_rows(  # type: ignore[no-untyped-def]
    draw, integers: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "LARGE", 500)
    monkeypatch.setattr(vectors, "has_vnni", lambda: integers)

    def named(metric: str, rows: int) -> str:
        return str(ExactIndex(metric, "cpu").fit(draw(rows, 40, 0), names(rows))).replace("bfloat", "float")

    assert f"first pass in {chosen}" in named("ip", 1000)
    assert ("dimensions first" in named("l2", 1000)) == (draw is gathered)
    assert "float" in named("l1", 1000)
    assert "float" in named("ip", 400)


def test_int8_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"index.first_pass=int8 needs index.device=cpu and index.metric=ip or l2; type .*auto"
    ):
        ExactIndex("l1", "cpu", "int8")
    monkeypatch.setattr(exact, "search_device", lambda _: "cuda")
    with pytest.raises(ValueError, match=r"index.first_pass=int8 needs"):
        ExactIndex("ip", "auto", "int8")
