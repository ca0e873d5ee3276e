"""The benchmark of training runs; its figures mean nothing here."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

from .conftest import ROOT


@pytest.mark.parametrize("objective", ["saliency", "joint"])
def test_training_is_measured(objective: str, toy: Path) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_training", ROOT / "benchmarks" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    size = Namespace(photos=str(toy / "gallery"), backgrounds=None, model="efficientnet_lite0", batch_size=2, count=1)
    assert all(rate > 0 for rate in benchmark.measure(size, objective, "ours").values())
