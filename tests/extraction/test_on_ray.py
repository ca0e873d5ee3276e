"""Describing by Ray: the vectors of one process, whatever is killed on the way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from beauty_bafe.data.catalog import Skipped, open_catalog
from beauty_bafe.data.shards import make_shards
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.extraction.on_ray import RayExtraction
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc

ROOT = Path(__file__).parents[2]
PICTURES, SHARD = 40, 4
PATIENCE = 600  # seconds, for busy machines
for name, value in {"RAY_agent_register_timeout_ms": 1000 * PATIENCE, "RAY_worker_register_timeout_seconds": PATIENCE}.items():
    os.environ.setdefault(name, str(value))


def describe(kind: type[FeatureExtraction], checkpoint: str, pictures: str, store: str, **options: object) -> list[np.ndarray]:
    members = load_members(checkpoint, {"attention": Pooling(spoc, saliency=True), "gem": Pooling(gem, saliency=False)})
    settings: dict[str, object] = {"device": "cpu", "precision": "32-true", "shard": SHARD, "max_skipped": 0.5}
    found = kind(store, **settings | options)(members, open_catalog(pictures), pictures, "pictures", Skipped())  # type: ignore[arg-type]
    return [features.vectors for features in found]


@pytest.fixture
def gallery(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number in range(PICTURES - 1):
        write_picture(f"pictures/{number:02d} 'é'.jpg", (40 + number, 50), seed=number)
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def _no_ray_of_another_test() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def actors(driver: int) -> set[int]:
    found = set()
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "_Actor" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def wait_until(condition: Callable[[], object], driver: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert driver.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


@pytest.mark.server
def test_workers_and_driver_killed_and_the_same_command_again(tmp_path: Path, gallery: Path, tiny_checkpoint: Path) -> None:
    """A pipe stands for one of the pictures: whoever reads it waits, so that workers and driver die in mid-work."""
    pytest.importorskip("ray.data", reason="the extra `ray`")
    expected = describe(FeatureExtraction, str(tiny_checkpoint), str(gallery), str(tmp_path / "one"), num_workers=0)
    pipe = gallery / "20 'é'.jpg"
    aside = shutil.move(pipe, tmp_path / "aside.jpg")
    os.mkfifo(pipe)
    command = [sys.executable, __file__, str(tiny_checkpoint), str(gallery), str(tmp_path / "ray")]
    driver = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    shards = PICTURES // SHARD
    try:
        # Half of the shards, of both poolings; never the pipe's, nor what waits behind it.
        wait_until(lambda: len(list((tmp_path / "ray").rglob("*.safetensors"))) >= shards, driver)
        first = actors(driver.pid)
        assert first
        for pid in first:
            psutil.Process(pid).kill()
        wait_until(lambda: actors(driver.pid) - first, driver)
        below = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()
    psutil.wait_procs(below, timeout=PATIENCE)
    assert not any(process.is_running() for process in below), "nothing is left behind"
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "ray").rglob("*.safetensors")}
    pipe.unlink()
    shutil.move(aside, pipe)
    found = describe(RayExtraction, str(tiny_checkpoint), str(gallery), str(tmp_path / "ray"), workers=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    now = {file: file.stat().st_mtime_ns for file in (tmp_path / "ray").rglob("*.safetensors")}
    assert len(now) == 2 * shards
    assert {file: now[file] for file in kept} == kept, "what was written is not described again"
    one, other = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
        for name in ("one", "ray")
    )
    assert one == other, "not a byte differs"


@pytest.mark.server
def test_pictures_behind_urls_and_in_shards(
    tmp_path: Path, gallery: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes, for which Ray starts once."""
    ray = pytest.importorskip("ray", reason="the extra `ray`")
    expected = describe(FeatureExtraction, str(tiny_checkpoint), str(gallery), str(tmp_path / "one"), num_workers=0)
    loose = open_catalog(gallery)
    make_shards(loose.ids, loose.paths, tmp_path / "shards", 16)
    start, starts = ray.init, []
    monkeypatch.setattr(ray, "init", lambda **options: starts.append(options["address"]) or start(**options))
    for number, source in enumerate((f"file://{gallery}", f"file://{tmp_path / 'shards'}")):
        found = describe(RayExtraction, str(tiny_checkpoint), source, str(tmp_path / str(number)), workers=1, shard=20)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), source
    assert starts == ["local"]


@pytest.mark.server
def test_a_cluster_that_does_not_answer(tmp_path: Path, gallery: Path, tiny_checkpoint: Path) -> None:
    pytest.importorskip("ray.data", reason="the extra `ray`")
    with pytest.raises(ConnectionError, match=r"no Ray cluster responds at extraction.address=auto .*; type ray start --head"):
        describe(RayExtraction, str(tiny_checkpoint), str(gallery), str(tmp_path / "ray"), address="auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "extraction.workers=0: type a number above 0"),
        ({"cpus": -1}, "extraction.cpus=-1: type a number above 0"),
        ({"devices": "all"}, r"extraction.devices applies to one machine; .* type extraction.workers=N"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayExtraction(str(tmp_path), **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    describe(RayExtraction, *sys.argv[1:], workers=2)
