"""Pack photos into a few large files, to train from: beauty-bafe shards pictures=GALLERY output_dir=SHARDS"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")


def shards(cfg: DictConfig) -> int:
    """Write the missing shards and skipped.csv; returns the number of pictures in all shards.

    Raises ValueError for wrong settings or too many unreadable files; the files are copied without decoding them.
    """
    if OmegaConf.is_missing(cfg, "pictures"):
        raise ValueError("shards needs pictures=GALLERY, a folder of photos or a csv with the columns id,path")
    if cfg.shard < 1:
        raise ValueError(f"shard={cfg.shard}: type the number of pictures per file, 1 or more")
    from beauty_bafe.data.catalog import Skipped, from_perfect500k, open_catalog
    from beauty_bafe.data.shards import make_shards

    output, skipped = Path(cfg.output_dir), Skipped()
    catalog = open_catalog(cfg.pictures) if cfg.titles is None else from_perfect500k(cfg.pictures, cfg.titles)
    for row, reason in make_shards(catalog.ids, catalog.paths, output, cfg.shard).items():
        skipped.add(catalog, row, reason)
    skipped.write(output / "skipped.csv")
    count = len(catalog) - len(skipped.rows)
    log.info(f"{count} of {len(catalog)} pictures are in {output}; python train.py data=shards data.root={output}")
    skipped.check(len(catalog), cfg.max_skipped, "pictures", "max_skipped")
    return count


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="shards")
def _run(cfg: DictConfig) -> None:
    cli.run(shards, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "shards", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
