"""The sweep's summary, the table over runs, and mask figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.evaluation.grid import as_grid
from beauty_bafe.evaluation.masks import evaluate_masks
from beauty_bafe.evaluation.summary import write_summary
from beauty_bafe.evaluation.table import main, make_table
from beauty_bafe.extraction.features import Features


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


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs over 40 queries: `attention` finds every product, `average` every second one."""
    for name, values in (("average", [0.0, 1.0] * 20), ("attention", [1.0] * 40)):
        folder = tmp_path / name
        folder.mkdir()
        mean = float(np.mean(values))
        metrics: dict[str, object] = {"dimensions": 512, "ms_per_query": 1.234, "index_bytes": 2_500_000, "recall@1": mean}
        metrics |= {f"mAP@7_by_{division}": mean for division in ("hits", "matches", "min")}
        metrics["mAP@7_by_min_interval"] = [mean - 0.1, mean + 0.1]
        (folder / "metrics.json").write_text(json.dumps(metrics | ({"mask_iou": 0.75} if mean == 1 else {})))
        with (folder / "per_query.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("query", "AP@7_by_min"), *((f"q{i}", value) for i, value in enumerate(values))])
    return [str(tmp_path / "average"), str(tmp_path / "attention")]


def test_table_over_runs(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*runs, "--against", runs[0], "--output", str(tmp_path / "tables" / "systems")])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("to average", "0.400 – 0.600", "+0.500 *", "0.750", "1.23", "2.5", "512"))
    rows = list(csv.DictReader((tmp_path / "tables" / "systems.csv").open()))
    assert [row["run"] for row in rows] == ["average", "attention"]
    assert [row["to average"] for row in rows] == ["", "+0.500 *"]
    markdown = (tmp_path / "tables" / "systems.md").read_text()
    assert "| attention | 1.000 | 0.900 – 1.100 |" in markdown
    page = (tmp_path / "tables" / "systems.html").read_text()
    assert "<td>attention</td><td>1.000</td>" in page
    assert (tmp_path / "tables" / "systems.png").stat().st_size > 5000
    assert "systems.png" in printed


@pytest.mark.parametrize("name", ["dev-0.5", "dev-0.5.md"])
def test_a_tables_name_may_have_a_dot(runs: list[str], tmp_path: Path, name: str) -> None:
    main([*runs, "--output", str(tmp_path / "tables" / name)])
    written = {file.name for file in (tmp_path / "tables").iterdir()}
    assert written == {f"dev-0.5.{kind}" for kind in ("csv", "html", "md", "png")}


def test_a_table_says_what_it_cannot_compare(runs: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no metrics.json and per_query.csv; name runs of retrieve.py with truth"):
        main([str(tmp_path)])
    rows = (tmp_path / "average" / "per_query.csv").read_text().replace("q7,", "x7,")
    (tmp_path / "average" / "per_query.csv").write_text(rows)
    with pytest.raises(SystemExit, match="runs with different queries cannot be compared"):
        main([*runs, "--against", runs[0]])


def test_a_sweep_is_its_jobs(runs: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    for number, (run, pooling) in enumerate(zip(runs, ("spoc", "gem"), strict=True)):
        job = Path(run).rename(tmp_path / "sweep" / str(number))
        (job / ".hydra").mkdir()
        (job / ".hydra" / "overrides.yaml").write_text(f"- gallery=G\n- pooling={pooling}\n")
    rows = make_table([str(tmp_path / "sweep")], None)
    assert [(row["run"], row["min"]) for row in rows[1:]] == [("sweep pooling=spoc", "0.500"), ("sweep pooling=gem", "1.000")]


def test_no_difference_is_not_marked(runs: list[str]) -> None:
    assert [row.get("difference") for row in make_table(runs, runs[1])[1:]] == ["-0.500 *", ""]
    same = [runs[0], runs[0] + "/."]
    assert [row["difference"] for row in make_table([*same, runs[1]], runs[1])[1:]] == ["-0.500 *", "-0.500 *", ""]


def test_the_hybrid_papers_grid() -> None:
    rows = [
        {"model": model, "index.metric": metric, "pooling": pooling, "rerank": rerank, "mAP@7_by_matches": value}
        for model in ("seresnet152", "efficientnet_lite0")
        for metric in ("l1", "ip")
        for pooling, value in (("mac", 0.25), ("spoc", 0.5))
        for rerank in ("none", "sift")
    ]
    rows[-1] |= {"mAP@7_by_matches": ""}  # a failed job
    lines = as_grid(rows).splitlines()
    assert "| seresnet152 | cos | 0.250 → 0.250 (0.292 → 0.379) | – → – (0.296 → 0.341) |" in lines[4]
    assert lines[4].startswith("| seresnet152 | cos |")
    assert lines[7] == "| efficientnet_lite0 | cos | 0.250 → 0.250 | – → – | – → – | 0.500 → – |"


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
