from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.data.catalog import Catalog, open_catalog
from beauty_bafe.evaluation.metrics import evaluate
from beauty_bafe.evaluation.report import write_report
from beauty_bafe.extraction.features import Features
from beauty_bafe.index.ranking import Ranking


@pytest.fixture
def page(toy: Path, tmp_path: Path, configure):
    """Three queries: q1 has its product third, q2 first, the last one misses it."""
    gallery, pictures = open_catalog(toy / "gallery"), open_catalog(toy / "queries")
    queries = Catalog(("q1", "q2", "q<0>"), pictures.paths[:3])
    ranking = Ranking(
        queries.ids, gallery.ids, np.array([[4, 5, 0], [0, 6, 7], [1, 2, 3]]), np.array([[0.9, 0.8, 0.7]] * 3, np.float32)
    )
    features = Features(np.zeros((3, 1), np.float32), queries.ids, np.full((3, 56, 56), 128, np.uint8))
    truth = {name: {gallery.ids[0]} for name in queries.ids}

    def render(*overrides: str, judged: bool = True) -> str:
        cfg = configure(
            "retrieve", "checkpoints=[a.ckpt]", "gallery=G", "queries=Q", "k=3", f"output_dir={tmp_path}", *overrides
        )
        evaluation = evaluate(ranking.as_answers(), truth, 3) if judged else None
        metrics = evaluation.summary() if evaluation else {}
        catalogs = {"gallery": gallery, "queries": queries}
        write_report(tmp_path / "report.html", cfg, ranking, features, catalogs, evaluation, metrics, truth if judged else None)
        return (tmp_path / "report.html").read_text()

    return render


def test_worst_first_with_true_answers_framed_and_misses_shown(page) -> None:
    html = page()
    assert re.findall(r"<h2>(q.*?)<span", html) == ["q&lt;0&gt;", "q1", "q2"]
    assert [f"{value:.2f}" for value in (0, 1 / 3, 1)] == re.findall(r"AP (\d\.\d\d)</span>", html)
    articles = re.findall(r"<article.*?</article>", html, re.DOTALL)
    assert ['class="match"' in article for article in articles] == [False, True, True]
    assert ["missed" in article for article in articles] == [True, False, False]
    assert "2 of 3 queries with a true product found one" in html
    assert f"{(0 + 1 / 3 + 1) / 3:.3f}" in html
    assert "<b>q<0>" not in html, "names are escaped"


def test_it_is_one_file_with_its_configuration(page) -> None:
    html = page()
    assert set(re.findall(r'src="(.{22})', html)) == {"data:image/webp;base64,"[:22]}
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "<script" not in html
    assert "report_queries: 200" in html


def test_length_is_limited_and_truth_is_optional(page) -> None:
    assert page("report_queries=1").count("<article") == 1
    html = page(judged=False)
    assert "No truth was given" in html
    assert "mAP@3" not in html
    assert 'class="match"' not in html
