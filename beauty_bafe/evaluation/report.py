"""A retrieval run as one self-contained html file: pictures, masks, answers, metrics, configuration."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ..data.catalog import Catalog
from ..data.pictures import letterbox, read_picture
from ..data.places import Place
from ..extraction.features import Features
from ..index.ranking import Ranking
from ..retrieval.submission import is_known
from .certainty import Certainty
from .metrics import DIVISIONS, Evaluation

THUMB, QUERY = 132, 168  # pixels
METRIC_NAMES = {
    "hits": "AP over matches found (the challenge teams')",
    "matches": "AP over all true matches",
    "min": "AP over min(matches, k), the usual one",
}


def write_report(
    file: Path,
    cfg: DictConfig,
    ranking: Ranking,
    queries: Features,
    catalogs: Mapping[str, Catalog],
    evaluation: Evaluation | None,
    metrics: Mapping[str, Any],
    truth: Mapping[str, Collection[str]] | None,
    threshold: float | None = None,
    certainty: Certainty | None = None,
) -> None:
    """Write the report; with truth, the worst queries come first. `catalogs`: "gallery" and "queries".

    `threshold`: the probability from which a product counts as known. `certainty`: adds a reliability diagram.
    """
    from rich.progress import track

    paths = {what: dict(zip(catalog.ids, catalog.paths, strict=True)) for what, catalog in catalogs.items()}
    precision = {}
    if evaluation is not None:
        by_min = next(values for name, values in evaluation.values.items() if name.endswith("_by_min"))
        precision = dict(zip(evaluation.query_ids, by_min.tolist(), strict=True))
    rows = range(len(ranking.query_ids))
    # Worst first, of equal ones the most confident mistake; without truth, the least confident answer first.
    sign = -1 if precision else 1
    sure = ranking.scores if ranking.probabilities is None else ranking.probabilities
    order = sorted(rows, key=lambda row: (precision.get(ranking.query_ids[row], 2.0), sign * float(sure[row, 0])))
    shown = order[: cfg.report_queries]
    entries = [
        _entry(row, ranking, queries, paths, precision, (truth or {}).get(ranking.query_ids[row], ()), threshold)
        for row in track(shown, f"drawing {len(shown)} queries of the report")
    ]
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html.j2")
    html = page.render(
        entries=entries,
        total=len(ranking.query_ids),
        known=len(precision),
        gallery=len(ranking.gallery_ids),
        k=ranking.positions.shape[1],
        cards=_cards(metrics, cfg.k),
        bins=() if certainty is None else certainty.bins(),
        judged=bool(precision),
        sure=ranking.probabilities is not None,
        found=sum(1 for query in ranking.query_ids if precision.get(query, 0) > 0),
        unanswered=evaluation.unanswered if evaluation else (),
        config=OmegaConf.to_yaml(cfg, resolve=True),
    )
    file.write_text(html, encoding="utf-8")


def _entry(
    row: int,
    ranking: Ranking,
    queries: Features,
    paths: Mapping[str, Mapping[str, Place]],
    precision: Mapping[str, float],
    matches: Collection[str],
    threshold: float | None,
) -> dict[str, Any]:
    query, answers = ranking.query_ids[row], ranking.answers(row)
    picture = letterbox(read_picture(paths["queries"][query], QUERY).rgb, QUERY)
    overlay = picture if queries.masks is None else _overlay(picture, queries.masks[row])
    missed = sorted(set(matches) - set(answers))
    return {
        "query": query,
        "picture": _data_url(picture),
        "overlay": _data_url(overlay),
        "precision": precision.get(query),
        "answers": [
            {
                "id": answer,
                "score": float(score),
                "probability": sure,
                "match": answer in matches,
                "picture": _thumb(paths["gallery"][answer]),
            }
            for answer, score, sure in zip(answers, ranking.scores[row], ranking.certainty(row), strict=True)
        ],
        "unknown": ranking.probabilities is not None and threshold is not None and not is_known(ranking, row, threshold),
        "missed": [
            {"id": name, "picture": _thumb(paths["gallery"][name]) if name in paths["gallery"] else None} for name in missed[:2]
        ],
    }


def _cards(metrics: Mapping[str, Any], k: int) -> list[dict[str, Any]]:
    """The metrics to show: name, value, interval, explanation."""
    cards = [
        {"name": f"mAP@{k} / {division}", "key": f"mAP@{k}_by_{division}", "note": METRIC_NAMES[division]}
        for division in reversed(DIVISIONS)
    ]
    cards += [
        {"name": f"recall@{n}", "key": f"recall@{n}", "note": f"queries with a match in the first {n}"}
        for n in dict.fromkeys((1, k))
    ]
    cards += [
        {"name": "AUROC", "key": "auroc", "note": "a known product's answer is more probable than an unknown one's"},
        {"name": "calibration error", "key": "calibration_error", "note": "mean gap between probability and accuracy"},
        {"name": "recognised", "key": "recognised", "note": "known products accepted as known"},
        {"name": "falsely accepted", "key": "false_acceptance", "note": "unknown products accepted as known"},
        {"name": "mask IoU", "key": "mask_iou", "note": "predicted against true masks"},
        {"name": "mask MAE", "key": "mask_mae", "note": "mean absolute difference from the true masks"},
        {"name": "mask F-beta", "key": "mask_f_beta", "note": "beta² = 0.3"},
    ]
    return [
        card | {"value": metrics[card["key"]], "interval": metrics.get(f"{card['key']}_interval")}
        for card in cards
        if card["key"] in metrics
    ]


def _overlay(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fade what the network ignores to grey, and draw the contour at 0.5."""
    weight = cv2.resize(mask, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    grey = np.repeat(picture.mean(axis=2, keepdims=True) * 0.35 + 140, 3, axis=2)
    share = weight[..., None] / 255
    blended = (picture * share + grey * (1 - share)).astype(np.uint8)
    contours, _ = cv2.findContours((weight > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.ascontiguousarray(blended), contours, -1, (214, 34, 110), 1, cv2.LINE_AA)


def _thumb(path: Place) -> str:
    return _data_url(letterbox(read_picture(path, THUMB).rgb, THUMB))


def _data_url(picture: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", quality=78)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
