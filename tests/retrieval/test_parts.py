"""Re-ranking steps from their settings, and what happens where a package is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from safetensors.torch import save_file

from beauty_bafe.rerank.pair_network import PairNetwork
from beauty_bafe.retrieval.parts import build_parts, build_steps


def test_an_optional_step_is_left_out_with_a_word(
    configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rapidocr", reason="the extra `text`")
    steps = ["checkpoints=[a.ckpt]", "gallery=G", "queries=Q"]
    best = configure("retrieve", "experiment=best", *steps).rerank
    assert list(build_steps(best)) == ["small_copies", "sift_verified", "label_read"]
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr("beauty_bafe.extras.importlib.util.find_spec", lambda _: None)
    with caplog.at_level("WARNING", "beauty_bafe"):
        assert list(build_steps(best)) == ["small_copies", "sift_verified"]
    assert "label_read is left out: this needs the package rapidocr; type pip install 'beauty_bafe[text]'" in caplog.text
    with pytest.raises(InstantiationException, match="rapidocr"):
        build_steps(configure("retrieve", "rerank=label_read", *steps).rerank)


def test_small_copies_come_first(configure) -> None:
    words = ["rerank=[query_expansion,small_copies]", "checkpoints=[a.ckpt]", "gallery=G", "queries=Q"]
    with pytest.raises(ValueError, match="rerank=query_expansion,small_copies: small_copies must be the first step; type its"):
        build_steps(configure("retrieve", *words).rerank)


def test_what_is_learned_depends_on_what_makes_the_scores(configure, tiny_checkpoint: Path, tmp_path: Path) -> None:
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
    verified = about("score_fusion", "rerank=sift_verified")
    assert "lightness" in verified
    assert "contrast" in verified
    network = PairNetwork(pretrained=False)
    given = "rerank=sift_verified", f"rerank.sift_verified.network={tmp_path / 'verifier.safetensors'}"
    seen = set()
    for bias in (0.0, 0.0, 1.0):
        network.decide[-1].bias.data.fill_(bias)
        weights = {name: part.contiguous() for name, part in network.state_dict().items()}
        save_file(weights, tmp_path / "verifier.safetensors")
        seen.add(about("score_fusion", *given))
    assert len(seen) == 2, "trained again to the same file"
