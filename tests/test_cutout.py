"""Products cut out of pictures, as files."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

from beauty_bafe.commands.cutout import cutout, fit_mask
from beauty_bafe.data.pictures import letterbox, read_picture
from beauty_bafe.retriever import Retriever


@pytest.mark.parametrize(("height", "width"), [(300, 200), (90, 300), (224, 224), (60, 400)])
def test_a_mask_is_put_back_where_the_letterbox_took_it(height: int, width: int) -> None:
    shown = np.zeros((height, width), np.uint8)
    shown[height // 4 : height // 2 + 1, width // 3 : width // 2] = 255
    back = fit_mask(letterbox(shown, 112, 0).astype(float), height, width)
    assert back.shape == shown.shape
    assert np.abs(back.astype(int) - shown).mean() < 12  # blurred at its edges alone


def test_cutouts_are_resumed_and_broken_files_listed(
    tiny_checkpoint: Path, write_picture: Callable[..., Path], tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    files = [write_picture(f"in/p{number}.png", (60, 40 + number), number) for number in range(7)]
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    words = [f"pictures={tmp_path / 'in'}", f"checkpoints=[{tiny_checkpoint}]", f"output_dir={tmp_path / 'out'}"]
    words += ["batch_size=3", "max_skipped=0.2", "device=cpu", "precision=32-true"]
    assert cutout(configure("cutout", *words)) == 7
    shop = Retriever.build(tiny_checkpoint, {"one": files[0]}, ["device=cpu", "precision=32-true"])
    _, masks = shop.describe(files)
    assert masks is not None
    for file, mask in zip(files, masks, strict=True):
        pixels = np.asarray(Image.open(tmp_path / "out" / file.name))
        np.testing.assert_array_equal(pixels[..., :3], read_picture(file).rgb)
        expected = fit_mask(mask, *pixels.shape[:2]).astype(int)
        assert np.abs(pixels[..., 3] - expected).max() <= 1  # batches of another size
    rows = list(csv.reader((tmp_path / "out" / "skipped.csv").open()))
    assert [row[0] for row in rows] == ["id", "broken"]

    (tmp_path / "out" / "p3.png").unlink()
    later = (tmp_path / "out" / "p5.png").stat().st_mtime + 10
    os.utime(files[5], (later, later))
    assert cutout(configure("cutout", *words)) == 2, "the missing one and the one whose picture is newer"
    with pytest.raises(ValueError, match=r"was made with background=transparent, .*; type another output_dir=FOLDER"):
        cutout(configure("cutout", *words, "background=white"))
    with pytest.raises(ValueError, match=r"1 of 8 pictures cannot be read, more than max_skipped=0.1"):
        cutout(configure("cutout", *words, "max_skipped=0.1"))


def test_cutouts_on_white(
    tiny_checkpoint: Path, write_picture: Callable[..., Path], tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    write_picture("in/one.png", (60, 40))
    words = [f"pictures={tmp_path / 'in'}", f"checkpoints=[{tiny_checkpoint}]", "device=cpu", "precision=32-true"]
    for background in ("white", "transparent"):
        cutout(configure("cutout", *words, f"background={background}", f"output_dir={tmp_path / background}"))
    cut = Image.open(tmp_path / "transparent" / "one.png")
    white = Image.new("RGBA", cut.size, "white")
    white.alpha_composite(cut)
    found = np.asarray(Image.open(tmp_path / "white" / "one.png")).astype(int)
    assert np.abs(found - np.asarray(white.convert("RGB"))).max() <= 1


def test_cutout_says_what_it_needs(tiny_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="cutout needs pictures=FOLDER and checkpoints="):
        cutout(configure("cutout", "pictures=FOLDER"))
    words = ["pictures=FOLDER", f"checkpoints=[{tiny_checkpoint}]"]
    with pytest.raises(ValueError, match="background=black: type transparent or white"):
        cutout(configure("cutout", *words, "background=black"))
    (tmp_path / "list.csv").write_text("id,path\n../up,a.png\n")
    with pytest.raises(ValueError, match=r"the id '\.\./up' cannot be a file name"):
        cutout(configure("cutout", f"pictures={tmp_path / 'list.csv'}", words[1], f"output_dir={tmp_path / 'out'}"))
