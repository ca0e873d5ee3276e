"""Resuming a run with the same result: settings that the result depends on are stored in the checkpoint and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from .module import load_extractor, read_checkpoint
from .precision import count_devices

# How and where pictures are read; the data module checks that they are the same pictures.
UNCHECKED = {f"data.{key}" for key in ("_target_", "root", "backgrounds", "titles", "num_workers", "cache", "cache_gb")}
TRAINER = ("num_nodes", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches")


def run_settings(cfg: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Settings, besides hyper-parameters and pictures, that the result of a run depends on: key -> plain value.

    `cfg`: train.py's configuration as plain values. `precision`: that of training. `trainer.max_epochs` may differ, so that a
    run can be extended.
    """
    settings = _flat({key: cfg[key] for key in ("seed", "data", "augmentation")})
    settings = {key: value for key, value in settings.items() if key not in UNCHECKED}
    settings |= {f"trainer.{key}": cfg["trainer"].get(key) for key in TRAINER}
    return settings | {
        "trainer.devices": count_devices(cfg["trainer"]["accelerator"], cfg["trainer"]["devices"]),
        "trainer.precision": precision,
    }


class KeepRunSettings(Callback):
    """Writes `settings` into every checkpoint, for `check_resumable`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.settings


def check_resumable(module: pl.LightningModule, settings: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Raise ValueError if resuming `checkpoint` with `module` and `settings` would not give the same result.

    That is, if it is not a checkpoint of this project, has another objective, or differs in a key, which the message names.
    """
    if Path(checkpoint).is_dir():
        raise ValueError(
            f"ckpt_path='{checkpoint}' is an exported network, which has no optimiser state to resume from; "
            "type ckpt_path=RUN/checkpoints/last.ckpt"
        )
    load_extractor(checkpoint)
    content = read_checkpoint(checkpoint)
    objective = content.get("objective", type(module).__name__)  # older checkpoints do not store it
    restart = "or leave out ckpt_path to start from scratch"
    if objective != type(module).__name__:
        raise ValueError(
            f"ckpt_path='{checkpoint}' was trained by {objective}, not by {type(module).__name__}; "
            f"type the objective= that started the run, {restart}"
        )
    old = _hyper_parameters(content["hyper_parameters"]) | content.get("run", {})
    new = _hyper_parameters(module.hparams) | dict(settings)
    for key in sorted(old.keys() | new.keys(), key=lambda key: (key.startswith("model."), key)):  # objectives change models
        if key not in old:
            raise ValueError(
                f"ckpt_path='{checkpoint}' is of an older version, which did not store {key} (now "
                f"{_format_value(new[key])}), so the result may differ; resume it with the version that started it, {restart}"
            )
        if key not in new:
            raise ValueError(
                f"ckpt_path='{checkpoint}' was trained with {key}={_format_value(old[key])}, a setting that no longer exists; "
                f"resume it with the command and the version that started it, {restart}"
            )
        if old[key] != new[key]:
            was = f"{key}={_format_value(old[key])}"
            raise ValueError(
                f"ckpt_path='{checkpoint}' was trained with {was}, now it is {_format_value(new[key])}; type {was}, {restart}"
            )


def _hyper_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters by their keys in the configuration: model.NAME and objective.NAME."""
    return {key if key.startswith("model.") else f"objective.{key}": value for key, value in _flat(values).items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _format_value(value: Any) -> str:
    """A value as typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
