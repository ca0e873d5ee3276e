from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.fastest import FastestIndex
from beauty_bafe.models.precision import (
    count_devices,
    fastest_precision,
    pick_device,
    pick_devices,
    trainer_settings,
)


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_only_where_the_processor_multiplies_it(supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
    assert fastest_precision("cpu") == expected
    assert fastest_precision("cuda") == expected


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Makes PyTorch see so many CUDA GPUs, which multiply bfloat16 while the CPU does not, and Apple's."""

    def machine(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "picked"),
    [
        (2, False, "auto", "cuda"),
        (2, False, "gpu", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "auto", "mps"),
        (0, True, "gpu", "mps"),
        (0, True, "mps", "mps"),
        (0, False, "auto", "cpu"),
    ],
)
def test_one_setting_names_every_device(machine, cuda: int, mps: bool, device: str, picked: str) -> None:
    machine(cuda, mps)
    assert pick_device(device) == picked
    if not picked.startswith("cuda"):
        assert ExactIndex(device=device).device == FastestIndex(device=device).device == "cpu", "Apple's have no float64"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device=cuda, but PyTorch sees no GPU here; type device=cpu or device=auto"),
        ("gpu", "device=gpu, but PyTorch sees no GPU here"),
        ("mps", "device=mps, but PyTorch sees no GPU here"),
        ("cuda:2", "device=cuda:2, but PyTorch sees cuda, cuda:0, cuda:1 here"),
        ("tpu", "device=tpu: type auto, cpu, gpu, cuda, cuda:1 .* or mps"),
        ("cuda:x", "device=cuda:x: type auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused(machine, device: str, message: str) -> None:
    machine(2 if device == "cuda:2" else 0, False)
    with pytest.raises(ValueError, match=message):
        pick_device(device)


def test_training_takes_the_precision_of_the_device_it_runs_on(machine) -> None:
    machine(2, False)
    assert trainer_settings("cpu", 2, "auto") == {"accelerator": "cpu", "devices": 2, "precision": "32-true"}
    assert trainer_settings("auto", 1, "auto") == {"accelerator": "cuda", "devices": 1, "precision": "bf16-mixed"}
    assert trainer_settings("cuda:1", 1, "32-true") == {"accelerator": "cuda", "devices": [1], "precision": "32-true"}
    with pytest.raises(ValueError, match=r"device=cuda:1 is one GPU, but trainer.devices=4; type device=cuda"):
        trainer_settings("cuda:1", 4, "auto")
    machine(0, True)
    assert trainer_settings("auto", 1, "auto") == {"accelerator": "mps", "devices": 1, "precision": "32-true"}


@pytest.mark.parametrize("index", sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "index").glob("*.yaml")))
def test_the_device_reaches_every_part(index: str, configure: Callable[..., DictConfig]) -> None:
    cfg = configure("retrieve", f"index={index}", "device=cuda:1", "queries=Q")
    assert cfg.extraction.device == "cuda:1"
    assert cfg.index.get("device", "cuda:1") == "cuda:1", "a server searches by itself"
    assert configure("train", "device=cuda:1").trainer.accelerator == "cuda:1"
    assert configure("train", "trainer=ddp", "device=cpu").trainer.accelerator == "cpu"


@pytest.mark.parametrize(
    ("devices", "count"), [(2, 2), ("2", 2), ([3], 1), ("0,1", 2), ("1,", 1), (-1, 4), ("-1", 4), ("auto", 4), ("some", "some")]
)
def test_devices_are_counted(machine, devices: object, count: object) -> None:
    """A run that took all GPUs of a machine of four is not resumed on one of two."""
    machine(4, False)
    assert count_devices("auto", devices) == count


def test_several_devices(machine) -> None:
    machine(2, False)
    assert pick_devices("all", "auto") == ["cuda:0", "cuda:1"]
    assert pick_devices("all", "cpu") == ["cpu"]
    assert pick_devices(["cuda:1", "cpu"], "auto") == ["cuda:1", "cpu"]
    assert pick_devices(None, "auto") == ["cuda"]
