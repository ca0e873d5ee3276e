"""Many threads on one Retriever; two runs of retrieve.py on one store and one index_dir."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from omegaconf import DictConfig

from beauty_bafe.data.catalog import from_folder
from beauty_bafe.retriever import Retriever

from .conftest import ROOT

sys.path.insert(0, str(ROOT))
from retrieve import retrieve


def test_two_scripts_at_once_answer_as_one(
    toy: Path, tiny_checkpoint: Path, configure: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """They describe the same gallery, keep its keypoints and index, and learn weights, all in the same folders."""

    def words(folder: Path, name: str) -> list[str]:
        given = {"gallery": toy / "gallery", "queries": toy / "queries", "checkpoints": f"[{tiny_checkpoint}]"}
        given |= {"features": folder / "features", "index_dir": folder / "index", "output_dir": folder / name}
        settings = ["rerank=sift_verified", "rehearsal.views=16", "report=false", "num_workers=0", "extraction.shard=8"]
        return [*(f"{key}={value}" for key, value in given.items()), *settings]

    retrieve(configure("retrieve", *words(tmp_path / "alone", "one")))
    runs = [
        subprocess.Popen(
            [sys.executable, ROOT / "retrieve.py", *words(tmp_path / "together", name)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "other")
    ]
    for run in runs:
        output = run.communicate()[0]
        assert run.returncode == 0, output
    for file in ("submission.csv", "answers.csv"):
        expected = (tmp_path / "alone" / "one" / file).read_text()
        for name in ("one", "other"):
            assert (tmp_path / "together" / name / file).read_text() == expected


def test_sixteen_threads_answer_as_one(toy: Path, tiny_checkpoint: Path) -> None:
    queries = from_folder(toy / "queries").paths
    shop = Retriever.build(tiny_checkpoint, toy / "gallery", ["batch_size=1", "rehearsal.views=0"])
    alone = [shop.search([query], k=5) for query in queries]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda number: shop.search([queries[number % len(queries)]], k=5), range(2000)))
    assert together == [alone[number % len(queries)] for number in range(2000)]
