"""Write a checkpoint for other programs: beauty-bafe export checkpoint=RUN/checkpoints/best.ckpt output_dir=OUT"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")

if TYPE_CHECKING:
    from torch import Tensor

    from beauty_bafe.data.catalog import Catalog

LEAST_PICTURES = 10  # one batch of 1, one of 2, one of 7


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write model.safetensors, config.json, model.onnx, query.onnx if queries are described by a view, and README.md.

    Writes all files or none: if it fails, an earlier export is left unchanged. Returns the facts about each ONNX file.
    Raises ImportError without the extra `export`, ValueError for wrong settings, RuntimeError if the outputs of a file differ
    from PyTorch's.
    """
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise ValueError("export needs checkpoint=RUN/checkpoints/best.ckpt, written by train.py")
    if cfg.most_pictures < LEAST_PICTURES:
        raise ValueError(f"most_pictures={cfg.most_pictures}: type {LEAST_PICTURES} or more")
    with open_dict(cfg):
        cfg.checkpoints = [cfg.checkpoint]  # read by resolve_auto
    recipe.resolve_auto(cfg, CONF)
    # Check everything that can be missing or wrong before the work, which takes a minute.
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401

    from beauty_bafe.data.catalog import open_catalog
    from beauty_bafe.model_card import read_answers

    catalog = None if cfg.pictures is None else open_catalog(cfg.pictures)
    answers = None if cfg.answers is None else read_answers(Path(cfg.answers))

    output = Path(cfg.output_dir)
    part = output / ".part"
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    part.mkdir(parents=True)
    try:
        files = _write(cfg, part, catalog, answers)
        _publish(part, output)
    finally:
        shutil.rmtree(part)
    log.info(f"exported to {output}; to use it, type retrieve.py checkpoints='[{output}]'")
    return files


def _write(cfg: DictConfig, folder: Path, catalog: Catalog | None, answers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write all files to `folder`, and compare them with the checkpoint; returns the facts about each ONNX file."""
    import torch
    from hydra.utils import instantiate

    from beauty_bafe.extraction.members import load_members
    from beauty_bafe.model_card import write_card
    from beauty_bafe.models.exported import CONFIG, write_network
    from beauty_bafe.models.inference import Describer
    from beauty_bafe.models.module import load_extractor, read_checkpoint
    from beauty_bafe.models.onnx_export import check_onnx, export_onnx

    (member,) = load_members(cfg.checkpoint, {"pooling": instantiate(cfg.pooling)}, size=cfg.size)
    content = read_checkpoint(cfg.checkpoint)
    write_network(content, folder)
    loaded = load_extractor(folder).state_dict()
    if not all(torch.equal(value, loaded[key]) for key, value in member.extractor.state_dict().items()):
        raise RuntimeError(f"the weights in '{folder}' are not those of '{cfg.checkpoint}'; is the disk full or broken?")

    view = instantiate(cfg.query.view)
    files: dict[str, Any] = {}
    for name, seen in ({"model.onnx": None} | ({} if view is None else {"query.onnx": view})).items():
        describer = Describer(member.extractor, [member.pooling], masks=True, view=seen).eval()
        try:
            export_onnx(describer, folder / name)
            pictures = _pictures(cfg, catalog, describer.canvas, member.extractor.pad)
            agreement = check_onnx(folder / name, describer, pictures)
        except RuntimeError as error:
            what = f"the pooling {member.pooling}" if seen is None else f"the query view ({view})"
            typed = "another pooling=NAME" if seen is None else "query=whole to export without query.onnx"
            raise RuntimeError(f"{name}: {what} cannot be exported: {error}; type {typed}") from error
        files[name] = {
            "size": describer.canvas,
            "pad": member.extractor.pad,
            "pooling": str(member.pooling),
            "view": "the picture as it is" if seen is None else str(seen),
            "least_cosine": agreement.cosine,
            "largest_mask_difference": agreement.mask / 255,
            "compared_pictures": agreement.pictures,
        }
        log.info(
            f"{name}: compared on {agreement.pictures} pictures, lowest cosine {agreement.cosine:.7f}, "
            f"largest mask difference {agreement.mask}/255"
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"onnx": files}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_card(folder / "README.md", content, Path(cfg.checkpoint), files, catalog is None, answers)
    return files


def _publish(part: Path, output: Path) -> None:
    """Move the files of `part` to `output`, replacing an earlier export, which may have had more files."""
    from beauty_bafe.models.exported import CONFIG

    for name in (CONFIG, "query.onnx"):  # without config.json, the folder cannot be loaded while it is incomplete
        (output / name).unlink(missing_ok=True)
    for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):
        os.replace(file, output / file.name)


def _pictures(cfg: DictConfig, catalog: Catalog | None, size: int, pad: int) -> Iterator[Tensor]:
    """Yield uint8 (3, S, S): photos if there are any, otherwise drawn street views; repeated if there are too few."""
    import numpy as np
    import torch

    from beauty_bafe.data.pictures import letterbox
    from beauty_bafe.data.toy import draw_query

    count = LEAST_PICTURES if catalog is None else min(len(catalog), cfg.most_pictures)
    rows = np.linspace(0, (len(catalog) if catalog is not None else count) - 1, count).round().astype(int).tolist()
    for row in [rows[i % count] for i in range(max(count, LEAST_PICTURES))]:
        rgb = draw_query(0, row, LEAST_PICTURES, size)[0] if catalog is None else catalog.read(row, size).rgb
        yield torch.from_numpy(letterbox(rgb, size, pad)).permute(2, 0, 1)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def _run(cfg: DictConfig) -> None:
    cli.run(export, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "export", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
