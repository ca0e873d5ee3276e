"""Write a checkpoint for other programs: beauty-bafe export checkpoint=RUN/checkpoints/best.ckpt output_dir=OUT"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")

if TYPE_CHECKING:
    from torch import Tensor

LEAST_PICTURES = 10  # one batch of 1, one of 2, one of 7


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write model.safetensors, config.json, model.onnx, query.onnx where queries are seen another way, and README.md.

    Returns what is known of each ONNX file. Raises ValueError for wrong settings, RuntimeError where a file does not give
    what PyTorch gives.
    """
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise ValueError("export needs checkpoint=RUN/checkpoints/best.ckpt, what train.py wrote")
    if cfg.most_pictures < LEAST_PICTURES:
        raise ValueError(f"most_pictures={cfg.most_pictures}: type {LEAST_PICTURES} or more")
    with open_dict(cfg):
        cfg.checkpoints = [cfg.checkpoint]  # where resolve_auto looks
    recipe.resolve_auto(cfg, CONF)
    import torch
    from hydra.utils import instantiate

    from beauty_bafe.extraction.members import load_members
    from beauty_bafe.model_card import write_card
    from beauty_bafe.models.exported import CONFIG, write_network
    from beauty_bafe.models.inference import Describer
    from beauty_bafe.models.module import load_extractor, read_checkpoint
    from beauty_bafe.models.onnx_export import check_onnx, export_onnx

    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (member,) = load_members(cfg.checkpoint, {"pooling": instantiate(cfg.pooling)}, size=cfg.size)
    content = read_checkpoint(cfg.checkpoint)
    write_network(content, output)
    loaded = load_extractor(output).state_dict()
    if not all(torch.equal(value, loaded[key]) for key, value in member.extractor.state_dict().items()):
        raise RuntimeError(f"the weights in '{output}' are not those of '{cfg.checkpoint}'; is the disk full or broken?")

    view = instantiate(cfg.query.view)
    files: dict[str, Any] = {}
    for name, seen in {"model.onnx": None, "query.onnx": view}.items():
        (output / name).unlink(missing_ok=True)  # an earlier one must not stay where this one fails
        if name == "query.onnx" and view is None:
            continue
        describer = Describer(member.extractor, [member.pooling], masks=True, view=seen).eval()
        pictures = _pictures(cfg, describer.canvas, member.extractor.pad)
        try:
            export_onnx(describer, output / name)
            agreement = check_onnx(output / name, describer, pictures)
        except RuntimeError as error:
            (output / name).unlink(missing_ok=True)
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
            f"{name}: {agreement.pictures} pictures, cosine from {agreement.cosine:.7f}, mask to {agreement.mask}/255",
        )
    config = json.loads((output / CONFIG).read_text(encoding="utf-8")) | {"onnx": files}
    (output / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_card(output / "README.md", content, Path(cfg.checkpoint), files, drawn=cfg.pictures is None)
    log.info(f"exported: {output}; retrieve.py checkpoints='[{output}]' takes it")
    return files


def _pictures(cfg: DictConfig, size: int, pad: int) -> Iterator[Tensor]:
    """uint8 (3, S, S) each: photos where there are some, else drawn street views; repeated where they are too few."""
    import numpy as np
    import torch

    from beauty_bafe.data.catalog import open_catalog
    from beauty_bafe.data.pictures import letterbox
    from beauty_bafe.data.toy import draw_query

    catalog = None if cfg.pictures is None else open_catalog(cfg.pictures)
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
