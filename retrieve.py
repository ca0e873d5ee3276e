"""Answer queries from a gallery: python retrieve.py checkpoints='[RUN/checkpoints/best.ckpt]' gallery=DIR queries=DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli

CONF = Path(__file__).parent / "conf"


def retrieve(cfg: DictConfig) -> dict[str, Any]:
    """Retrieve as configured; writes submission.csv, with truth metrics.json, and report.html. Returns the metrics."""
    cli.require_retrieval_inputs(cfg)
    from hydra.utils import instantiate

    from beauty_bafe.data.catalog import Skipped, open_catalog
    from beauty_bafe.evaluation.masks import evaluate_masks
    from beauty_bafe.evaluation.metrics import evaluate, read_truth
    from beauty_bafe.evaluation.report import write_report
    from beauty_bafe.models.module import load_extractor
    from beauty_bafe.retrieval.features import extract
    from beauty_bafe.retrieval.submission import write_submission

    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output / "config.yaml", resolve=True)
    truth = read_truth(cfg.truth) if cfg.truth is not None else None
    index, ensemble, pooling = instantiate(cfg.index), instantiate(cfg.ensemble), instantiate(cfg.pooling)
    checkpoints = [cfg.checkpoints] if isinstance(cfg.checkpoints, str) else cfg.checkpoints
    extractors = [load_extractor(checkpoint) for checkpoint in checkpoints]
    options = {key: cfg[key] for key in ("batch_size", "num_workers", "device", "precision")}

    skipped, features, catalogs = Skipped(), {}, {}
    for what, name in (("gallery", "gallery pictures"), ("queries", "queries")):
        catalogs[what], unreadable = open_catalog(cfg[what]), Skipped()
        features[what] = extract(extractors, catalogs[what], pooling, unreadable, name, keep_masks=what == "queries", **options)
        skipped.rows += unreadable.rows
        skipped.write(output / "skipped.csv")
        unreadable.check(len(catalogs[what]), cfg.max_skipped, name, "max_skipped")

    gallery = ensemble.fit(features["gallery"]).transform(features["gallery"])
    queries = ensemble.transform(features["queries"])
    ranking = index.fit(gallery.vectors, gallery.ids).search(queries.vectors, queries.ids, cfg.k)
    for step in cfg.rerank.values():
        ranking = instantiate(step)(ranking, queries, gallery, index)
    write_submission(ranking, cfg.submission)
    print(f"{len(ranking.query_ids)} queries answered from {len(gallery.ids)} pictures: {cfg.submission}")

    evaluation = None if truth is None else evaluate(ranking.as_answers(), truth, cfg.k)
    metrics = {} if evaluation is None else evaluation.summary()
    metrics |= {} if cfg.masks is None else evaluate_masks(queries, cfg.masks)
    if metrics:
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)))
    if cfg.report:
        write_report(output / "report.html", cfg, ranking, queries, catalogs, evaluation, metrics, truth)
        print(f"report: {output / 'report.html'}")
    return metrics


@hydra.main(version_base="1.3", config_path="conf", config_name="retrieve")
def main(cfg: DictConfig) -> None:
    cli.run(retrieve, cfg)


if __name__ == "__main__":
    cli.check_overrides(CONF, "retrieve", sys.argv[1:])
    main()
