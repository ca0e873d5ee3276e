from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.data.backgrounds import Backgrounds, procedural_background
from beauty_bafe.data.catalog import from_folder


def test_procedural_scenes_differ_and_repeat_with_the_seed() -> None:
    scenes = [procedural_background(np.random.default_rng(seed), 80) for seed in range(12)]
    assert all(scene.shape == (80, 80, 3) and scene.dtype == np.uint8 for scene in scenes)
    assert len({scene.tobytes() for scene in scenes}) == 12
    assert np.array_equal(scenes[3], procedural_background(np.random.default_rng(3), 80))


def test_photographs_are_cropped_not_squeezed(tmp_path: Path) -> None:
    columns = np.arange(400) // 40 % 2 * 255  # stripes of 40 pixels
    Image.fromarray(np.tile(columns.astype(np.uint8), (200, 1))).convert("RGB").save(tmp_path / "a.png")
    backgrounds = Backgrounds(from_folder(tmp_path))
    crop = backgrounds(np.random.default_rng(0), 100, (0.0, 0.0))  # as it is: stripes keep their width
    edges = np.flatnonzero(np.diff(crop[50, :, 0].astype(int)))
    assert set(np.diff(edges)) == {40}
    assert np.array_equal(crop[0], crop[99])
    assert not np.array_equal(crop, backgrounds(np.random.default_rng(1), 100, (0.0, 0.0)))
    assert backgrounds(np.random.default_rng(0), 300).shape == (300, 300, 3)  # larger than the photograph


def test_photographs_are_read_once(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    backgrounds = Backgrounds(from_folder(tmp_path))
    first = backgrounds(np.random.default_rng(0), 32)
    (tmp_path / "a.png").unlink()
    assert np.array_equal(first, backgrounds(np.random.default_rng(1), 32))


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (1900, 20)])
def test_large_photographs_are_kept_small(tmp_path: Path, size: tuple[int, int]) -> None:
    """Twelve megapixels came out of the JPEG decoder at half their side, 9 MB for each of 128 and each worker."""
    Image.new("RGB", size, "red").save(tmp_path / "a.jpg")
    backgrounds = Backgrounds(from_folder(tmp_path))
    backgrounds(np.random.default_rng(0), 224)
    (kept,) = backgrounds._cache.values()
    assert max(kept.shape) == 1280
    assert kept.shape[1] / kept.shape[0] == pytest.approx(size[0] / size[1], rel=0.1)
