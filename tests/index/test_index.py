"""Every index against comparing everything with everything in float64; growth, shrinkage, saving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.index import fastest
from beauty_bafe.index.base import Index
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.faiss_index import FaissIndex
from beauty_bafe.index.fastest import FastestIndex

from .conftest import names, slow, unit

METRICS = ["ip", "l2", "l1"]
FACTORIES = ["Flat", "IVF{lists},Flat", "HNSW32", "IVF{lists},PQ{bytes}np"]


def build(kind: str, metric: str = "ip") -> Index:
    own = {"exact": ExactIndex, "fastest": FastestIndex}
    return own[kind](metric, "cpu") if kind in own else FaissIndex(kind, metric, "cpu")


@pytest.mark.parametrize("index", [ExactIndex(device="cpu", first_pass="bfloat16"), FaissIndex("Flat", device="cpu")])
def test_equal_scores_keep_the_gallerys_order(index: Index) -> None:
    gallery = np.concatenate([unit(2, 8, 0)] * 50)
    ranking = index.fit(gallery, names(100)).search(gallery[:2], ("a", "b"), 50)
    assert ranking.positions.tolist() == [list(range(0, 100, 2)), list(range(1, 100, 2))]


@pytest.mark.parametrize("metric", METRICS)
def test_the_fastest_index_says_which_it_is(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "SMALL", 4000)
    gallery, queries, ids = unit(300, 16, 0), unit(20, 16, 1), names(300)
    index = build("fastest", metric).fit(gallery[:200], ids[:200])
    assert str(index) == f"faiss Flat {metric} on cpu, the fastest (0.0 million numbers, below 0.0)"
    index.add(gallery[200:], ids[200:])
    assert str(index).startswith(f"exact {metric} on cpu")
    assert np.array_equal(index.search(queries, names(20), 7).positions, slow(gallery, queries, metric, 7)[0])
    index.remove(ids[250:])
    assert str(index).startswith(f"exact {metric} on cpu"), "250 x 16 numbers are not below 4000"
    assert np.array_equal(index.search(queries, names(20), 7).positions, slow(gallery[:250], queries, metric, 7)[0])
    index.remove(ids[100:250])
    assert str(index).startswith(f"faiss Flat {metric}")
    assert np.array_equal(index.search(queries, names(20), 7).positions, slow(gallery[:100], queries, metric, 7)[0])


@pytest.mark.parametrize("metric", METRICS)
def test_faiss_flat_agrees(metric: str) -> None:
    gallery, queries = unit(300, 16, 0), unit(20, 16, 1)
    ranking = build("Flat", metric).fit(gallery, names(300)).search(queries, names(20), 7)
    positions, scores = slow(gallery, queries, metric, 7)
    assert np.array_equal(ranking.positions, positions)
    np.testing.assert_allclose(ranking.scores, scores, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "fastest", *FACTORIES])
def test_growth_shrinkage_and_a_year_on_disk(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gallery, queries, ids = unit(600, 16, 0), unit(9, 16, 1), names(600)
    index = build(kind).fit(gallery[:500], ids[:500])
    index.add(gallery[500:], ids[500:])
    index.remove(ids[10:200:3])
    kept = [row for row in range(600) if ids[row] not in set(ids[10:200:3])]
    assert index.ids == tuple(ids[row] for row in kept)
    assert np.array_equal(index.get(index.ids), gallery[kept])
    ranking = index.search(queries, names(9), 20)
    if kind in ("exact", "fastest", "Flat"):
        assert np.array_equal(ranking.positions, slow(gallery[kept], queries, "ip", 20)[0])
    else:
        true = slow(gallery[kept], queries, "ip", 20)[0]
        found = [len(set(a) & set(b)) for a, b in zip(ranking.positions, true, strict=True)]
        assert np.mean(found) > 4, "an approximate answer, but of the right rows: by chance it would be one in 27"
    index.save(tmp_path, {"members": ["a"]})
    loaded = build(kind).load(tmp_path, {"members": ["a"]})
    assert loaded.ids == index.ids
    assert np.array_equal(loaded.search(queries, names(9), 20).positions, ranking.positions)
    loaded.add(unit(1, 16, 7), ("new",))
    assert loaded.search(unit(1, 16, 7), ("q",), 1).answers(0) == ["new"]
    assert "WARNING" not in capfd.readouterr().err, "small galleries are fine"


@pytest.mark.parametrize("kind", ["exact", "fastest", *FACTORIES])
def test_a_clone_changes_alone(kind: str) -> None:
    gallery, queries, ids = unit(600, 16, 0), unit(9, 16, 1), names(600)
    index = build(kind).fit(gallery[:500], ids[:500])
    before = index.search(queries, names(9), 20)
    twin = index.clone()
    twin.add(gallery[500:], ids[500:])
    twin.remove(ids[:200])
    after = index.search(queries, names(9), 20)
    assert index.ids == ids[:500]
    assert np.array_equal(before.positions, after.positions)
    assert np.array_equal(before.scores, after.scores)
    assert twin.ids == ids[200:]
    assert twin.search(gallery[550:551], ("q",), 1).answers(0) == [ids[550]]


@pytest.mark.parametrize("kind", ["exact", "fastest", "Flat", "IVF{lists},Flat"])
def test_vectors_by_id(kind: str, tmp_path: Path) -> None:
    """Also after rows were added and removed, in a clone, and from disk."""
    gallery = unit(60, 4, 0)
    index = build(kind).fit(gallery[:40], names(60)[:40])
    assert np.array_equal(index.get(["n7", "n2", "n7"]), gallery[[7, 2, 7]])
    assert index.get([]).shape == (0, 4)
    with pytest.raises(ValueError, match="the index holds no 'n40'; it holds 40 ids"):
        index.get(["n1", "n40"])
    twin = index.clone()
    twin.add(gallery[40:], names(60)[40:])
    twin.remove(["n1", "n7", "n50"])
    assert np.array_equal(twin.get(["n59", "n0", "n8"]), gallery[[59, 0, 8]])
    assert np.array_equal(index.get(["n39", "n7"]), gallery[[39, 7]])
    twin.save(tmp_path, {})
    for held in (twin, build(kind).load(tmp_path, {})):
        assert (len(held), held.dimensions) == (57, 4)
        assert all(held.ids[row] == name for name, row in held.row_of.items())
        for gone in ("n1", "n7", "n50"):
            with pytest.raises(ValueError, match=f"the index holds no '{gone}'; it holds 57 ids"):
                held.get([gone])
        held.add(gallery[7:8], ["n7"])
        assert np.array_equal(held.get(["n7", "n59"]), gallery[[7, 59]])


@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_a_damaged_folder_is_refused(kind: str, tmp_path: Path) -> None:
    build(kind).fit(unit(9, 4, 0), names(9)).save(tmp_path, {})
    (tmp_path / "ids.json").write_text(json.dumps(names(8)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 9 vectors for 8 ids \(8 different\); type another index_dir"):
        build(kind).load(tmp_path, {})


def test_a_saved_index_names_what_differs(tmp_path: Path) -> None:
    index = build("exact").fit(unit(9, 4, 0), names(9))
    index.save(tmp_path, {"members": ["a"]})
    with pytest.raises(ValueError, match=r"made with members=\['a'\], now it is members=\['b'\]; type another index_dir"):
        build("exact").load(tmp_path, {"members": ["b"]})
    with pytest.raises(ValueError, match="made with metric=ip, now it is metric=l2"):
        build("exact", "l2").load(tmp_path, {"members": ["a"]})
    with pytest.raises(ValueError, match="made with index=exact, now it is index=faiss Flat"):
        build("Flat").load(tmp_path, {"members": ["a"]})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json' is not a manifest"):
        build("exact").load(tmp_path, {})


def test_holding_another_catalogue_changes_as_little_as_needed() -> None:
    gallery, ids = unit(50, 8, 0), names(50)
    index = build("exact").fit(gallery[:40], ids[:40])
    changed = gallery.copy()
    changed[5] = unit(1, 8, 9)
    assert index.sync(changed[3:], ids[3:]) == (4, 11, 36)
    assert set(index.ids) == set(ids[3:])
    assert np.array_equal(index.get(["n5"])[0], changed[5])
    assert index.sync(index.get(index.ids), index.ids) == (0, 0, 47)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: i.add(unit(1, 4, 5), ("n1",)), "already holds 'n1'; remove it first"),
        (lambda i: i.add(unit(1, 5, 5), ("x",)), "vectors have 5 dimensions, the index 4"),
        (lambda i: i.remove(("n1", "zzz")), "holds no 'zzz'"),
        (lambda i: i.search(unit(1, 5, 5), ("q",), 1), "the index holds vectors of 4 dimensions"),
        (lambda i: i.search(unit(1, 4, 5), ("q",), 10), r"k=10, but the gallery has 9 readable pictures; .*1 to 9"),
        (lambda i: i.fit(unit(2, 4, 5), ("a", "a")), r"2 ids \(1 different\) do not fit"),
    ],
)
@pytest.mark.parametrize("kind", ["exact", "Flat"])
def test_mistakes_are_answered(kind: str, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(build(kind).fit(unit(9, 4, 0), names(9)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactIndex("cosine"), "index.metric=cosine: type ip, l2, l1"),
        (lambda: ExactIndex(first_pass="int4"), "index.first_pass=int4: type auto, bfloat16, float32 or int8"),
        (lambda: FaissIndex("Flat", device="gpu"), "index.device=gpu, but faiss sees no GPU here"),
        (lambda: FaissIndex("Flat", device="cuda:1"), "index.device=cuda:1, but faiss sees no GPU here"),
        (lambda: FaissIndex("Flat", device="all_gpus"), "index.device=all_gpus: type auto, cpu, gpu, cuda, cuda:1"),
        (lambda: FaissIndex("Flat", target_recall=1.5), "index.target_recall=1.5"),
        (lambda: FaissIndex("Nonsense", device="cpu").fit(unit(9, 4, 0), names(9)), "faiss rejects index.factory=Nonsense"),
        (
            lambda: FaissIndex("Flat", device="cpu", target_recall=0.9).fit(unit(9, 4, 0), names(9)),
            "neither nprobe nor efSearch",
        ),
        (lambda: FaissIndex("IVF{lists},PQ{bytes}np", "l1", "cpu").fit(unit(300, 4, 0), names(300)), "unsupported metric type"),
    ],
)
def test_settings_that_cannot_be(make, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("factory", "knob"), [("IVF{lists},Flat", "nprobe"), ("HNSW16", "efSearch")])
def test_target_recall_is_met_and_the_curve_is_printed(factory: str, knob: str, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = unit(4000, 32, 0)
    index = FaissIndex(factory, device="cpu", target_recall=0.99).fit(gallery, names(4000))
    lines = [line for line in capsys.readouterr().out.splitlines() if knob in line]
    recalls = [float(line.split("recall@10 ")[1].split()[0]) for line in lines]
    assert len(recalls) > 1
    assert recalls[-1] >= 0.99 > recalls[-2]
    queries = unit(100, 32, 1)
    found, true = index.search(queries, names(100), 10).positions, slow(gallery, queries, "ip", 10)[0]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, true, strict=True)]) > 0.95


def test_more_answers_than_an_inverted_list_gives_are_still_right() -> None:
    gallery = unit(500, 8, 0)
    ranking = FaissIndex("IVF16,Flat", device="cpu").fit(gallery, names(500)).search(gallery[:3], names(3), 400)
    assert np.array_equal(ranking.positions, slow(gallery, gallery[:3], "ip", 400)[0])


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    build("IVF{lists},Flat").fit(unit(90, 4, 0), names(90)).save(tmp_path, {"members": []})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"] == 90
    assert manifest["dimensions"] == 4
    assert manifest["index"] == "faiss IVF{lists},Flat"
