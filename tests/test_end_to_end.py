"""From pictures on disk to submission and report, through the two scripts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.data.toy import draw_toy
from beauty_bafe.retrieval.submission import check_submission

from .conftest import ROOT

sys.path.insert(0, str(ROOT))
from retrieve import retrieve
from train import train


def test_attention_learns_to_beat_average_pooling(tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    """The product's promise in small: toy catalogue, real ImageNet features, few steps."""
    street = draw_toy(tmp_path, products=96, queries=100, seed=5, size=224, workers=1)
    run = tmp_path / "run"
    metrics = train(
        configure(
            "train",
            "data=folder",
            f"data.root={street / 'gallery'}",
            "data.batch_size=6",
            "data.num_workers=0",
            "model.hidden=128",
            "objective=saliency",
            "objective.lr=1e-3",
            "objective.warmup=30",
            "trainer.max_epochs=6",
            "+trainer.check_val_every_n_epoch=3",
            f"output_dir={run}",
        )
    )
    for file in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.json",
        "curves.png",
        "csv/version_0/metrics.csv",
    ):
        assert (run / file).stat().st_size > 0, file
    history = json.loads((run / "metrics.json").read_text())["epochs"]
    assert history[-1]["train/loss"] < 0.8 * history[0]["train/loss"]
    assert metrics["val/iou"] == history[-1]["val/iou"]

    results = {}
    for pooling in ("spoc", "attention"):
        results[pooling] = retrieve(
            configure(
                "retrieve",
                f"pooling={pooling}",
                f"checkpoints=[{run}/checkpoints/best.ckpt]",
                f"gallery={street / 'gallery'}",
                f"queries={street / 'queries'}",
                f"truth={street / 'truth.csv'}",
                f"masks={street / 'masks'}",
                "num_workers=0",
                "report_queries=5",
                "rehearsal.views=0",
                f"features={tmp_path / 'features'}",
                f"output_dir={tmp_path / pooling}",
            )
        )
    average, attention = results["spoc"], results["attention"]
    assert attention["mask_iou"] > average["mask_iou"] + 0.04  # six short epochs; most queries are held or turned
    assert attention["mAP@7_by_min"] > average["mAP@7_by_min"] + 0.03
    assert average["mAP@7_by_min"] > 0.1, "real features find something"

    rows = list(csv.reader((tmp_path / "attention" / "submission.csv").open()))
    assert len(rows) == 100
    assert all(len(row) == 8 and len(set(row)) == 8 for row in rows)
    html = (tmp_path / "attention" / "report.html").read_text()
    assert html.count("<article") == 5
    assert "http://" not in html
    assert "https://" not in html
    assert f"{attention['mAP@7_by_min']:.3f}" in html
    assert not (tmp_path / "attention" / "skipped.csv").exists()


@pytest.fixture
def retrieval(
    toy: Path, tiny_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig]
) -> Callable[..., DictConfig]:
    def build(*overrides: str) -> DictConfig:
        given = {word.split("=")[0] for word in overrides}
        defaults = {
            "checkpoints": f"[{tiny_checkpoint}]",
            "gallery": toy / "gallery",
            "queries": toy / "queries",
            "output_dir": tmp_path / "out",
            "features": tmp_path / "features",
            "num_workers": 0,
        }
        return configure("retrieve", *(f"{key}={value}" for key, value in defaults.items() if key not in given), *overrides)

    return build


def test_broken_queries_are_listed_and_left_out(toy: Path, tmp_path: Path, retrieval: Callable[..., DictConfig]) -> None:
    folder = tmp_path / "queries"
    folder.mkdir()
    pictures = sorted((toy / "queries").iterdir())[:18]
    for picture in pictures:
        (folder / picture.name).symlink_to(picture)
    (folder / "cut.jpg").write_bytes(pictures[0].read_bytes()[:800])
    (folder / "empty.png").touch()
    retrieve(retrieval(f"queries={folder}", "report=false"))
    assert [row[0] for row in csv.reader((tmp_path / "out" / "skipped.csv").open())] == ["id", "cut", "empty"]
    answered = [row[0] for row in csv.reader((tmp_path / "out" / "submission.csv").open())]
    assert answered == [picture.stem for picture in pictures]
    with pytest.raises(ValueError, match=r"2 of 20 queries cannot be read, more than max_skipped=0.05"):
        retrieve(retrieval(f"queries={folder}", "report=false", "max_skipped=0.05"))


