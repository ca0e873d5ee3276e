"""Train a verifier: beauty-bafe verifier checkpoints='[RUN/checkpoints/best.ckpt]' gallery=GALLERY output_dir=VERIFIER"""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")

NAME = "verifier.safetensors"


def verifier(cfg: DictConfig) -> Path:
    """Train a network that compares aligned pictures, on street views of a gallery; returns the file that it writes.

    If it was stopped, the same command with the same output_dir draws and pairs the pictures again, and continues training
    after the last complete epoch.
    Raises ValueError for wrong settings, or a folder made with other settings.
    """
    if not cfg.checkpoints or (cfg.gallery is None and cfg.index_dir is None):
        raise ValueError(
            "verifier needs gallery=DIR_OR_CSV and checkpoints='[RUN/checkpoints/best.ckpt]', the same as retrieve.py will use"
        )
    for key, value, least in [
        ("rehearsal.views", cfg.rehearsal.views, 1),
        ("rounds", cfg.rounds, 1),
        ("epochs", cfg.epochs, 1),
        ("candidates", cfg.candidates, 2),
    ]:
        if value < least:
            raise ValueError(f"{key}={value}: type {least} or more")
    recipe.resolve_auto(cfg, CONF)
    import torch
    from safetensors.torch import save

    from beauty_bafe.data.catalog import Skipped
    from beauty_bafe.data.places import stamps
    from beauty_bafe.extraction.members import describe_members
    from beauty_bafe.manifest import check_manifest, digest, replace_file
    from beauty_bafe.rerank.candidates import Candidates, SearchContext
    from beauty_bafe.rerank.dense_training import View, collect_views, train_pair_network
    from beauty_bafe.rerank.verification import Verification
    from beauty_bafe.retrieval.gallery import Gallery
    from beauty_bafe.retrieval.parts import build_parts, build_steps

    names, steps = list(cfg.rerank), list(build_steps(cfg.rerank).values())
    step = steps[0] if len(names) == len(steps) == 1 else None
    if not isinstance(step, Verification) or step.network is not None:
        raise ValueError(
            f"rerank={','.join(names) or 'none'}: type one re-ranking by keypoints, without a network, as in "
            "rerank=sift_verified; use the network with the same one later"
        )
    output, skipped = Path(cfg.output_dir), Skipped()
    output.mkdir(parents=True, exist_ok=True)
    parts = build_parts(cfg)
    gallery = Gallery(parts.members, parts.extraction, parts.ensemble, parts.view)
    views: list[View] = []
    try:
        gallery.open(cfg.gallery, cfg.index_dir, parts.index, skipped)
        made = {
            "members": describe_members(parts.members),
            "photos": digest(*gallery.catalog.ids, *stamps(gallery.catalog.paths)),
            "rerank, rehearsal, query, ensemble": digest(parts.about),
            **{key: cfg[key] for key in ("rounds", "candidates", "epochs", "seed")},
        }
        note, unfinished = output / "verifier.json", output / "verifier.ckpt"
        if note.exists():
            check_manifest(note, made, "type another output_dir=FOLDER")
        for number in range(cfg.rounds):
            folder = output / f"views-{number}"
            drawn = parts.rehearsal.draw(gallery.catalog, folder, (1, cfg.seed, number))  # others than retrieve.py learns from
            if not len(drawn):
                raise ValueError(
                    "no photo of the gallery is a file with a plain backdrop, so no street views can be drawn; type "
                    "gallery=FOLDER with catalogue photos of one product each"
                )
            described = gallery.describe(drawn, str(folder), "street views of gallery pictures", skipped)
            [queries, *_], index = gallery.ensemble.transform(described), gallery.indexes[0]
            context = SearchContext(gallery.catalog, drawn, parts.extraction.root)
            depth = min(cfg.candidates, len(index))
            found = Candidates(index.search(queries.vectors, queries.ids, depth), queries, index, context)
            views += collect_views(found, step.detector, step.matcher, depth)
    finally:
        skipped.write(output / "skipped.csv")
    replace_file(note, lambda part: part.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
    log.info(f"learning from {len(views)} street views of {len(gallery.catalog)} photos")

    state = torch.load(unfinished, map_location="cpu", weights_only=True) if unfinished.exists() else None
    network = train_pair_network(
        views, cfg.epochs, cfg.seed, cfg.device, state, lambda state: replace_file(unfinished, partial(torch.save, state))
    )
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    replace_file(output / NAME, lambda part: part.write_bytes(save(weights)))
    log.info(f"written: {output / NAME}; use it with rerank={names[0]} rerank.{names[0]}.network='{output / NAME}'")
    return output / NAME


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="verifier")
def _run(cfg: DictConfig) -> None:
    cli.run(verifier, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "verifier", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
