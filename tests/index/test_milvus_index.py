"""index=milvus against the real standalone server that the PyPI package `milvus` carries."""

from __future__ import annotations

import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beauty_bafe.index import milvus_collection
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.milvus_index import MilvusIndex
from beauty_bafe.retrieval.ensemble import Fusion

from ..conftest import VIEWS
from ..shop import Shop
from .conftest import Standalone, names, unit

pymilvus = pytest.importorskip("pymilvus", reason="the extra `milvus`")
pytestmark = pytest.mark.server  # one server: `--dist loadfile` keeps a file's tests in one process
DIMENSIONS = 16


def same_answers(index: MilvusIndex, rows: dict[str, np.ndarray], queries: np.ndarray, k: int) -> None:
    """Those of an exact index of the same rows: ids, and scores to the last bit but summation's."""
    assert set(index.ids) == set(rows)
    exact = ExactIndex(index.metric, "cpu").fit(np.array([rows[name] for name in index.ids]), index.ids)
    wanted = exact.search(queries, names(len(queries)), k)
    found = index.search(queries, names(len(queries)), k)
    assert found.positions.tolist() == wanted.positions.tolist()
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
    assert np.array_equal(index.get(index.ids[::-1]), np.array([rows[name] for name in index.ids[::-1]]))


def recall(index: MilvusIndex, gallery: np.ndarray, queries: np.ndarray) -> float:
    """Share of the 7 true neighbours that it finds; whatever it finds has its exact score."""
    exact = ExactIndex("ip", "cpu").fit(gallery, index.ids)
    wanted, found = (each.search(queries, names(len(queries)), 7) for each in (exact, index))
    products = np.einsum("qkd,qd->qk", gallery[found.positions].astype(float), queries)
    np.testing.assert_allclose(found.scores, products, atol=1e-6)
    pairs = zip(found.positions.tolist(), wanted.positions.tolist(), strict=True)
    share = float(np.mean([len({*left} & {*right}) / 7 for left, right in pairs]))
    print(f"\n{index}: recall@7 {share:.4f} of {len(queries)} queries to {gallery.shape} random vectors")
    return share


@pytest.mark.parametrize("kind", ["ivf_sq8", "diskann"])
def test_answers_of_other_kinds(make, kind: str) -> None:
    rows = 12_000 if kind != "diskann" else 500  # this server never builds diskann: it compares all rows
    gallery = unit(rows, 64, 0)
    assert recall(make(kind, lists=128, probes=64).fit(gallery, names(rows)), gallery, unit(50, 64, 1)) > 0.8


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_growth_and_shrinkage(make, metric: str) -> None:
    vectors, queries = unit(400, DIMENSIONS, 2), unit(9, DIMENSIONS, 3)
    ids = names(400)
    rows = dict(zip(ids, vectors, strict=True))
    index = make("flat", metric).fit(vectors[:200], ids[:200])
    before = index.clone()
    index.add(vectors[200:], ids[200:])
    same_answers(index, rows, queries, 20)
    index.remove(ids[:150])
    same_answers(index, {name: rows[name] for name in ids[150:]}, queries, 20)
    index.add(vectors[:1], ids[:1])  # once more what was removed
    same_answers(index, {name: rows[name] for name in (*ids[150:], ids[0])}, queries, 251)
    same_answers(before, {name: rows[name] for name in ids[:200]}, queries, 200)  # as it was


def test_ids_that_break_expressions(make, tmp_path: Path) -> None:
    ids = ('"', "'", "\\", '\\"', "a\nb", "é日本💄", "' or 1=1 --", "", " ", "\udcff.jpg", "x" * 1000)
    vectors = unit(len(ids), DIMENSIONS, 4)
    (tmp_path / "categories.csv").write_text('id,category\n,"a ""b"" \\ \'c\' é"\n é日本💄,d\n', encoding="utf-8")
    rows = dict(zip(ids, vectors, strict=True))
    index = make("flat").fit(vectors, ids)
    same_answers(index, rows, vectors, len(ids))
    index.remove(ids[:3])
    index.save(tmp_path / "kept", {})
    again = make("flat").load(tmp_path / "kept", {})
    same_answers(again, {name: rows[name] for name in ids[3:]}, vectors, 3)


def test_categories_are_searched_alone(make, tmp_path: Path) -> None:
    odd = "a \"b\" \\ 'c' é"
    (tmp_path / "c.csv").write_text(f'id,category\nn0,"{odd.replace(chr(34), chr(34) * 2)}"\nn1,d\nn2,d\n', encoding="utf-8")
    vectors = unit(4, DIMENSIONS, 5)
    index = make("flat", categories=str(tmp_path / "c.csv")).fit(vectors, names(4))
    assert index.search(vectors[:1], ("q",), 4).answers(0)[0] == "n0"
    for only, expected in (([odd], {"n0"}), (["d"], {"n1", "n2"}), (["d", odd], {"n0", "n1", "n2"})):
        index._only = make("flat", categories=str(tmp_path / "c.csv"), only=only)._only
        assert set(index.search(vectors[:1], ("q",), len(expected)).answers(0)) == expected
        with pytest.raises(ValueError, match=f"found {len(expected)} rows for a query, k=4; .*widen index.only"):
            index.search(vectors[:1], ("q",), 4)


