from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from beauty_bafe.data.toy import draw_catalogue_photo, draw_query, draw_toy, toy_datamodule
from beauty_bafe.data.toy_products import KINDS, draw_product


def digest(pictures: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:16]


def test_pictures_are_the_same_on_every_machine() -> None:
    """Change these digests only together with VERSION in toy.py."""
    assert digest([draw_product(0, family, 1) for family in range(16)]) == "977da5d22fbeb5b8"
    assert digest([draw_catalogue_photo(0, product, 128) for product in range(8)]) == "9ca9f59a0b47515f"
    # Hands and solids are drawn in floating point, so that queries are the same on one machine alone.
    first, second = (digest([draw_query(0, query, 100, 128)[0] for query in range(8)]) for _ in range(2))
    assert first == second


def test_every_kind_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        monkeypatch.setattr("beauty_bafe.data.toy_products.KINDS", [kind])
        for family in range(6):
            alpha = draw_product(1, family, 0)[..., 3]
            assert 0.02 < (alpha > 0).mean() < 0.7, kind
            frame = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
            assert not frame.any(), f"{kind} is cut off at the frame"


def test_variants_share_their_shape_and_differ_in_colour() -> None:
    for family in range(10):
        first, second = draw_product(2, family, 0), draw_product(2, family, 1)
        assert np.array_equal(first[..., 3], second[..., 3])
        assert np.abs(first[..., :3].astype(int) - second[..., :3]).max() > 40
    assert not np.array_equal(draw_product(2, 0, 0), draw_product(3, 0, 0))


def test_catalogue_photos_stand_on_white_or_off_white() -> None:
    corners = np.array([draw_catalogue_photo(0, product, 96)[0, 0] for product in range(30)])
    assert corners.min() > 225
    assert 8 < (corners.min(axis=1) == 255).sum() < 28


def test_queries_show_their_product_under_the_mask() -> None:
    shapes = set()
    for query in range(20):
        picture, mask, product = draw_query(4, query, 30, 128)
        assert picture.shape[:2] == mask.shape
        assert 0 <= product < 30
        assert 0.01 < (mask > 127).mean() < 0.8
        shapes.add(mask.shape)
    assert len(shapes) > 1, "some are oblong"


def test_folder_holds_what_truth_names(toy: Path) -> None:
    rows = list(csv.reader((toy / "truth.csv").open()))
    assert rows[0] == ["query", "product"]
    assert len(rows) == 25
    for query, product in rows[1:]:
        picture = cv2.imread(str(toy / "queries" / f"{query}.jpg"))
        mask = cv2.imread(str(toy / "masks" / f"{query}.png"), cv2.IMREAD_GRAYSCALE)
        assert picture.shape[:2] == mask.shape
        assert (toy / "gallery" / f"{product}.jpg").is_file()


def test_workers_change_nothing_and_a_finished_folder_is_kept(toy: Path, tmp_path: Path) -> None:
    again = draw_toy(tmp_path, products=48, queries=24, seed=3, size=160, workers=2)
    assert again.name == toy.name
    for file in toy.rglob("*.*"):
        assert (again / file.relative_to(toy)).read_bytes() == file.read_bytes()
    kept = again / "gallery" / "p000000.jpg"
    kept.unlink()
    draw_toy(tmp_path, products=48, queries=24, seed=3, size=160)
    assert not kept.exists(), "finished: used as it is"
    (again / "toy.json").unlink()
    draw_toy(tmp_path, products=48, queries=24, seed=3, size=160, workers=1)
    assert kept.read_bytes() == (toy / "gallery" / "p000000.jpg").read_bytes(), "unfinished: drawn again"


def test_command_line(tmp_path: Path) -> None:
    words = ["--products", "3", "--queries", "1", "--seed", "1", "--size", "64", "--root"]
    done = subprocess.run(
        [sys.executable, "-m", "beauty_bafe.data.toy", *words, str(tmp_path)], capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.splitlines()[-1])
    assert len(list((folder / "gallery").iterdir())) == 3
    shutil.rmtree(folder)


def test_toys_are_not_drawn_among_somebodys_pictures(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cream.jpg").touch()
    (tmp_path / "mine.csv").touch()
    for name, found in {"mine": "cream.jpg", "mine.csv": "mine.csv"}.items():
        with pytest.raises(ValueError, match=rf"{name} contains '{found}'; type data=folder data.root=.*{name} for"):
            toy_datamodule(str(tmp_path / name), 6, 0)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["cream.jpg"]
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / ".hidden").touch()
    for seed in (0, 1):  # a toy beside another, a hidden file beside both
        draw_toy(tmp_path / "toy", 6, 0, seed, workers=1)
        with pytest.raises(TypeError, match="missing"):  # it got as far as the data module, which wants its settings
            toy_datamodule(str(tmp_path / "toy"), 6, seed)
