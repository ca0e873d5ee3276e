"""Re-ranking steps from their settings, and what happens where a package is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException

from beauty_bafe.retrieval.parts import build_parts, build_steps


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
    assert "label_read is left out: this needs the package rapidocr; type pip install 'beauty_bafe[text]'" in caplog.text
    with pytest.raises(InstantiationException, match="rapidocr"):
        build_steps(configure("retrieve", "rerank=label_read", *steps).rerank)


def test_what_is_learned_depends_on_what_makes_the_scores(configure, tiny_checkpoint: Path) -> None:
    """An index_dir serves both fusions, whose scores differ a hundredfold; a report or k change nothing that is learned."""

    def about(ensemble: str, *overrides: str) -> str:
        given = [f"checkpoints=[{tiny_checkpoint}]", "gallery=G", "queries=Q", "pooling=gem", "query=whole"]
        return build_parts(configure("retrieve", *given, f"ensemble={ensemble}", *overrides)).about

    fused = about("score_fusion", "rerank=none")
    assert fused == about("score_fusion", "rerank=none", "k=3", "report=false")
    assert fused != about("rank_fusion", "rerank=none")
    for other in ("ensemble.depth=9", "rehearsal.views=9"):
        assert about("score_fusion", "rerank=none", other) != fused
    assert fused != about("score_fusion", "rerank=superglobal")
