"""Lightning callbacks: checkpoints, metrics and curves, sample pictures, progress."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar, RichProgressBar

from ..manifest import replace_file
from .extractor import resize_mask

log = logging.getLogger("beauty_bafe")


class Checkpoints(Checkpoint):
    """Writes last.ckpt before the first step and after every epoch, and best.ckpt if `monitor` is at its highest so far.

    Without `monitor` the newest epoch is the best: averaging lowers the validation metrics, but helps on photographs
    (benchmarks/real.md). Files are replaced atomically, so that the previous ones survive a kill or a full disk.
    `retrieval`: the recipe for retrieve.py, stored in each.
    """

    def __init__(self, folder: str, monitor: str | None, retrieval: Mapping[str, Any]) -> None:
        self.last, self.best = Path(folder) / "last.ckpt", Path(folder) / "best.ckpt"
        self.retrieval = dict(retrieval)  # a plain dict, to be loaded with weights_only
        self.monitor, self.highest = monitor, float("-inf")

    def state_dict(self) -> dict[str, Any]:
        return {"highest": self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.highest = state_dict["highest"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["retrieval"] = self.retrieval

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self.save(trainer, [self.last])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        better = value is None or float(value) >= self.highest or not self.best.exists()
        self.highest = self.highest if value is None else max(float(value), self.highest)
        # Best before last: if killed in between, the run resumes from the epoch before and writes the same best again.
        self.save(trainer, [self.best, self.last] if better else [self.last])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The untrained network, for comparisons. The setting decides, not the files: best.ckpt may be from an earlier run, and
        # if only one of several processes saved, it would wait forever.
        if trainer.max_epochs == 0:
            self.save(trainer, [self.best, self.last])

    def save(self, trainer: pl.Trainer, files: list[Path]) -> None:
        """Write the files atomically. Raises OSError with the name of the file if one cannot be written."""
        part = self.last.with_suffix(".part")
        try:
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                for file in files:
                    replace_file(file, partial(shutil.copyfile, part))
                part.unlink()
        except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
            part.unlink(missing_ok=True)
            kept = (
                f"the checkpoint of an earlier epoch is kept; type ckpt_path={self.last} to continue"
                if self.last.exists()
                else ""
            )
            raise OSError(f"could not write '{files[-1]}' ({error}); is the disk full? {kept}") from error

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            log.info(
                f"\nstopped in epoch {trainer.current_epoch + 1}; to continue, add ckpt_path={self.last} to the same command",
            )


class History(Callback):
    """Collects the metrics of every epoch, including those before a run was resumed, and writes metrics.json and curves.png."""

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)
        self.epochs: list[dict[str, float]] = []
        self._pictures, self._seconds, self._since = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pictures, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._pictures += batch["pictures"].shape[:2].numel() * trainer.world_size
        self._seconds = time.perf_counter() - self._since

    @property
    def images_per_second(self) -> float:
        return self._pictures / max(self._seconds, 1e-9)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.epochs.append(
            {"epoch": trainer.current_epoch, **row, "images_per_second": self.images_per_second, "seconds": self._seconds}
        )
        if trainer.is_global_zero:
            self.write()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.epochs and trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Write metrics.json, the last epoch's metrics and a list of all epochs, and curves.png."""
        content = {**(self.epochs[-1] if self.epochs else {}), "epochs": self.epochs}
        (self.output_dir / "metrics.json").write_text(json.dumps(content, indent=1) + "\n")
        _draw_curves(self.epochs, self.output_dir / "curves.png")


def _draw_curves(epochs: list[dict[str, float]], file: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    panels = {
        "loss (val: of the mask)": ["train/loss", "val/loss"],
        "held-out photos, augmented": ["val/mAP@7", "val/iou", "val/f_beta", "val/mae"],
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for key in keys:
            points = [(row["epoch"] + 1, row[key]) for row in epochs if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=key)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(file, dpi=110)


class SamplePictures(Callback):
    """Draws a few validation samples after every epoch, with labels and predicted masks, to RUN/samples/ and the loggers."""

    def __init__(self, folder: str, count: int) -> None:
        self.folder, self.count = Path(folder), count

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or dataloader_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        pictures, labels = (batch[key][: self.count, 1] for key in ("pictures", "masks"))
        extraction, size = pl_module.extractor(pictures), labels.shape[-1]
        one = extraction.logits is not None  # a decoder makes one mask from all taps
        masks = [extraction.saliency(size)] if one else [resize_mask(mask, size) for mask in extraction.masks]
        columns = [labels.float() / 255, *masks]
        grey = [(column * 255).round().byte().expand(-1, 3, -1, -1) for column in columns]
        grid = torch.cat([torch.cat([pictures, *grey], dim=3)[row] for row in range(len(pictures))], dim=1)
        self._publish(trainer, grid.permute(1, 2, 0).cpu().numpy())

    def _publish(self, trainer: pl.Trainer, image: np.ndarray) -> None:
        from PIL import Image
        from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(self.folder / f"epoch_{trainer.current_epoch:03d}.jpg", quality=88)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", image, trainer.current_epoch, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [image], step=trainer.global_step)


def _speed(trainer: pl.Trainer) -> float:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return next((callback.images_per_second for callback in callbacks if isinstance(callback, History)), 0.0)


class _RichProgress(RichProgressBar):
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, "img/s": f"{_speed(trainer):.0f}"}


class _PlainProgress(ProgressBar):
    """Prints one line every `seconds` and after every epoch, for logs."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self._next = seconds, 0.0

    def disable(self) -> None:
        self.seconds = float("inf")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.is_global_zero and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.seconds
            total, loss = self.total_train_batches, float(outputs["loss"])
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} batch {batch_idx + 1}/{total}"
            log.info(f"{where} loss {loss:.4f} {_speed(trainer):.0f} img/s")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            text = " ".join(f"{key} {float(value):.4f}" for key, value in trainer.callback_metrics.items())
            log.info(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} done {text} {_speed(trainer):.0f} img/s")


def progress(seconds: float) -> ProgressBar:
    """A progress bar on a terminal, otherwise a line every `seconds`; both with images per second."""
    return _RichProgress() if sys.stdout.isatty() else _PlainProgress(seconds)