def test_only_what_changed_is_sent(make, sent: list[list[str]], tmp_path: Path) -> None:
    vectors, ids = unit(50, DIMENSIONS, 6), names(50)
    index = make("flat").fit(vectors, ids)
    index.save(tmp_path / "0", {})
    sent.clear()
    make("flat").fit(vectors, ids)
    assert sent == []
    changed = vectors.copy()
    changed[7] = unit(1, DIMENSIONS, 7)[0]
    again = make("flat").load(tmp_path / "0", {})
    assert again.sync(changed[1:], ids[1:]) == (2, 1, 48)
    assert sent == [["n7"]]
    same_answers(again, dict(zip(ids[1:], changed[1:], strict=True)), vectors[:3], 49)
    same_answers(index, dict(zip(ids, vectors, strict=True)), vectors[:3], 50)
    # The state before may be in use until the next one is saved.
    again.save(tmp_path / "1", {})
    assert again._collection.count() == 51
    again.save(tmp_path / "2", {})
    assert again._collection.count() == 49
    same_answers(make("flat").load(tmp_path / "2", {}), dict(zip(ids[1:], changed[1:], strict=True)), vectors[:3], 49)


def test_vectors_of_others(make, tmp_path: Path) -> None:
    vectors, ids = unit(30, DIMENSIONS, 8), names(30)
    first = make("flat").for_view(0, {"model": "resnet"}).fit(vectors, ids)
    with pytest.raises(ValueError, match=r"made with model=resnet, now it is model=vgg; type index.collection=ANOTHER_NAME"):
        make("flat").for_view(0, {"model": "vgg"}).fit(vectors, ids)
    with pytest.raises(ValueError, match="made with dimensions=16, now it is dimensions=8"):
        make("flat").for_view(0, {"model": "resnet"}).fit(vectors[:, :8], ids)
    with pytest.raises(ValueError, match=r"holds 10 rows that are not in this gallery; type .*index.overwrite=true"):
        make("flat").for_view(0, {"model": "resnet"}).fit(vectors[10:], ids[10:])
    same_answers(first, dict(zip(ids, vectors, strict=True)), vectors[:2], 30)
    second = make("flat", overwrite=True).for_view(0, {"model": "vgg"}).fit(vectors[10:], ids[10:])
    same_answers(second, dict(zip(ids[10:], vectors[10:], strict=True)), vectors[:2], 20)
    assert make("flat").for_view(1, {"model": "resnet"}).fit(vectors, ids)._collection.count() == 30  # another view's own


def test_a_copy_that_is_fitted_anew_leaves_the_gallery(make) -> None:
    """As database augmentation does."""
    import copy

    vectors, ids = unit(30, DIMENSIONS, 9), names(30)
    index = make("flat").fit(vectors, ids)
    augmented = copy.copy(index).fit(vectors[::-1], ids)
    same_answers(augmented, dict(zip(ids, vectors[::-1], strict=True)), vectors[:2], 30)
    same_answers(index, dict(zip(ids, vectors, strict=True)), vectors[:2], 30)
    with index._collection.server.client("list") as client:
        name = augmented._collection.name
        assert client.has_collection(name)
        del augmented
        assert not client.has_collection(name)


def test_rows_that_it_does_not_know_cost_no_answers(make) -> None:
    """Those of an addition that was killed before it was saved: better answers than all of ours."""
    vectors, query = unit(300, DIMENSIONS, 10), unit(1, DIMENSIONS, 11)
    index = make("flat", rescore=0).fit(vectors, names(300))
    other = index.clone()
    other.add(query + 0.01 * unit(200, DIMENSIONS, 12), tuple(f"x{number}" for number in range(200)))
    same_answers(index, dict(zip(names(300), vectors, strict=True)), query, 7)


def test_settings_that_it_does_not_know() -> None:
    for settings, message in (
        ({"uri": "milvus.db"}, "index.uri=milvus.db: type http://HOST:19530"),
        ({"collection": "a-b"}, "index.collection=a-b: type a name of letters"),
        ({"kind": "cagra"}, "index.kind=cagra: type hnsw, diskann, ivf_sq8, flat"),
        ({"metric": "l1"}, "Milvus supports ip and l2"),
        ({"consistency": "weak"}, "index.consistency=weak: type strong"),
        ({"timeout": 0}, "index.timeout=0: type a number"),
        ({"only": ["a"]}, "needs index.categories=CSV"),
    ):
        with pytest.raises(ValueError, match=message):
            MilvusIndex(**{"uri": "http://localhost:1", "collection": "c"} | settings)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    index = MilvusIndex(uri, "c", token="user:secret", timeout=2)
    with pytest.raises(ConnectionError, match=rf"Milvus at {uri} failed to open .* run the same command again") as error:
        index.fit(unit(3, DIMENSIONS, 0), names(3))
    assert "secret" not in str(error.value)


