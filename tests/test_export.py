"""Exported networks: they load wherever a checkpoint does, and ONNX gives what PyTorch gives."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from beauty_bafe.commands.export import export
from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.data.pictures import letterbox
from beauty_bafe.model_card import _licence
from beauty_bafe.models.exported import checkpoint_bytes, write_network
from beauty_bafe.models.module import load_extractor, read_checkpoint
from beauty_bafe.models.onnx_export import check_onnx
from beauty_bafe.models.resuming import check_resumable
from beauty_bafe.retriever import Retriever


@pytest.fixture(scope="module")
def recipe_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a retrieval recipe, in a run's folder with metrics."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["retrieval"] = {"pooling": "attention_gem", "query": "closer", "rerank": "none", "enlarge": 1.5}
    torch.save(content, run / "checkpoints" / "best.ckpt")
    (run / "metrics.json").write_text(json.dumps({"val/iou": 0.5, "val/mAP@7": 0.25}))
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def network(recipe_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network alone, without ONNX."""
    folder = tmp_path_factory.mktemp("network")
    write_network(read_checkpoint(recipe_checkpoint), folder)
    return folder


def test_an_exported_network_is_the_checkpoints(recipe_checkpoint: Path, network: Path) -> None:
    first, second = load_extractor(recipe_checkpoint), load_extractor(network)
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert read_checkpoint(network)["retrieval"] == read_checkpoint(recipe_checkpoint)["retrieval"]
    assert "weights.pth" not in (network / "config.json").read_text(), "a path of this machine"


