"""The Retriever: the same answers as retrieve.py, from any kind of image, from many threads, while the gallery changes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from beauty_bafe import Hit, Retriever

from .conftest import ROOT, VIEWS

sys.path.insert(0, str(ROOT))
from retrieve import retrieve


@pytest.fixture(scope="session")
def built(toy: Path, tiny_checkpoint: Path) -> Retriever:
    return Retriever.build(str(tiny_checkpoint), gallery=toy / "gallery", overrides=[VIEWS])


@pytest.fixture
def shop(built: Retriever) -> Iterator[Retriever]:
    """The retriever that all tests share, with its gallery as it was afterwards."""
    before = built._state
    yield built
    built._state = before


@pytest.fixture(scope="session")
def queries(toy: Path) -> list[Path]:
    return sorted((toy / "queries").iterdir())


def submitted(file: Path) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in csv.reader(file.open())}


@pytest.mark.parametrize(
    "overrides",
    [
        ["rehearsal.views=384"],  # the default: one of each photo
        ["query=both", "rerank=query_expansion"],
        ["+pooling@poolings.gem=gem", "ensemble=score_fusion", "size=96", "extraction.dtype=float16"],
        ["rerank=sift", "+pooling@poolings.vlad=vlad", "poolings.vlad.function.words=4"],
    ],
    ids=["checkpoint's", "reranked", "fused", "files"],
)
def test_answers_are_those_of_the_script_to_the_bit(
    overrides: list[str],
    toy: Path,
    tiny_checkpoint: Path,
    queries: list[Path],
    configure: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from beauty_bafe.retrieval.gallery import Gallery

    rankings, answer = [], Gallery.answer
    monkeypatch.setattr(Gallery, "answer", lambda *args: rankings.append(answer(*args)) or rankings[-1])
    places = {
        "gallery": toy / "gallery",
        "queries": toy / "queries",
        "features": tmp_path / "f",
        "output_dir": tmp_path / "out",
    }
    words = [f"{key}={value}" for key, value in places.items()]
    retrieve(configure("retrieve", f"checkpoints=[{tiny_checkpoint}]", *words, "num_workers=0", "report=false", *overrides))
    hits = Retriever.build([tiny_checkpoint], toy / "gallery", [VIEWS, *overrides]).search(queries)
    expected = submitted(tmp_path / "out" / "submission.csv")
    assert {query.stem: [hit.id for hit in found] for query, found in zip(queries, hits, strict=True)} == expected
    assert np.array_equal(np.float32([[hit.score for hit in found] for found in hits]), rankings[0].scores.astype(np.float32))
    assert all(hit.path == toy / "gallery" / f"{hit.id}.jpg" for found in hits for hit in found)
    sure = np.float32([[hit.probability for hit in found] for found in hits])
    assert np.array_equal(sure, rankings[0].probabilities)
    assert 0 <= sure.min() <= sure.max() <= 1


def test_changes_are_seen_whole_while_others_search(shop: Retriever, queries: list[Path]) -> None:
    """Twins of a query are added and removed in pairs; every search sees both or none."""
    query, done, seen = queries[0], threading.Event(), []

    def search() -> None:
        while not done.is_set():
            seen.append({hit.id for hit in shop.search([query], k=4)[0]} & {"twin1", "twin2"})

    with ThreadPoolExecutor(4) as threads:
        searches = [threads.submit(search) for _ in range(3)]
        try:
            for _ in range(5):
                shop.add({"twin1": query, "twin2": query.read_bytes()})
                assert {hit.id for hit in shop.search([query], k=2)[0]} == {"twin1", "twin2"}
                shop.remove(["twin1", "twin2"])
                assert not {hit.id for hit in shop.search([query], k=4)[0]} & {"twin1", "twin2"}
        finally:
            done.set()
        for future in searches:
            future.result()
    assert {frozenset(found) for found in seen} <= {frozenset(), frozenset({"twin1", "twin2"})}


@pytest.mark.parametrize("index", ["exact", "flat", "fastest", "hnsw"])
def test_what_is_added_leaves_earlier_snapshots_alone(
    index: str, toy: Path, tiny_checkpoint: Path, queries: list[Path]
) -> None:
    pictures = {path.stem: path for path in sorted((toy / "gallery").iterdir())[:20]}
    shop = Retriever.build([tiny_checkpoint], pictures, [f"index={index}", VIEWS])
    before, state = shop.search(queries[:3]), shop._state
    shop.add({"new": queries[0]})
    shop.remove(list(pictures)[:5])
    assert len(shop) == 16
    assert shop.search(queries[:1])[0][0].id == "new"
    shop._state = state
    assert shop.search(queries[:3]) == before


def test_all_or_nothing(shop: Retriever, queries: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    ids = shop.ids
    with pytest.raises(ValueError, match=r"broken\.jpg' cannot be read: "):
        shop.add({"good": queries[0], "bad": tmp_path / "broken.jpg"})
    with pytest.raises(ValueError, match=f"already holds '{ids[0]}'; remove it first"):
        shop.add({"good": queries[0], ids[0]: queries[1]})
    with pytest.raises(ValueError, match="the index holds no 'strange'"):
        shop.remove([ids[0], "strange"])
    with pytest.raises(ValueError, match="would remove every picture"):
        shop.remove(ids)
    with pytest.raises(TypeError, match=r"give a list of ids, \['one'\]"):
        shop.remove("one")
    assert shop.ids == ids


def test_every_kind_of_image(shop: Retriever, queries: list[Path]) -> None:
    path = queries[0]
    array = np.asarray(Image.open(path).convert("RGB"))
    tensor = torch.from_numpy(array.copy())
    kinds = [path, str(path), Image.open(path), path.read_bytes(), array, tensor]
    hits = shop.search(kinds, k=3)
    assert all(found == hits[0] for found in hits)
    vectors, masks = shop.describe(kinds)
    assert (vectors.dtype, vectors.shape) == (np.float32, (6, shop.describe([])[0].shape[1]))
    assert (vectors == vectors[0]).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert masks is not None
    assert (masks.dtype, masks.shape) == (np.uint8, (6, 112, 112))
    assert shop.search([]) == []
    assert shop.search(np.stack([array, array]), k=3) == hits[:2]
    rgba = Image.fromarray(np.dstack([array, np.full(array.shape[:2], 128, np.uint8)]))
    stream = io.BytesIO()
    rgba.save(stream, "png")
    assert shop.search([rgba], k=3) == shop.search([stream.getvalue()], k=3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", r"got one str; give a list of images, \[image\]"),
        (b"jpeg", r"got one bytes; give a list"),
        (np.zeros((4, 4, 3), np.uint8), "got one ndarray; give a list"),
        (7, "got a int; give a list of images, each a path"),
        ({"a": "photo.jpg"}, "got a dict; give a list of images"),
        ([None], "image '0' is of type NoneType; it must be a path, a PIL image"),
        ([np.zeros((4, 4, 3))], r"image '0' is float64 \(4, 4, 3\); arrays and tensors must be uint8 \(H, W, 3\)"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"is uint8 \(3, 4, 4\); .*; type image\.permute\(1, 2, 0\)"),
        ([np.zeros((4, 4), np.uint8)], r"is uint8 \(4, 4\)"),
        (["nowhere.jpg"], "'nowhere.jpg' cannot be read: no such file"),
        ([b"no picture"], r"image '0' \(bytes\) cannot be read: UnidentifiedImageError"),
    ],
)
def test_anything_else_is_answered_with_what_is_allowed(images: Any, message: str, shop: Retriever) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        shop.search(images)


def test_bad_arguments(shop: Retriever, tiny_checkpoint: Path, toy: Path, queries: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k=49, but the gallery has 48"):
        shop.search(queries[:1], k=49)
    for overrides, message in [
        (["poolling=gem"], "'poolling' is not a setting: .* Did you mean 'pooling'"),
        (["pooling=gemm"], "gemm"),
        (["query.view.closer=2"], "with query=auto the checkpoints choose query"),
        (["gallery=G"], "gallery is not an override of a Retriever"),
        (["hydra.run.dir=x"], "hydra.run.dir is not an override"),
    ]:
        with pytest.raises(ValueError, match=message):
            Retriever.build(tiny_checkpoint, toy / "gallery", overrides)
    with pytest.raises(ValueError, match="no checkpoints; give"):
        Retriever.build([], toy / "gallery")
    with pytest.raises(ValueError, match=r"nothing\.ckpt' does not exist"):
        Retriever.build("nothing.ckpt", toy / "gallery")
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        Retriever.build(tiny_checkpoint, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the gallery is empty"):
        Retriever.build(tiny_checkpoint, {})
    with pytest.raises(TypeError, match="the id 3 is of type int; ids are strings, type '3'"):
        shop.add({3: queries[0]})  # type: ignore[dict-item]


def test_gallery_pictures_in_memory_have_no_keypoints(toy: Path, tiny_checkpoint: Path, queries: list[Path]) -> None:
    paths = sorted((toy / "gallery").iterdir())[:8]
    shop = Retriever.build(tiny_checkpoint, {path.stem: path for path in paths}, ["rerank=sift"])
    hits = shop.search(queries[:1], k=3)
    assert len(hits[0]) == 3
    assert shop.search([queries[0].read_bytes()], k=3) == hits
    shop.add({"twin": queries[0].read_bytes()})
    with pytest.raises(ValueError, match=r"'twin' was given as pixels; give its path, or type rerank=none"):
        shop.search(queries[:1], k=3)


def test_unreadable_gallery_pictures_are_listed(toy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "gallery", tmp_path / "gallery")
    (tmp_path / "gallery" / "broken.jpg").write_bytes(b"no picture")
    shop = Retriever.build(tiny_checkpoint, tmp_path / "gallery", [VIEWS])
    assert len(shop) == 48
    assert [name for name, _, _ in shop.skipped] == ["broken"]
    with pytest.raises(ValueError, match="1 of 49 gallery pictures cannot be read, more than max_skipped=0"):
        Retriever.build(tiny_checkpoint, tmp_path / "gallery", ["max_skipped=0"])


def test_nothing_is_written_unless_asked(
    toy: Path, tiny_checkpoint: Path, queries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shop = Retriever.build(tiny_checkpoint, toy / "gallery", [VIEWS])
    shop.search(queries[:2])
    shop.add({"new": queries[0]})
    assert list(tmp_path.iterdir()) == []


def test_a_year_on_disk(shop: Retriever, toy: Path, tiny_checkpoint: Path, queries: list[Path], tmp_path: Path) -> None:
    checkpoint = shutil.copy(tiny_checkpoint, tmp_path / "mine.ckpt")
    overrides = ["query=both", "+pooling@poolings.gem=gem", "ensemble=zscore", VIEWS]
    shop = Retriever.build(checkpoint, toy / "gallery", overrides)
    shop.add({"memory": queries[0].read_bytes(), "file": queries[1]})
    before = shop.search(queries[:4])
    shop.save(tmp_path / "shop")
    shop.save(tmp_path / "shop")
    checkpoint.unlink()
    assert len(list((tmp_path / "shop" / "checkpoints").iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        shop.save(tmp_path / "other")
    later = Retriever.load(tmp_path / "shop")
    assert later.search(queries[:4]) == before
    assert {hit.path for hit in later.search(queries[:2], k=1)[0]} == {None}
    later.remove(["memory"])
    later.save(tmp_path / "shop")
    later.save(tmp_path / "shop")
    assert Retriever.load(tmp_path / "shop", ["device=cpu", "query=both"]).ids == later.ids
    with pytest.raises(ValueError, match="made with members="):
        Retriever.load(tmp_path / "shop", ["pooling=mac"])


def test_what_is_loaded_cannot_say_which_code_to_run(shop: Retriever, tmp_path: Path) -> None:
    shop.save(tmp_path / "shop")
    file = next((tmp_path / "shop").glob("*/retriever.json"))
    saved = json.loads(file.read_text())
    for word in (
        "pooling.function._target_=os.system",
        "+poolings.x={_target_: os.system}",
        "pooling.function='${oc.create:{_target_: os.system}}'",
        "pooling.function._target_=beauty_bafe.data.workers.os.system",
    ):
        file.write_text(json.dumps(saved | {"overrides": ["pooling=gem", word]}))
        with pytest.raises(ValueError, match=r"names the code '.*os\.system', which no file in conf names"):
            Retriever.load(tmp_path / "shop")
    with pytest.raises(ValueError, match=r"holds no retriever; Retriever\.save"):
        Retriever.load(tmp_path)


def test_the_package_is_quick_to_import() -> None:
    code = (
        "import sys, beauty_bafe\n"
        "assert beauty_bafe.__all__ == ['Hit', 'Retriever']\n"
        "heavy = {'torch', 'numpy', 'hydra', 'faiss'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try: beauty_bafe.Retreiver\n"
        "except AttributeError as error: assert 'it has Hit, Retriever' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert Hit("a", 0.5, None, None).score == 0.5
    assert (ROOT / "beauty_bafe" / "py.typed").is_file()
