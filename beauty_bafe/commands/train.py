"""Train a background-agnostic extractor on catalogue photos: python train.py model=resnet50 data=folder data.root=GALLERY"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli, recipe
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")

MISSING = {  # what to type for required settings of conf/data
    "data.root": "data.root=GALLERY, a folder of catalogue photos or a csv with the columns id,path "
    "(for data=shards what beauty-bafe shards wrote)",
    "data.titles": "data.titles=TITLES.csv, the challenge's file of image ids and titles",
}


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train as configured and return the last epoch's metrics; writes checkpoints/, config.yaml, metrics.json, curves.png."""
    recipe.check_recipe(cfg.retrieval, CONF)
    if missing := [f"data.{key}" for key in cfg.data if OmegaConf.is_missing(cfg.data, key)]:
        raise ValueError(f"{missing[0]} is not given; type {MISSING.get(missing[0], f'{missing[0]}=VALUE')}")
    import pytorch_lightning as pl
    from hydra.utils import instantiate
    from pytorch_lightning.utilities import rank_zero_only

    from beauty_bafe.models.callbacks import History
    from beauty_bafe.models.precision import trainer_settings
    from beauty_bafe.models.resuming import KeepRunSettings, check_resumable, run_settings
    from beauty_bafe.process import keep_memory

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # hides tips and device lists; importing it sets INFO
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # intended: the backbone keeps its statistics
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # internal to Lightning
    settings = trainer_settings(cfg.trainer.accelerator, cfg.trainer.devices, cfg.trainer.precision)
    output = Path(cfg.output_dir)
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    keep_memory()
    pl.seed_everything(cfg.seed, verbose=False)

    module = instantiate(cfg.objective, model=cfg.model, _recursive_=False, _convert_="all")
    network = module.extractor
    if network.frozen and network.backbone.patch is not None and cfg.retrieval.pooling == "attention_gem":
        raise ValueError(
            f"retrieval.pooling=attention_gem cuts off negative values, which the maps of the pretrained transformer "
            f"{cfg.model.name} have; type retrieval.pooling=attention"
        )
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    run = run_settings(plain, settings["precision"])
    if cfg.ckpt_path is not None:
        check_resumable(module, run, cfg.ckpt_path)
    writes = getattr(rank_zero_only, "rank", 0) == 0  # only one of several processes
    if writes:
        OmegaConf.save(cfg, output / "config.yaml", resolve=True)  # only now, so that a rejected run leaves it unchanged
    data = instantiate(cfg.data, augmentation=instantiate(cfg.augmentation), size=cfg.model.size, seed=cfg.seed)
    try:
        data.setup()
    finally:  # also if too few photos are left to train on
        if writes:
            data.skipped.write(output / "skipped.csv")
    data.skipped.check(data.inspected, cfg.max_skipped, "pictures", "max_skipped")
    if writes:
        log.info(data.describe())

    callbacks = [*(instantiate(callback) for callback in cfg.callbacks.values()), KeepRunSettings(run)]
    trainer = instantiate(cfg.trainer, **settings, callbacks=callbacks, logger=instantiate(cfg.logger))
    trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)

    history = next(callback for callback in callbacks if isinstance(callback, History))
    return history.epochs[-1] if history.epochs else {}


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _run(cfg: DictConfig) -> None:
    cli.run(train, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "train", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
