from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.data.pictures import UnreadablePicture, letterbox, read_picture

RED = (200, 30, 40)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_exif_orientation_is_turned(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 10, 20))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise: the left side comes up
    rgb = read_picture(save(tmp_path / "a.jpg", image, exif=exif, quality=95)).rgb
    assert rgb.shape == (40, 20, 3)
    assert np.abs(rgb[3, 10].astype(int) - RED).max() < 20
    assert rgb[36, 10].min() > 240


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("RGBA", (*RED, 255), RED),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("F", 90.0, (90, 90, 90)),
    ],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, value: object, expected: tuple[int, int, int]) -> None:
    suffix = ".tif" if mode in ("CMYK", "F") else ".png"
    picture = read_picture(save(tmp_path / f"a{suffix}", Image.new(mode, (20, 18), value)))
    assert picture.rgb.dtype == np.uint8
    assert picture.rgb.shape == (18, 20, 3)
    assert np.abs(picture.rgb[9, 9].astype(int) - expected).max() <= 1


def test_palette_with_transparency_keeps_its_alpha(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 20, 30, *RED])
    image.paste(1, (5, 5, 15, 15))
    picture = read_picture(save(tmp_path / "a.png", image, transparency=0))
    assert picture.alpha is not None
    assert picture.rgb[0, 0].tolist() == [255, 255, 255]
    assert picture.rgb[10, 10].tolist() == list(RED)
    assert (picture.alpha > 0).sum() == 100


def test_sixteen_bit_grey_spans_the_whole_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16)[None].repeat(20, axis=0)
    rgb = read_picture(save(tmp_path / "a.png", Image.fromarray(ramp))).rgb
    assert np.abs(rgb[10, :, 0].astype(int) - np.arange(256)).max() <= 1


def broken(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(stream, "JPEG")
    return {"truncated": stream.getvalue()[:3000], "empty": b"", "text": b"this is no picture\n"}[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("truncated", "truncated"), ("empty", "cannot identify"), ("text", "cannot identify")],
)
def test_broken_files_are_refused_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(broken(kind))
    with pytest.raises(UnreadablePicture, match=reason):
        read_picture(file)


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture, match="no such file"):
        read_picture(tmp_path / "a.jpg")


def test_absurd_size_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beauty_bafe.data.pictures.MAX_PIXELS", 100)
    with pytest.raises(UnreadablePicture, match="20 x 20 is over 100 pixels"):
        read_picture(save(tmp_path / "a.png", Image.new("RGB", (20, 20))))


def test_pillows_own_limit_is_neither_used_nor_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    files = [save(tmp_path / f"a{suffix}", picture) for suffix in (".png", ".jpg", ".bmp", ".ppm")]
    wanted = [read_picture(file).rgb for file in files]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Image.open refuses 1,200
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        assert all(np.array_equal(read_picture(file).rgb, rgb) for file, rgb in zip(files, wanted, strict=True))
    lines = "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import beauty_bafe.data.pictures; "
    subprocess.run([sys.executable, "-c", lines + "assert before == Image.MAX_IMAGE_PIXELS"], check=True)


def test_one_pixel_and_huge_pictures_are_read(tmp_path: Path) -> None:
    one = read_picture(save(tmp_path / "one.png", Image.new("RGB", (1, 1), RED)), 224).rgb
    assert letterbox(one, 32)[16, 16].tolist() == list(RED)
    # 12,000 x 9,000: the decoder skips detail, so that the pixels never stand in memory whole.
    huge = read_picture(save(tmp_path / "huge.jpg", Image.new("RGB", (12000, 9000), RED), quality=50), 224).rgb
    assert huge.shape == (336, 448, 3)
    assert letterbox(huge, 224).shape == (224, 224, 3)


def test_draft_keeps_enough_detail(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.effect_noise((1200, 300), 60).convert("RGB"))
    full, draft = letterbox(read_picture(path).rgb, 224), letterbox(read_picture(path, 224).rgb, 224)
    assert read_picture(path, 224).rgb.shape == (150, 600, 3)
    alpha = read_picture(save(tmp_path / "b.png", Image.new("RGBA", (900, 100))), 100).alpha
    assert alpha is not None
    assert alpha.shape == (22, 200)
    assert np.abs(full.astype(int) - draft).mean() < 3


@pytest.mark.parametrize(("width", "height"), [(100, 40), (40, 100), (64, 64), (10, 7), (1, 300)])
def test_letterbox_centres_on_white(width: int, height: int) -> None:
    canvas = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    assert canvas.shape == (64, 64, 3)
    dark = canvas[..., 0] == 0
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    expected = (max(1, round(height * 64 / max(width, height))), max(1, round(width * 64 / max(width, height))))
    assert (len(rows), len(columns)) == expected
    assert abs(rows[0] - (63 - rows[-1])) <= 1
    assert abs(columns[0] - (63 - columns[-1])) <= 1
