"""Every recipe of conf/experiment composes for both scripts and runs on twenty toy pictures, on tiny random networks."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from beauty_bafe.data.toy import draw_toy

from .conftest import ROOT, VIEWS

sys.path.insert(0, str(ROOT))
from retrieve import retrieve
from train import train

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
TRAINED = {"demo", "bafe_paper", "whitened_query_2020", "best_single", "best"}  # systems that need masks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_toy(tmp_path_factory.mktemp("small"), products=20, queries=10, seed=4, size=160, workers=1)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_answers(
    name: str, small: Path, tmp_path: Path, tiny: dict[str, Any], tiny_checkpoint: Path, configure: Callable[..., DictConfig]
) -> None:
    given = [
        f"{key}={small / folder}" for key, folder in {"gallery": "gallery", "queries": "queries", "truth": "truth.csv"}.items()
    ]
    given += [f"features={tmp_path / 'features'}", f"output_dir={tmp_path}", "num_workers=0", "report_queries=2"]
    given += [f"checkpoints=[{','.join([str(tiny_checkpoint)] * 3)}]"] if name in TRAINED else []
    cfg = configure("retrieve", f"experiment={name}", *given)
    # The systems' own networks are large and their weights far away; shapes are what counts here.
    if cfg.get("model") is not None:
        cfg.model = tiny
    cfg.models = dict.fromkeys(cfg.models, tiny)
    cfg.size = None
    if cfg.ensemble.get("pca"):
        cfg.ensemble.pca = 8
    metrics = retrieve(cfg)
    answers = {row[0]: row[1:] for row in csv.reader((tmp_path / "submission.csv").open())}
    assert len(answers) == 10
    truth = {row["query"]: row["product"] for row in csv.DictReader((small / "truth.csv").open())}
    ranks = [answers[query].index(product) + 1 if product in answers[query] else 0 for query, product in truth.items()]
    assert metrics["mAP@7_by_min"] == pytest.approx(sum(1 / rank for rank in ranks if rank) / len(truth))
    assert metrics["dimensions"] > 0
    assert metrics["index_bytes"] >= metrics["dimensions"] * 20 * 4


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_trains(
    name: str, small: Path, tmp_path: Path, tiny: dict[str, Any], configure: Callable[..., DictConfig]
) -> None:
    """Those that train nothing themselves leave train.py's own recipe."""
    given = ["data=folder", f"data.root={small / 'gallery'}", "data.num_workers=0", f"output_dir={tmp_path}"]
    cfg = configure("train", f"experiment={name}", *given)
    cfg.model = tiny | {key: cfg.model[key] for key in ("pad", "gate_layers", "frozen")}
    cfg.trainer.max_epochs = 1
    assert train(cfg)["train/loss"] > 0


def test_the_hybrid_grid_prints_the_papers_table(small: Path, tmp_path: Path, tiny: dict[str, Any]) -> None:
    """As typed, in small: one network, two poolings, two distances, without and with SIFT."""
    taps = ",".join(tiny["taps"])
    network = [f"model.{key}={tiny[key]}" for key in ("name", "last", "size", "hidden", "pretrained")]
    network += [f"model.taps=[{taps}]", "model.weights=null"]
    shop = [f"gallery={small / 'gallery'}", f"queries={small / 'queries'}", f"truth={small / 'truth.csv'}"]
    grid_of = ["model=efficientnet_lite0", "pooling=mac,spoc", "index.metric=l1,ip", "rerank=none,sift"]
    place = ["num_workers=0", VIEWS, f"features={tmp_path / 'features'}", f"output_dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(ROOT / "retrieve.py"), "-m", "experiment=hybrid_grid", *grid_of, *network, *shop, *place]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    grid = (tmp_path / "sweep" / "grid.md").read_text()
    assert grid in done.stdout
    lines = [line for line in grid.splitlines() if line.startswith("| efficientnet_lite0")]
    assert [line.split("|")[2].strip() for line in lines] == ["L1", "L2", "cos"]
    assert lines[0].count("→") == 4
    assert "– → –" in lines[1], "L2 was not asked for"
    first = json.loads((tmp_path / "sweep" / "0" / "metrics.json").read_text())["mAP@7_by_matches"]
    assert f"| efficientnet_lite0 | L1 | {first:.3f} → " in grid


def test_a_network_without_masks_is_not_asked_for_any(
    small: Path, tmp_path: Path, tiny: dict[str, Any], configure: Callable[..., DictConfig]
) -> None:
    given = [f"gallery={small / 'gallery'}", f"queries={small / 'queries'}", f"features={tmp_path}", f"output_dir={tmp_path}"]
    for overrides, message in (
        (
            ["model=efficientnet_lite0", "pooling=attention"],
            "needs masks, but test_efficientnet was not trained to predict any; .* such as pooling=gem",
        ),
        (
            ["model=efficientnet_lite0", "pooling=gem", "query=whitened"],
            "not trained to predict masks, which this query view requires",
        ),
        (["model=efficientnet_lite0", "pooling=gem", "pairs={second: [gem]}"], "pairs names 'second'; the networks are model"),
        (["pooling=gem"], r"needs checkpoints=.* or model=NAME"),
    ):
        cfg = configure("retrieve", *given, *overrides)
        if cfg.get("model") is not None:
            cfg.model = tiny
        with pytest.raises(ValueError, match=message):
            retrieve(cfg)
