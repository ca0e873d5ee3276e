from __future__ import annotations

import pytest
import torch

from beauty_bafe.models.precision import fastest_precision, keep_memory


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


def test_memory_is_kept_without_harm() -> None:
    keep_memory()
    assert torch.ones(1 << 24).sum() == 1 << 24