def test_a_share_that_is_none_is_refused_at_once(tmp_path: Path, retrieval: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="known_at=5: type the share of unknown products to accept as known, from 0 to 1"):
        retrieve(retrieval("known_at=5"))
    assert not (tmp_path / "features").exists(), "nothing was described"


def test_report_without_truth_and_without_masks(tmp_path: Path, retrieval: Callable[..., DictConfig]) -> None:
    metrics = retrieve(retrieval("report_queries=3", "pooling=spoc"))
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(metrics) == {"dimensions", "ms_per_query", "index_bytes"}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "No truth was given" in html


def test_ensembles_and_reranking_run_together(
    tmp_path: Path, tiny_checkpoint: Path, toy: Path, retrieval: Callable[..., DictConfig]
) -> None:
    pair = f"checkpoints=[{tiny_checkpoint},{tiny_checkpoint}]"
    several = "+pooling@poolings.gem=gem"
    steps = "rerank=[query_expansion,superglobal]"
    for number, choice in enumerate(("zscore", "pca_whitening", "rank_fusion")):
        pca = ["ensemble.pca=16"] if choice == "pca_whitening" else []
        out = tmp_path / str(number)
        metrics = retrieve(
            retrieval(
                pair,
                several,
                steps,
                f"ensemble={choice}",
                *pca,
                f"truth={toy / 'truth.csv'}",
                f"output_dir={out}",
                "report=false",
            )
        )
        assert 0 < metrics["recall@7"] <= 1
        assert check_submission(out / "submission.csv", 7, *(open_catalog(toy / n).ids for n in ("gallery", "queries"))) == []
        rows = list(csv.DictReader((out / "per_query.csv").open()))
        assert len(rows) == 24
        assert sum(float(row["recall@7"]) for row in rows) / 24 == pytest.approx(metrics["recall@7"])


def test_an_index_kept_on_disk_answers_without_the_gallery(
    tmp_path: Path, toy: Path, retrieval: Callable[..., DictConfig]
) -> None:
    """Built once; another day with the queries alone; the report still finds the gallery's pictures."""
    kept = f"index_dir={tmp_path / 'index'}"
    retrieve(retrieval(kept, "report=false"))
    answers = (tmp_path / "out" / "submission.csv").read_text()
    retrieve(retrieval(kept, "gallery=null", f"features={tmp_path / 'elsewhere'}", f"output_dir={tmp_path / 'later'}"))
    assert (tmp_path / "later" / "submission.csv").read_text() == answers
    assert (tmp_path / "later" / "report.html").read_text().count("<img") > 24


def test_the_same_command_again_describes_nothing(
    tmp_path: Path, retrieval: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    retrieve(retrieval("report=false"))
    assert "described 48 gallery pictures" in capsys.readouterr().out
    retrieve(retrieval("report=false"))
    assert "described" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("k=49", "k=49, but the gallery has 48 readable pictures"),
        ("index=flat index.device=gpu", "index.device=gpu, but faiss sees no GPU"),
        ("index.device=gpu", "device=gpu, but PyTorch sees no GPU here"),
        ("ensemble=pca", "ensemble.pca=512 of 256 dimensions and 48 gallery pictures"),
        ("ensemble.weights=[1,2]", "for 1 members; give one number"),
        ("checkpoints=[nothing.ckpt]", "checkpoint 'nothing.ckpt' does not exist"),
        ("queries=nowhere", "'nowhere' does not exist; name a folder"),
        ("truth=nowhere.csv", "truth='nowhere.csv' does not exist"),
    ],
)
def test_mistakes_are_answered(retrieval: Callable[..., DictConfig], override: str, message: str) -> None:
    if override.startswith("index") and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    with pytest.raises(Exception, match=message):
        retrieve(retrieval(*override.split(), "report=false"))


def test_an_empty_query_folder_is_named(tmp_path: Path, retrieval: Callable[..., DictConfig]) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"no pictures under '.*nothing'; supported suffixes: .*\.jpg"):
        retrieve(retrieval(f"queries={tmp_path / 'nothing'}", "report=false"))


def test_the_shared_benchmark_is_readable(shared: Path) -> None:
    """Every file of the benchmark in reach opens, its masks fit its queries, and truth names what is there."""
    from beauty_bafe.evaluation.metrics import read_truth

    dev = shared / "benchmark" / "dev"
    gallery, queries, masks = (set(open_catalog(dev / name).ids) for name in ("gallery", "queries", "masks"))
    truth = read_truth(dev / "truth.csv")
    assert queries == masks == set(truth)
    assert set().union(*truth.values()) <= gallery