def test_a_server_that_is_slow(make, server: Standalone) -> None:
    vectors, ids = unit(30, DIMENSIONS, 13), names(30)
    index = make("flat").fit(vectors, ids)
    index._collection.server.timeout = 2
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConnectionError, match=r"failed to answer queries: .*raise index.timeout=2 seconds if it is only"):
            index.search(vectors[:1], ("q",), 3)
        with pytest.raises(ConnectionError, match="failed to store vectors 0 to 1 of 1"):
            index.clone().add(unit(1, DIMENSIONS, 14), ("new",))
    finally:
        server.process.send_signal(signal.SIGCONT)
    same_answers(index, dict(zip(ids, vectors, strict=True)), vectors[:2], 3)


def test_killed_while_it_takes_vectors(make, server: Standalone, sent: list[list[str]], monkeypatch) -> None:
    monkeypatch.setattr(milvus_collection, "BYTES", 1000 * 4 * 64)  # a thousand rows a message
    vectors, ids, queries = unit(20_000, 64, 15), names(20_000), unit(100, 64, 16)
    upsert = pymilvus.MilvusClient.upsert

    def killing(*arguments: Any, **settings: Any) -> Any:
        if len(sent) == 8:
            server.kill()
        return upsert(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(pymilvus.MilvusClient, "upsert", killing)
        with pytest.raises(
            ConnectionError, match=r"failed to store vectors 8000 to 9000 of 20000: .*rows it has already stored are kept"
        ):
            make("hnsw", timeout=10).fit(vectors, ids)
    server.start()
    sent.clear()
    index = make("hnsw").fit(vectors, ids)
    print(f"\n{20_000 - sum(map(len, sent))} of 8,000 acknowledged rows outlived the kill")
    assert sum(map(len, sent)) <= 12_000
    assert index._collection.count() == 20_000
    assert recall(index, vectors, queries) > 0.8


def test_gallery_and_its_index_folder(make, server: Standalone, toy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Two views; then a picture goes; then the server comes back empty, and the same command fills it again."""
    shop = Shop(tmp_path, toy, tiny_checkpoint, Fusion, method="rank", weights=None, depth=20)

    def answers() -> list[list[str]]:
        first = shop.answer().answers(0)
        picture = shop.root / "gallery" / f"{first[0]}.jpg"
        picture.rename(shop.root / "away.jpg")
        later = shop.answer().answers(0)
        kept = shop.answer(gallery=False).answers(0)
        (shop.root / "away.jpg").rename(picture)
        return [first, later, kept, shop.answer().answers(0)]

    expected = answers()
    assert expected[0] != expected[1]
    shutil.rmtree(shop.root / "index")
    shop.index = partial(make, "flat")
    assert answers() == expected
    assert not list((shop.root / "index").rglob("vectors.npy"))
    server.kill()
    server.start(empty=True)
    with pytest.raises(
        ValueError, match="does not exist; it should hold 48 rows; type gallery=DIR_OR_CSV with the same index_dir"
    ):
        shop.answer(gallery=False)
    assert shop.answer().answers(0) == expected[3]
    index = shop.open(gallery=False).indexes[1]
    index._collection.delete(index._labels.rows[:3].tolist())
    with pytest.raises(ValueError, match="holds 45 rows of 48; type gallery="):
        shop.answer(gallery=False)
    assert shop.answer().answers(0) == shop.answer(gallery=False).answers(0) == expected[3]


def test_retriever_and_service(server: Standalone, toy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Search with re-rankers, add, remove, save, serve and load: as with vectors in memory."""
    from beauty_bafe import Retriever
    from beauty_bafe.serving.limits import Upload
    from beauty_bafe.serving.shop import Shop as Served

    pictures = {file.stem: file for file in sorted((toy / "gallery").iterdir())}
    queries = sorted((toy / "queries").iterdir())[:4]
    extra, gone = pictures.popitem(), next(iter(pictures))
    words = [f"index.uri={server.uri}", "index.collection=retriever", "index.kind=flat"]

    def answers(name: str, index: list[str], rerank: str) -> list[list[list[str]]]:
        def ask(retriever: Retriever) -> list[list[str]]:
            return [[hit.id for hit in hits] for hits in retriever.search(queries, k=5)]

        # A collection belongs to one gallery.
        index = [word.replace("collection=", f"collection={rerank}_") for word in index]
        retriever = Retriever.build(str(tiny_checkpoint), pictures, [*index, f"rerank={rerank}", "device=cpu", VIEWS])
        found = [ask(retriever)]
        retriever.save(tmp_path / name)
        shop = Served(tmp_path / name)
        shop.add(extra[0], Upload(extra[1].read_bytes(), "jpg", 160, 160))
        found.append(ask(shop.served.retriever))
        shop.remove(gone)
        found.append(ask(shop.served.retriever))
        found.append(ask(Retriever.load(tmp_path / name)))
        return [*found, ask(retriever)]  # which still has its own gallery

    for rerank in ("query_expansion", "k_reciprocal"):
        wanted = answers(f"exact-{rerank}", ["index=exact"], rerank)
        assert answers(f"milvus-{rerank}", ["index=milvus", *words], rerank) == wanted
        assert wanted[1] != wanted[0] or wanted[2] != wanted[1]
