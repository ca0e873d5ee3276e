"""Answer queries from a gallery: python retrieve.py checkpoints='[RUN/checkpoints/best.ckpt]' gallery=DIR queries=DIR"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")


def retrieve(cfg: DictConfig) -> dict[str, Any]:
    """Retrieve as configured; writes submission.csv, answers.csv, report.html and metrics.json, and returns the metrics."""
    cli.require_retrieval_inputs(cfg)
    recipe.resolve_auto(cfg, CONF)
    from beauty_bafe.data.catalog import Skipped, open_catalog
    from beauty_bafe.evaluation.certainty import Certainty
    from beauty_bafe.evaluation.masks import evaluate_masks
    from beauty_bafe.evaluation.metrics import evaluate, read_truth
    from beauty_bafe.evaluation.report import write_report
    from beauty_bafe.extraction.features import mean_masks
    from beauty_bafe.retrieval.calibration import check_rate
    from beauty_bafe.retrieval.gallery import Gallery
    from beauty_bafe.retrieval.parts import build_parts
    from beauty_bafe.retrieval.submission import write_answers, write_submission

    check_rate(cfg.known_at)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output / "config.yaml", resolve=True)
    truth = read_truth(cfg.truth) if cfg.truth is not None else None
    parts = build_parts(cfg)

    skipped = Skipped()
    gallery = Gallery(parts.members, parts.extraction, parts.ensemble, parts.view)
    try:
        gallery.open(cfg.gallery, cfg.index_dir, parts.index, skipped)
        gallery.rehearse(parts.steps, parts.rehearsal, parts.about, cfg.index_dir)
        query_catalog = open_catalog(cfg.queries)
        described = gallery.describe(query_catalog, cfg.queries, "queries", skipped)
    finally:
        skipped.write(output / "skipped.csv")

    start = time.perf_counter()
    shortlist = gallery.shortlist(query_catalog, described, cfg.k)
    ranking = shortlist.first(cfg.k)
    milliseconds = 1e3 * (time.perf_counter() - start) / len(ranking.query_ids)
    queries, catalogs = mean_masks(described), {"gallery": gallery.catalog, "queries": query_catalog}
    threshold = None if gallery.calibration is None else gallery.calibration.threshold(cfg.known_at)
    write_submission(ranking, cfg.submission)
    log.info(f"{len(ranking.query_ids)} queries answered from {len(ranking.gallery_ids)} pictures: {cfg.submission}")
    write_answers(ranking, output / "answers.csv", threshold)

    evaluation = None if truth is None else evaluate(ranking.as_answers(), truth, cfg.k)
    metrics = gallery.costs() | {"ms_per_query": milliseconds} | ({} if evaluation is None else evaluation.summary())
    if evaluation is not None:
        evaluation.write_per_query(output / "per_query.csv")
    certainty = None
    if truth is not None and gallery.calibration is not None and threshold is not None:
        certainty = Certainty.from_ranking(shortlist, truth, gallery.calibration, threshold)
        metrics |= {} if certainty is None else certainty.summary()
    metrics |= {} if cfg.masks is None else evaluate_masks(queries, cfg.masks)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    log.info("  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))
    if cfg.report:
        write_report(output / "report.html", cfg, ranking, queries, catalogs, evaluation, metrics, truth, threshold, certainty)
        log.info(f"report: {output / 'report.html'}")
    return metrics


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="retrieve")
def _run(cfg: DictConfig) -> None:
    cli.run(retrieve, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "retrieve", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
