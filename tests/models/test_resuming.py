"""Only a run that comes to the same result may go on from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from beauty_bafe.models.module import SaliencyModule
from beauty_bafe.models.resuming import check_resumable, run_settings


@pytest.fixture
def settings(configure: Callable[..., DictConfig]) -> Callable[..., dict[str, Any]]:
    """What train.py would compare under these overrides."""

    def settings(*overrides: str, precision: str = "32-true") -> dict[str, Any]:
        cfg = configure("train", "data=folder", "data.root=GALLERY", "output_dir=RUN", *overrides)
        return run_settings(OmegaConf.to_container(cfg, resolve=True), precision)  # type: ignore[arg-type]

    return settings


@pytest.fixture
def written(tiny_checkpoint: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]]) -> Path:
    content = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(content | {"run": settings()}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize(
    ("override", "was", "now"),
    [
        ("seed=1", "seed=2019", "1"),
        ("data.batch_size=8", "data.batch_size=32", "8"),
        ("data.val_share=0.2", "data.val_share=0.1", "0.2"),
        ("data.epoch_size=100", "data.epoch_size=null", "100"),
        ("augmentation.hand=0", "augmentation.hand=0.5", "0"),
        ("augmentation.camera.jpeg=1", "augmentation.camera.jpeg=0.5", "1"),
        ("augmentation.scale=[0.5,1.0]", r"augmentation.scale=\[0.4,1.15\]", r"\[0.5,1.0\]"),
        ("trainer.devices=2", "trainer.devices=1", "2"),
        ("+trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=null", "2"),
    ],
)
def test_what_decides_the_result_must_be_the_same(
    override: str, was: str, now: str, tiny: dict[str, Any], written: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    module = SaliencyModule(tiny, lr=1e-3, warmup=0)
    with pytest.raises(ValueError, match=rf"last.ckpt' was trained with {was}, now it is {now}; type {was}, or leave out"):
        check_resumable(module, settings(override), written)


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=OTHER",
        "data.root=/mnt/GALLERY",
        "data.num_workers=7",
        "data.cache=elsewhere",
        "trainer.max_epochs=99",
        "trainer.limit_val_batches=1",
        "trainer.devices=[1]",
        "device=cpu",
        "retrieval.rerank=sift",
        "logger=tensorboard",
    ],
)
def test_what_does_not_decide_it_is_free(
    override: str, tiny: dict[str, Any], written: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    check_resumable(SaliencyModule(tiny, lr=1e-3, warmup=0), settings(override), written)


def test_precision_and_hyper_parameters_are_named(
    tiny: dict[str, Any], written: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=r"trained with trainer.precision=32-true, now it is bf16-mixed"):
        check_resumable(SaliencyModule(tiny, lr=1e-3, warmup=0), settings(precision="bf16-mixed"), written)
    with pytest.raises(ValueError, match=r"trained with model.hidden=8, now it is 4; type model.hidden=8"):
        check_resumable(SaliencyModule(tiny | {"hidden": 4}, lr=1e-3, warmup=0), settings(), written)
    with pytest.raises(ValueError, match=r"trained with objective.lr=0.001, now it is 0.1; type objective.lr=0.001"):
        check_resumable(SaliencyModule(tiny, lr=0.1, warmup=0), settings(), written)


def test_an_older_versions_checkpoint_says_so(
    tiny: dict[str, Any], written: Path, settings: Callable[..., dict[str, Any]]
) -> None:
    module = SaliencyModule(tiny, lr=1e-3, warmup=0)
    content = torch.load(written, weights_only=True)
    del content["hyper_parameters"]["warmup"]
    torch.save(content, written)
    with pytest.raises(ValueError, match=r"is of an older version, which did not store objective.warmup \(now 0\)"):
        check_resumable(module, settings(), written)
    del content["run"]
    content["hyper_parameters"] |= {"warmup": 0}
    torch.save(content, written)
    with pytest.raises(ValueError, match=r"is of an older version, which did not store augmentation\."):
        check_resumable(module, settings(), written)
    torch.save(content | {"objective": "JointModule", "run": settings()}, written)
    with pytest.raises(ValueError, match=r"was trained by JointModule, not by SaliencyModule; type the objective="):
        check_resumable(module, settings(), written)
