"""Data that tests draw themselves, tiny networks, and the way to ../shared."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from beauty_bafe.cli import messages_on_terminal
from beauty_bafe.index.base import Index

from .index_by_id import IndexById

os.environ.update(NO_ALBUMENTATIONS_UPDATE="1", WANDB_MODE="offline", HF_HUB_OFFLINE="1")
torch.set_num_threads(1)  # two test processes share two cores
cv2.setNumThreads(1)

ROOT = Path(__file__).parents[1]
VIEWS = "rehearsal.views=8"  # drawing street views takes most of the time of indexing a small gallery
_FOLDER = tempfile.TemporaryDirectory()
TINY: dict[str, Any] = {
    "name": "test_efficientnet",  # timm's own few-layer network
    "taps": ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    "last": "bn2",
    "size": 64,
    "hidden": 8,
    "pretrained": False,
    "weights": f"{_FOLDER.name}/weights.pth",  # random ones that stand in for pretrained ones
}


@pytest.fixture(scope="session", autouse=True)
def _tiny_weights() -> None:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(TINY["name"]).state_dict(), TINY["weights"])


@pytest.fixture(autouse=True)
def _messages() -> Iterator[None]:
    """Tests read what a command would show."""
    with messages_on_terminal():
        yield


@pytest.fixture(scope="session")
def tiny() -> dict[str, Any]:
    """Arguments of an extractor that runs in milliseconds."""
    return dict(TINY)


@pytest.fixture(scope="session")
def lived_in() -> Callable[[str], Any]:
    """Makes a network by timm's name, with batch norms whose statistics and weights can be got wrong."""
    import timm

    def make(name: str) -> Any:
        torch.manual_seed(0)
        network = timm.create_model(name).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.1, 0.1)
        return network

    return make


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy catalogue with queries, masks and truth."""
    from beauty_bafe.data.toy import draw_toy

    return draw_toy(tmp_path_factory.mktemp("toy"), products=48, queries=24, seed=3, size=160, workers=1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the checkout; a test that needs it skips without it, unless REQUIRE_SHARED=1."""
    folder = ROOT.parent / "shared"
    if not (folder / "benchmark" / "dev" / "truth.csv").is_file():
        if os.environ.get("REQUIRE_SHARED") == "1":
            pytest.fail("REQUIRE_SHARED=1, but ../shared/benchmark is not there")
        pytest.skip("needs ../shared/benchmark")
    return folder


@pytest.fixture
def configure() -> Callable[..., DictConfig]:
    """Compose conf/NAME.yaml with overrides, as the scripts do."""

    def configure(name: str, *overrides: str) -> DictConfig:
        first = {"train": ["data.cache=null"], "retrieve": [VIEWS]}.get(name, [])
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(name, [*first, *overrides])

    return configure


@pytest.fixture
def write_picture(tmp_path: Path) -> Callable[..., Path]:
    """Write a small random picture under tmp_path and return its path."""

    def write(name: str, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny network, as the trainer writes it."""
    import pytorch_lightning as pl

    from beauty_bafe.models.module import SaliencyModule

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(SaliencyModule(TINY, lr=1e-3, warmup=0))
    trainer.save_checkpoint(file)
    return file


@pytest.fixture
def index_by_id() -> type[Index]:
    return IndexById
