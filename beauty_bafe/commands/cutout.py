"""Cut products out of pictures: beauty-bafe cutout pictures=FOLDER checkpoints='[RUN/checkpoints/best.ckpt]' output_dir=OUT"""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF
from beauty_bafe.data.places import Place, VirtualFile

log = logging.getLogger("beauty_bafe")

BACKGROUNDS = ("transparent", "white")


def cutout(cfg: DictConfig) -> int:
    """Write OUT/ID.png for every picture that has none yet, skipped.csv and cutout.json; returns how many it wrote.

    Raises ValueError for wrong settings, a folder made with other settings, or too many unreadable pictures.
    """
    if OmegaConf.is_missing(cfg, "pictures") or not cfg.checkpoints:
        raise ValueError("cutout needs pictures=FOLDER and checkpoints='[RUN/checkpoints/best.ckpt]', written by train.py")
    if cfg.background not in BACKGROUNDS:
        raise ValueError(f"background={cfg.background}: type {' or '.join(BACKGROUNDS)}")
    recipe.resolve_auto(cfg, CONF)
    from hydra.utils import instantiate
    from rich.progress import track

    from beauty_bafe.data.catalog import Skipped, open_catalog
    from beauty_bafe.data.pictures import UnreadablePicture
    from beauty_bafe.data.workers import default_workers, one_opencv_thread
    from beauty_bafe.extraction.engine import EnsembleEngine, fit, stack
    from beauty_bafe.extraction.local import FeatureExtraction
    from beauty_bafe.extraction.members import load_members
    from beauty_bafe.manifest import check_manifest, replace_file
    from beauty_bafe.models.descriptor import Pooling
    from beauty_bafe.models.pooling import spoc

    output, catalog, skipped = Path(cfg.output_dir), open_catalog(cfg.pictures), Skipped()
    if outside := [name for name in catalog.ids if name in ("", ".", "..") or Path(name).name != name or "\\" in name]:
        raise ValueError(f"the id '{outside[0]}' cannot be a file name; use ids without / and \\")
    # Only the mask is needed, which requires a pooling that uses it.
    members = load_members(list(cfg.checkpoints), {"pooling": Pooling(spoc, saliency=True)}, size=cfg.size)
    view = instantiate(cfg.query.view)
    made = {
        "checkpoints": [member.source for member in members],
        "sizes": [member.extractor.size for member in members],
        "view": str(view),
        "background": cfg.background,
    }
    output.mkdir(parents=True, exist_ok=True)
    note = output / "cutout.json"
    if note.exists():
        check_manifest(note, made, "type another output_dir=FOLDER")
    else:
        replace_file(note, lambda part: part.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))

    settings = FeatureExtraction(output, batch_size=cfg.batch_size, device=cfg.device, precision=cfg.precision)
    networks = {number: (member.extractor, member.pooling) for number, member in enumerate(members)}
    engine = EnsembleEngine(settings, networks, True, view)

    def read(row: int) -> tuple[np.ndarray | None, str]:
        try:
            return catalog.read(row).rgb, ""
        except UnreadablePicture as error:
            return None, str(error)

    def write(row: int, rgb: np.ndarray, mask: np.ndarray) -> None:
        replace_file(output / f"{catalog.ids[row]}.png", partial(_save, rgb, mask, cfg.background == "white"))

    pending = [row for row, name in enumerate(catalog.ids) if not _is_newer(output / f"{name}.png", catalog.paths[row])]
    chunks = [pending[at : at + cfg.batch_size] for at in range(0, len(pending), cfg.batch_size)]
    with one_opencv_thread, ThreadPoolExecutor(default_workers()) as threads:
        ahead = threads.map(read, chunks[0]) if chunks else None
        for number, chunk in enumerate(track(chunks, f"cutting out {len(pending)} pictures")):
            assert ahead is not None
            found = list(zip(chunk, ahead, strict=True))
            ahead = threads.map(read, chunks[number + 1]) if number + 1 < len(chunks) else None  # while the network works
            for row, (rgb, reason) in found:
                if rgb is None:
                    skipped.add(catalog, row, reason)
            good = [(row, rgb) for row, (rgb, _) in found if rgb is not None]
            if not good:
                continue
            described = engine(stack([fit(rgb, engine.canvases) for _, rgb in good]))
            masks = np.mean([one.masks for one in described if one.masks is not None], axis=0)
            rows, pictures = zip(*good, strict=True)
            list(threads.map(write, rows, pictures, masks))  # a list, so that errors are raised here
    skipped.write(output / "skipped.csv")
    written = len(pending) - len(skipped.rows)
    log.info(f"{written} of {len(catalog)} pictures cut out, {len(catalog) - len(pending)} existed already: {output}")
    skipped.check(len(catalog), cfg.max_skipped, "pictures", "max_skipped")
    return written


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize the mask of a letterboxed picture, float (M, M), 0 to 255, to the picture: uint8 (H, W)."""
    import cv2

    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    whole = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    return (whole[top : top + height, left : left + width] + 0.5).clip(0, 255).astype(np.uint8)


def _save(rgb: np.ndarray, mask: np.ndarray, white: bool, file: Path) -> None:
    from PIL import Image

    alpha = fit_mask(mask, *rgb.shape[:2])[..., None]
    if white:
        share = alpha.astype(np.float32) / 255
        pixels = (rgb * share + 255 * (1 - share) + 0.5).astype(np.uint8)
    else:
        pixels = np.concatenate([rgb, alpha], axis=2)
    Image.fromarray(pixels).save(file, format="PNG", compress_level=3)  # for speed at full size


def _is_newer(file: Path, source: Place) -> bool:
    if isinstance(source, VirtualFile):  # its time is not known
        return file.is_file()
    return file.is_file() and source.is_file() and file.stat().st_mtime >= source.stat().st_mtime


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="cutout")
def _run(cfg: DictConfig) -> None:
    cli.run(cutout, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "cutout", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
