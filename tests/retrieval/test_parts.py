"""Re-ranking steps from their settings, and what happens where a package is missing."""

from __future__ import annotations

import sys

import pytest
from hydra.errors import InstantiationException

from beauty_bafe.retrieval.parts import build_steps


def test_an_optional_step_is_left_out_with_a_word(
    configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rapidocr", reason="the extra `text`")
    steps = ["checkpoints=[a.ckpt]", "gallery=G", "queries=Q"]
    best = configure("retrieve", "experiment=best", *steps).rerank
    assert list(build_steps(best)) == ["sift_verified", "label_read"]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr("beauty_bafe.extras.importlib.util.find_spec", lambda _: None)
    with caplog.at_level("WARNING", "beauty_bafe"):
        assert list(build_steps(best)) == ["sift_verified"]
    assert "without label_read: this needs the package rapidocr; type pip install 'beauty_bafe[text]'" in caplog.text
    with pytest.raises(InstantiationException, match="rapidocr"):
        build_steps(configure("retrieve", "rerank=label_read", *steps).rerank)
