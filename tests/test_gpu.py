"""What only a CUDA GPU can show; `make gpu` runs these and measures. Without one they skip."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.faiss_index import FaissIndex, needs_half_tables
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.module import load_extractor
from beauty_bafe.models.pooling import gem, spoc

from .conftest import ROOT

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]
WITHOUT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return "cuda"


def unit(rows: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_vectors_are_the_processors(gpu: str, precision: str, tiny_checkpoint: Path) -> None:
    extractor = load_extractor(tiny_checkpoint)
    pictures = torch.randint(0, 256, (5, 3, extractor.size, extractor.size), dtype=torch.uint8)
    ours, theirs = (
        Engine(Describer(extractor, POOLINGS, False), device, kind, 4, "torch")(pictures)
        for device, kind in ((gpu, precision), ("cpu", "32-true"))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert ((one * other).sum(dim=1) > 0.999).all()


@pytest.mark.gpu
def test_memory_that_runs_out_halves_the_batch(gpu: str, tiny: dict[str, Any], tiny_checkpoint: Path) -> None:
    extractor = load_extractor(tiny_checkpoint)
    extractor.size = 256
    pictures = torch.randint(0, 256, (4096, 3, 256, 256), dtype=torch.uint8)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 5e8) / total))
    try:
        engine = Engine(Describer(extractor, POOLINGS, False), gpu, "32-true", 4096, "torch")
        assert len(engine(pictures)[0]) == 4096
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.batch < 4096


@pytest.mark.gpu
def test_several_engines_on_one_gpu_write_what_one_does(gpu: str, toy: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    members = load_members(str(tiny_checkpoint), dict(enumerate(POOLINGS)))

    def describe(name: str, **options: Any) -> list[np.ndarray]:
        extraction = FeatureExtraction(tmp_path / name, shard=8, runtime="torch", batch_size=8, device=gpu, **options)
        return [f.vectors for f in extraction(members, from_folder(toy / "gallery"), "source", "pictures", Skipped())]

    for one, two in zip(describe("one"), describe("two", devices=["cuda:0", "cuda:0"]), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.gpu
def test_the_exact_index_answers_as_on_the_processor(gpu: str) -> None:
    gallery, queries = unit(5000, 64, 0), unit(70, 64, 1)
    ids = [str(number) for number in range(len(gallery))]
    ours, theirs = (ExactIndex(device=device).fit(gallery, ids)._search(queries, 7) for device in (gpu, "cpu"))
    assert np.array_equal(ours[1], theirs[1])
    assert np.array_equal(ours[0], theirs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "IVF16,PQ64np"])
def test_faiss_searches_on_the_gpu(gpu: str, factory: str) -> None:
    gallery = unit(5000, 128, 0)
    index = FaissIndex(factory, device=gpu).fit(gallery, [str(number) for number in range(len(gallery))])
    assert index._on_gpu is not None
    assert np.mean(index._search(gallery[:50], 3)[1][:, 0] == np.arange(50)) > 0.9


@pytest.mark.parametrize(
    ("factory", "half"), [("Flat", False), ("IVF4,Flat", False), ("IVF4,PQ32np", False), ("IVF4,PQ64np", True)]
)
def test_tables_that_a_gpu_has_no_room_for_are_halved(factory: str, half: bool) -> None:
    import faiss

    assert needs_half_tables(faiss.index_factory(128, factory)) is half


@pytest.mark.parametrize("command", [["benchmarks/gpu.py"]])
def test_without_a_gpu_it_is_refused_by_name(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=WITHOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "measures a CUDA GPU, and PyTorch sees none here; type make gpu on a machine with one" in done.stderr


def test_the_page_is_written_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu as benchmark

    class Device:
        name, total_memory = "a GPU", 80e9

    def failing(work: Path, size: object) -> list[str]:
        raise ValueError("too slow")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.md")])
    monkeypatch.setattr(benchmark, "PARTS", {"One": failing, "Two": lambda *_: benchmark.table(("a", "b"), (1, 2))})
    with pytest.raises(SystemExit, match="error: failed: One; see"):
        benchmark.main()
    page = (tmp_path / "gpu.md").read_text()
    assert "# a GPU, 80 GB" in page
    assert "Failed: ValueError: too slow" in page
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in page


@pytest.mark.parametrize("part", ["Describing", "Vectors beside the CPU's", "Exact search", "faiss"])
def test_parts_of_the_page_run_on_a_processor(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is rare, so that a mistake in a line that needs none must not wait for one. The figures mean nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu as benchmark

    monkeypatch.setattr(benchmark, "DEVICE", "cpu")
    size = Namespace(products=20, models=["efficientnet_lite0"], rows=5000, width=64)
    page = benchmark.PARTS[part](tmp_path, size)
    assert any(re.search(r"\d", line) for line in page)
