"""What training and retrieval keep on disk, listed and removed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from beauty_bafe.commands.cache import KINDS, cache, find_entries
from beauty_bafe.data.catalog import Skipped, from_folder
from beauty_bafe.data.photos import PhotoCache, inspect_photo
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.extraction.store import Store
from beauty_bafe.manifest import locked
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import spoc

from .conftest import ROOT

Command = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def folder(toy: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """One entry of each kind, written by what writes them, in folders as conf has them; and what is nobody's cache."""
    root = tmp_path / "cache"
    pictures = from_folder(toy / "gallery").subset(range(4))
    extraction = FeatureExtraction(root / "features", num_workers=0, device="cpu", precision="32-true")
    members = load_members(str(tiny_checkpoint), {"spoc": Pooling(spoc, saliency=True)})
    extraction(members, pictures, str(toy / "gallery"), "pictures", Skipped())
    PhotoCache(root / "photos", 32).fill(pictures, lambda part: (inspect_photo(path, 32) for path in part.paths))
    with locked([root / "features" / "sift-12"]):
        Store(root / "features" / "sift-12", {"size": 320}).begin([("a", "1"), ("b", "2")], {})
    with locked([root / "features" / "rehearsal-320"]):
        (root / "features" / "rehearsal-320" / "ä.jpg").write_bytes(b"picture")
    (root / "features" / "vocabulary-12.npy").write_bytes(b"vocabulary")
    (root / "notes.txt").write_text("mine", encoding="utf-8")
    with locked([root / "index"]):  # retrieve.py's index_dir, put here by somebody
        (root / "index" / "current").write_text("000001", encoding="utf-8")
    return root


@pytest.fixture
def command(folder: Path, configure: Callable[..., DictConfig]) -> Command:
    """Runs it: kind and name of what it showed."""

    def run(*words: str) -> list[tuple[str, str]]:
        return [(entry.kind, entry.path.name) for entry in cache(configure("cache", f"folder={folder}", *words))]

    return run


def kinds(folder: Path) -> list[str]:
    return sorted(entry.kind for entry in find_entries(folder))


def test_every_kind_is_listed(command: Command, folder: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert sorted(kind for kind, _ in command()) == kinds(folder) == sorted(KINDS)
    assert sorted(folder.rglob("*")) == before
    shown = capsys.readouterr().out
    assert f"4 pictures of {(toy / 'gallery').resolve()}, spoc" in shown
    assert "features/sift-12: 2 pictures" in shown
    assert f"5 entries, {sum(entry.size for entry in find_entries(folder)) / 1e6:.1f} MB kept in {folder}" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_is_removed(command: Command, folder: Path, kind: str) -> None:
    others = {file: file.read_bytes() for entry in find_entries(folder) if entry.kind != kind for file in files(entry.path)}
    assert [found for found, _ in command(f"remove={kind}")] == [kind]
    assert kinds(folder) == sorted(set(KINDS) - {kind})
    assert all(file.read_bytes() == content for file, content in others.items())


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def test_all_is_removed_but_what_is_not_ours(command: Command, folder: Path) -> None:
    assert len(command("remove=all")) == len(KINDS)
    left = {file.relative_to(folder).as_posix() for file in files(folder)}
    assert {name for name in left if not name.endswith("/lock")} == {"notes.txt", "index/current"}
    assert command() == command("remove=all") == []


def test_what_was_used_lately_stays(command: Command, folder: Path) -> None:
    for file in files(folder):
        os.utime(file, (time.time() - 40 * 86400,) * 2)
    with locked([folder / "features" / "sift-12"]):
        pass  # a run that only reads takes the lock as well
    assert sorted(kind for kind, _ in command("remove=all", "days=30")) == sorted(set(KINDS) - {"keypoints"})
    assert kinds(folder) == ["keypoints"]


def test_an_entry_in_use_is_waited_for(command: Command, folder: Path) -> None:
    place = folder / "features" / "sift-12"
    with locked([place]):
        removing = threading.Thread(target=command, args=["remove=keypoints"])
        removing.start()
        removing.join(timeout=1)
        assert (place / "manifest.json").is_file()
    removing.join()
    assert not (place / "manifest.json").exists()
    with locked([place]):  # who comes next finds it empty and fills it
        store = Store(place, {"size": 480})
        store.begin([("a", "1")], {})
        assert store.manifest["pictures"] == 1


def test_what_was_removed_is_made_again(command: Command, folder: Path, toy: Path, tiny_checkpoint: Path) -> None:
    command("remove=all")
    pictures = from_folder(toy / "gallery").subset(range(4))
    photos = PhotoCache(folder / "photos", 32)
    assert len(photos.fill(pictures, lambda part: (inspect_photo(path, 32) for path in part.paths))) == 4
    assert photos(pictures.paths[0]).photo.shape == (32, 32, 3)
    assert kinds(folder) == ["photos"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("remove=foto", "remove=foto: type descriptors, keypoints, photos, views, vocabulary, or all"),
        ("days=-1", "days=-1: type 0 or more"),
    ],
)
def test_mistakes_are_answered(command: Command, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(word)


def test_the_command_in_a_folder_without_a_cache(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "beauty_bafe", "cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "0 entries, 0.0 MB kept in runs/cache\n"), done.stderr
    assert not list(tmp_path.iterdir()), "a look leaves nothing behind"
