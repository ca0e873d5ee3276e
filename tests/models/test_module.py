from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from beauty_bafe.models.module import SaliencyModule, load_extractor


def test_a_checkpoint_alone_rebuilds_the_network(tiny: dict[str, Any], tiny_checkpoint: Path) -> None:
    extractor = load_extractor(tiny_checkpoint)
    content = torch.load(tiny_checkpoint, weights_only=True)
    assert content["hyper_parameters"]["model"]["size"] == extractor.size == 64
    assert not extractor.training
    for key, value in extractor.state_dict().items():
        assert torch.equal(value, content["state_dict"][f"extractor.{key}"])


def test_pretrained_weights_are_not_fetched_again(tiny: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["hyper_parameters"]["model"] |= {"pretrained": True, "weights": "/gone/away.pth"}
    torch.save(content, tmp_path / "a.ckpt")
    load_extractor(tmp_path / "a.ckpt")


def write(kind: str, good: Path, file: Path) -> None:
    content = torch.load(good, weights_only=True)
    if kind == "cut short":
        file.write_bytes(good.read_bytes()[:5000])
    elif kind == "text":
        file.write_text("not a checkpoint")
    elif kind == "bare state dict":
        torch.save(content["state_dict"], file)
    elif kind == "another network":
        content["hyper_parameters"]["model"]["hidden"] = 16
        torch.save(content, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", "no checkpoint of this project"),
        ("text", "no checkpoint of this project"),
        ("bare state dict", r"no checkpoint of this project.*model.weights=FILE"),
        ("another network", "names model test_efficientnet but its weights are of another network"),
        ("missing", "does not exist; train.py writes"),
    ],
)
def test_other_files_are_refused(tiny_checkpoint: Path, tmp_path: Path, kind: str, message: str) -> None:
    write(kind, tiny_checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        load_extractor(tmp_path / "a.ckpt")


def test_only_plain_values_become_hyper_parameters(tiny: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        SaliencyModule(tiny | {"pad": torch.tensor(255)}, lr=1e-3, warmup=0)
