"""Descriptors on disk: whole or not at all, of one making, resumed to the byte."""

from __future__ import annotations

import os
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from beauty_bafe.data.catalog import Catalog, Skipped, from_folder
from beauty_bafe.extraction.features import Features
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.extraction.store import Store
from beauty_bafe.manifest import locked, replace_file
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc

PICTURES = [("a", "1"), ("b", "1"), ("c", "1")]
WRITING = ("begin", "append", "_write", "replace_file")  # what a killed process must not leave half done
POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


def vectors(rows: int) -> dict[str, np.ndarray]:
    return {"vectors": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)}


def filled(folder: Path, key: dict[str, str] | None = None) -> Store:
    store = Store(folder, key or {"checkpoint": "x"})
    store.begin(PICTURES, {"runtime": "torch"})
    store.append(PICTURES[:2], vectors(2), {PICTURES[2]: "cut short"})
    return store


def test_what_was_written_is_read_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path)
    again = Store(tmp_path, {"checkpoint": "x"})
    assert all(picture in again for picture in PICTURES)
    assert again.unreadable == {("c", "1"): "cut short"}
    assert again.read([("b", "1"), ("a", "1")])["vectors"].tolist() == [[2, 3], [0, 1]]
    assert again.plan(PICTURES)["runtime"] == "torch"
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
    with pytest.raises(ValueError, match=r"000000.safetensors' is damaged .*; delete it and run the same command again"):
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


def test_rows_that_another_run_moved_are_not_taken_for_others(tmp_path: Path) -> None:
    first = filled(tmp_path)
    Store(tmp_path, {"checkpoint": "x"}).begin(PICTURES[1:], {})
    with pytest.raises(ValueError, match=r"another run has changed .*000000.safetensors' since .*; run the same command again"):
        first.read(PICTURES[:1])
    with pytest.raises(ValueError, match="another run has changed"):
        first.map(PICTURES[:1])


def test_mapped_rows_stay_as_they_are(tmp_path: Path) -> None:
    first = filled(tmp_path)
    first.map(PICTURES[:2])
    Store(tmp_path, {"checkpoint": "x"}).begin(PICTURES[1:], {})
    assert first.row(PICTURES[0])["vectors"].tolist() == [0, 1]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """The second starts and ends while the first writes."""
    file = tmp_path / "a.json"

    def write(part: Path) -> None:
        part.write_text("first")
        with ThreadPoolExecutor(1) as other:
            other.submit(replace_file, file, lambda part: part.write_text("second")).result()

    replace_file(file, write)
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "000001.safetensors.123-456.part").touch()
    Store(tmp_path, {"checkpoint": "x"}).begin(PICTURES[1:], {})
    assert not list(tmp_path.glob("*.part"))


def test_a_read_only_folder_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with locked([tmp_path]):
        assert not list(tmp_path.iterdir())


def describe(checkpoint: Path, catalog: Catalog, features: Path) -> list[Features]:
    # In torch, as processes are forked here.
    extraction = FeatureExtraction(features, device="cpu", precision="32-true", num_workers=0, shard=4, runtime="torch")
    members = load_members(str(checkpoint), dict(enumerate(POOLINGS)))
    return extraction(members, catalog, "gallery", "pictures", Skipped(), masks=True)


def test_two_processes_at_once_on_one_store(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    """One of them describes a catalogue that lacks some pictures, and drops their rows."""
    whole = from_folder(toy / "gallery")
    catalogs = [whole, whole.subset(range(5, len(whole)))]
    children = []
    for number, catalog in enumerate(catalogs):
        children.append(os.fork())
        if children[-1] == 0:
            torch.set_num_threads(1)
            with (tmp_path / f"{number}.txt").open("w") as report, redirect_stdout(report), redirect_stderr(report):
                try:
                    for round in range(3):
                        for place, features in enumerate(describe(tiny_checkpoint, catalog, tmp_path / "features")):
                            np.save(tmp_path / f"{number}-{round}-{place}.npy", features.vectors)
                    os._exit(0)
                except BaseException as error:
                    report.write(f"{type(error).__name__}: {error}")
                    report.flush()
                    os._exit(1)
    for number, child in enumerate(children):
        assert os.waitpid(child, 0)[1] == 0, (tmp_path / f"{number}.txt").read_text()
    for number, catalog in enumerate(catalogs):
        for place, expected in enumerate(describe(tiny_checkpoint, catalog, tmp_path / "alone")):
            for round in range(3):
                assert np.array_equal(np.load(tmp_path / f"{number}-{round}-{place}.npy"), expected.vectors)


def test_threads_at_once_on_one_store(tmp_path: Path, toy: Path, tiny_checkpoint: Path) -> None:
    catalog = from_folder(toy / "gallery")
    expected = describe(tiny_checkpoint, catalog, tmp_path / "alone")
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(describe, tiny_checkpoint, catalog, tmp_path / "features") for _ in range(3)]
        for run in runs:
            for features, alone in zip(run.result(), expected, strict=True):
                assert np.array_equal(features.vectors, alone.vectors)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 2 * 12, "described once"


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