def test_others_may_read_the_files_as_the_umask_says(recipe_checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_network(read_checkpoint(recipe_checkpoint), tmp_path)
    finally:
        os.umask(before)
    assert {file.name: stat.filemode(file.stat().st_mode) for file in tmp_path.iterdir()} == {
        "config.json": "-rw-r--r--",
        "model.safetensors": "-rw-r--r--",
    }


def test_a_retriever_is_built_saved_and_loaded_from_an_exported_network(
    recipe_checkpoint: Path, network: Path, toy: Path, tmp_path: Path
) -> None:
    queries = sorted((toy / "queries").iterdir())[:5]
    gallery = {file.stem: file for file in sorted((toy / "gallery").iterdir())[:12]}
    words = ["device=cpu", "precision=32-true"]
    first, second = Retriever.build(recipe_checkpoint, gallery, words), Retriever.build(network, gallery, words)
    for one, other in zip(first.describe(queries), second.describe(queries), strict=True):
        np.testing.assert_array_equal(one, other)
    second.save(tmp_path / "shop")
    second.save(tmp_path / "shop")  # its files are there already
    assert Retriever.load(tmp_path / "shop").search(queries) == first.search(queries)
    (network_copy := tmp_path / "network").mkdir()
    for name, content in checkpoint_bytes(network).items():
        (network_copy / name).write_bytes(content)
    third = Retriever.build(network_copy, gallery, words)
    (network_copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has changed since it was loaded"):
        third.save(tmp_path / "shop")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_broken_folders_are_refused(name: str, network: Path, tmp_path: Path) -> None:
    for file, content in checkpoint_bytes(network).items():
        (tmp_path / file).write_bytes(content[:20] if file == name else content)
    with pytest.raises(ValueError, match=r"is not a checkpoint of this project .*a folder that beauty-bafe export wrote"):
        load_extractor(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_extractor(tmp_path)


def test_an_exported_network_cannot_be_resumed(network: Path) -> None:
    with pytest.raises(ValueError, match=r"no optimiser state to resume from; type ckpt_path=RUN/checkpoints/last.ckpt"):
        check_resumable(SimpleNamespace(hparams={}), {}, network)  # type: ignore[arg-type]


def test_export_writes_what_it_compared(
    recipe_checkpoint: Path, toy: Path, tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    """Both ways of looking, on photos; then the files are run again here, in the order of the photos."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export`")
    pytest.importorskip("onnxscript", reason="the extra `export`")
    answers = tmp_path / "answers"
    answers.mkdir()
    measured = {"queries": 40, "recall@1": 0.5, "recall@1_interval": [0.35, 0.65], "ms_per_query": 3.0, "median_rank": None}
    (answers / "metrics.json").write_text(json.dumps(measured))
    words = [f"checkpoint={recipe_checkpoint}", f"output_dir={tmp_path}", f"pictures={toy / 'queries'}", "most_pictures=12"]
    files = export(configure("export", *words, f"answers={answers}"))
    assert files.keys() == {"model.onnx", "query.onnx"}
    assert (files["model.onnx"]["size"], files["query.onnx"]["size"]) == (96, 192)
    for found in files.values():
        assert found["compared_pictures"] == 12
        assert 0.9999 <= found["least_cosine"] <= 1.0001
        assert found["largest_mask_difference"] <= 1 / 255

    paths = open_catalog(toy / "queries").paths[:7]
    shop = Retriever.build(tmp_path, {"one": paths[0]}, ["device=cpu", "precision=32-true"])
    vectors, masks = shop.describe(paths)
    session = onnxruntime.InferenceSession(str(tmp_path / "query.onnx"), providers=["CPUExecutionProvider"])
    catalog = open_catalog(toy / "queries")
    pictures = np.stack([letterbox(catalog.read(row, 192).rgb, 192, 255).transpose(2, 0, 1) for row in range(7)])
    for count in (1, 2, 7):
        found, drawn = session.run(["descriptor", "mask"], {"pictures": pictures[:count]})
        assert (found * vectors[:count]).sum(axis=1).min() >= 0.9999
        assert masks is not None
        assert np.abs(drawn.astype(int) - masks[:count]).max() <= 1

    card = (tmp_path / "README.md").read_text()
    for text in ("| mask IoU | 0.5000 |", 'retrieval.query: `"closer"`', "queries with `query.onnx`", "on real pictures"):
        assert text in card, text
    assert "on 40 queries" in card
    assert "| recall@1 | 0.5000 | 0.3500 – 0.6500 |" in card
    assert "ms_per_query" not in card
    assert "NaN" not in card


def test_export_compares_photographs(
    recipe_checkpoint: Path, shared: Path, tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    """100 of them, seen both ways; the check inside of export is the test, and says how far they differ."""
    pytest.importorskip("onnxruntime", reason="the extra `export`")
    pytest.importorskip("onnxscript", reason="the extra `export`")
    words = [f"checkpoint={recipe_checkpoint}", f"output_dir={tmp_path}"]
    files = export(configure("export", *words, f"pictures={shared / 'benchmark' / 'dev' / 'queries'}"))
    assert files.keys() == {"model.onnx", "query.onnx"}
    assert [found["compared_pictures"] for found in files.values()] == [100, 100]


def test_a_file_that_gives_something_else_is_refused(
    recipe_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier export stays as it was; a later one leaves nothing of it."""
    pytest.importorskip("onnxruntime", reason="the extra `export`")
    pytest.importorskip("onnxscript", reason="the extra `export`")
    earlier = ["README.md", "config.json", "model.onnx", "model.safetensors", "query.onnx"]
    for name in earlier:
        (tmp_path / name).write_text("earlier")
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "query.onnx").write_text("of a run that was killed")

    def check(file: Path, describer: torch.nn.Module, pictures: list[Tensor]) -> object:
        return check_onnx(file, lambda batch: [output.flip(1) for output in describer(batch)], pictures)  # type: ignore[arg-type]

    words = [f"checkpoint={recipe_checkpoint}", f"output_dir={tmp_path}", "query=whole"]
    with monkeypatch.context() as patch:
        patch.setattr("beauty_bafe.models.onnx_export.check_onnx", check)
        message = r"model.onnx: .* differs from PyTorch among pictures 1 to 1: cosine .* at least 0.9999"
        with pytest.raises(RuntimeError, match=message):
            export(configure("export", *words))
    assert sorted(file.name for file in tmp_path.iterdir()) == earlier
    assert {file.read_text() for file in tmp_path.iterdir()} == {"earlier"}
    export(configure("export", *words))
    assert sorted(file.name for file in tmp_path.iterdir()) == earlier[:-1]
    load_extractor(tmp_path)


def test_licences_are_quoted_from_conf() -> None:
    assert any("DINOv3 License" in line for line in _licence("vit_base_patch16_dinov3.lvd1689m"))
    assert not any("conf/model" in line for line in _licence("test_efficientnet"))


def test_export_says_what_it_needs(configure: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match=r"export needs checkpoint=RUN/checkpoints/best.ckpt"):
        export(configure("export"))
    with pytest.raises(ValueError, match="most_pictures=3: type 10 or more"):
        export(configure("export", "checkpoint=a.ckpt", "most_pictures=3"))


def test_export_looks_at_its_settings_before_the_work(
    recipe_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `export`")
    pytest.importorskip("onnxscript", reason="the extra `export`")
    (tmp_path / "metrics.json").write_text('{"queries": 3, "ms_per_query": 2.0}')
    words = [f"checkpoint={recipe_checkpoint}", f"output_dir={tmp_path / 'out'}"]
    for word, message in {
        f"answers={tmp_path / 'none'}": r"No such file.*; type a folder that retrieve.py wrote with truth=FILE",
        f"answers={tmp_path}": r"was written without truth=FILE",
        f"pictures={tmp_path / 'none'}": r"none",
    }.items():
        with pytest.raises(ValueError, match=message):
            export(configure("export", *words, word))
    assert not (tmp_path / "out").exists()
