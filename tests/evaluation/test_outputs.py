"""The sweep's summary, the table over runs, and mask figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.evaluation.masks import evaluate_masks
from beauty_bafe.evaluation.summary import write_summary
from beauty_bafe.evaluation.table import show
from beauty_bafe.retrieval.features import Features


def test_summary_has_a_row_a_job(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra" / "overrides.yaml").write_text(f"- seed={number}\n- output_dir=x\n")
    (tmp_path / "0" / "metrics.json").write_text(json.dumps({"val/iou": 0.5, "epochs": []}))
    (tmp_path / "10" / "metrics.json").write_text(json.dumps({"val/iou": 0.7}))
    write_summary(tmp_path)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["job"], row["seed"], row["val/iou"], row["status"]) for row in rows] == [
        ("0", "0", "0.5", ""),
        ("2", "2", "", "failed"),
        ("10", "10", "0.7", ""),
    ]


def test_table_over_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("average", 0.25), ("attention", 0.5)):
        (tmp_path / name).mkdir()
        metrics = {"mAP@7_by_min": value, "mAP@7_by_min_interval": [value - 0.1, value + 0.1], "recall@1": value / 2}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics | ({"mask_iou": 0.75} if value == 0.5 else {})))
    show([str(tmp_path / "average"), str(tmp_path / "attention")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "a" in line and "0." in line]
    assert [word in lines[0] for word in ("average", "0.250", "0.150 – 0.350", "0.125", "–")] == [True] * 5
    assert [word in lines[1] for word in ("attention", "0.500", "0.750")] == [True] * 3
    with pytest.raises(ValueError, match=r"no metrics.json; name folders that retrieve.py wrote"):
        show([str(tmp_path)])


def test_masks_are_compared_by_name_on_the_letterboxed_canvas(tmp_path: Path) -> None:
    true = np.zeros((100, 200), np.uint8)  # oblong: the canvas has bars above and below
    true[:, :100] = 255
    Image.fromarray(true).save(tmp_path / "q1.png")
    predicted = np.zeros((56, 56), np.uint8)
    predicted[14:42, :28] = 255
    features = Features(np.zeros((2, 1), np.float32), ("q0", "q1"), np.stack([predicted * 0, predicted]))
    result = evaluate_masks(features, tmp_path)
    assert result["mask_count"] == 1
    assert result["mask_iou"] > 0.97
    assert result["mask_mae"] < 0.02
    with pytest.raises(ValueError, match="has no mask for 'other'"):
        evaluate_masks(Features(features.vectors[:1], ("other",), features.masks[:1]), tmp_path)
