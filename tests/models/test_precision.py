from __future__ import annotations

import copy

import pytest
import torch

from beauty_bafe.models.precision import fastest_precision, keep_memory, spare_depthwise


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_only_where_the_processor_multiplies_it(supported: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
    assert fastest_precision("cpu") == expected
    assert fastest_precision("cuda") == expected


def test_without_a_device_named_the_gpu_decides_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fastest_precision() == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastest_precision() == "32-true"


@pytest.mark.parametrize("groups", [1, 4])
def test_depthwise_convolutions_stay_float32_under_autocast(groups: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3, groups=groups)
    network, x = torch.nn.Sequential(layer), torch.randn(1, 4, 8, 8)
    exact = network(x)
    spare_depthwise(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = copy.deepcopy(network)(x)
    assert mixed.dtype == (torch.bfloat16 if groups == 1 else torch.float32)
    assert torch.equal(mixed, exact) == (groups == 4)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]


def test_memory_is_kept_without_harm() -> None:
    keep_memory()
    assert torch.ones(1 << 24).sum() == 1 << 24
