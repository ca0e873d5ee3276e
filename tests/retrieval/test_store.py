"""Descriptors on disk: whole or not at all, of one making, resumed to the byte."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from beauty_bafe.data.catalog import Catalog, Skipped, from_folder
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.retrieval.features import FeatureExtraction, load_members
from beauty_bafe.retrieval.store import Store

PICTURES = [("a", "1"), ("b", "1"), ("c", "1")]
WRITING = ("begin", "append", "_write", "replace_file")  # what a killed process must not leave half done
POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


def vectors(rows: int) -> dict[str, np.ndarray]:
    return {"vectors": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)}


def filled(folder: Path, key: dict[str, str] | None = None) -> Store:
    store = Store(folder, key or {"checkpoint": "x"})
    store.begin(PICTURES, {"compiled": False})
    store.append(PICTURES[:2], vectors(2), {PICTURES[2]: "cut short"})
    return store


def test_what_was_written_is_read_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path)
    again = Store(tmp_path, {"checkpoint": "x"})
    assert all(picture in again for picture in PICTURES)
    assert again.unreadable == {("c", "1"): "cut short"}
    assert again.read([("b", "1"), ("a", "1")])["vectors"].tolist() == [[2, 3], [0, 1]]
    assert again.plan(PICTURES)["compiled"] is False
    assert again.plan(PICTURES[:2]) == {}


def test_another_making_is_refused_by_its_key(tmp_path: Path) -> None:
    filled(tmp_path, {"checkpoint": "x", "pooling": "spoc"})
    with pytest.raises(ValueError, match="made with pooling=spoc, now it is pooling=gem; type another features=DIR, or delete"):
        Store(tmp_path, {"checkpoint": "x", "pooling": "gem"})


def test_pictures_that_are_gone_or_changed_are_dropped(tmp_path: Path) -> None:
    filled(tmp_path)
    store = Store(tmp_path, {"checkpoint": "x"})
    now = [("b", "1"), ("c", "2"), ("d", "1")]
    store.begin(now, {})
    assert [picture in store for picture in now] == [True, False, False]
    assert load_file(tmp_path / "000000.safetensors")["vectors"].tolist() == [[2, 3]]
    store.append([("c", "2"), ("d", "1")], {"vectors": np.full((2, 2), 9, np.float32)}, {})
    assert Store(tmp_path, {"checkpoint": "x"}).read(now)["vectors"].tolist() == [[2, 3], [9, 9], [9, 9]]


def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    store = filled(tmp_path)
    broken = {"vectors": np.array([[0, 1], [np.nan, 3]], np.float32)}
    about = {"about": '{"pictures": [["a", "1"], ["b", "1"]], "unreadable": []}'}
    save_file(broken, tmp_path / "000000.safetensors", about)
    with pytest.raises(ValueError, match=r"000000.safetensors', row 1 \('b'\) is not finite; delete the file"):
        store.read(PICTURES[:2])


@pytest.mark.parametrize("content", [b"", b"no shard", None])
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    filled(tmp_path)
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-3] if content is None else content)
    with pytest.raises(ValueError, match=r"000000.safetensors' is damaged .*; delete it and type the same command"):
        Store(tmp_path, {"checkpoint": "x"})


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"could not write .*000001.safetensors.*is the disk full"):
        store.append([("d", "1")], vectors(1), {})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.safetensors", "manifest.json"]


def describe(checkpoint: Path, catalog: Catalog, features: Path) -> None:
    extraction = FeatureExtraction(features, device="cpu", precision="32-true", num_workers=0, shard=4)
    extraction(load_members(str(checkpoint), dict(enumerate(POOLINGS))), catalog, "gallery", "pictures", Skipped(), masks=True)


def content(features: Path) -> dict[str, bytes]:
    return {str(file.relative_to(features)): file.read_bytes() for file in sorted(features.rglob("*.*")) if file.is_file()}


def die_at(line: int) -> None:
    """kill -9 of this process when it is about to run that many lines of what writes; `line` is counted from 1."""
    ran = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal ran
        code = frame.f_code
        if Path(code.co_filename).stem not in ("store", "manifest") or code.co_name not in WRITING:
            return None
        ran += event == "line"
        if ran == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def test_killed_at_ten_random_moments_and_resumed_to_the_byte(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    """kill -9 of a child that describes 48 pictures in 13 shards of 4, for two poolings; then the same command again.

    The moments are lines of code, not seconds: on a busy machine a clock kills before the work or after it.
    """
    (toy / "gallery" / "zz_broken.jpg").write_bytes(b"no picture")
    try:
        catalog = from_folder(toy / "gallery")
        describe(tiny_checkpoint, catalog, tmp_path / "whole")
        expected = content(tmp_path / "whole")
        assert sum(name.endswith("safetensors") for name in expected) == 2 * 13
        rng = random.Random(0)
        folder = tmp_path / "killed"
        for line in [rng.randint(1, 60) for _ in range(10)]:
            child = os.fork()
            if child == 0:
                try:
                    torch.set_num_threads(1)
                    die_at(line)
                    describe(tiny_checkpoint, catalog, folder)
                finally:
                    os._exit(0)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was to be killed while it worked"
            for file in folder.rglob("*.safetensors"):
                load_file(file)  # what is there is whole
        describe(tiny_checkpoint, catalog, folder)
        for leftover in folder.rglob("*.part"):
            leftover.unlink()
        assert content(folder) == expected
    finally:
        (toy / "gallery" / "zz_broken.jpg").unlink()
