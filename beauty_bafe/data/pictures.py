"""Decode picture files as RGB, and letterbox pictures into a square canvas."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from .places import BrokenShard, VirtualFile

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
# A header can declare any size; above this, the pixels would need over 1 GB.
MAX_PIXELS = 400_000_000


class UnreadablePicture(ValueError):
    """A file that is not a picture, is truncated, or is too large; the message gives the reason."""


class Picture(NamedTuple):
    """`rgb`: uint8 (H, W, 3), composited on white. `alpha`: uint8 (H, W), or None for opaque files."""

    rgb: np.ndarray
    alpha: np.ndarray | None


def read_picture(source: str | Path | bytes | VirtualFile, longest: int | None = None) -> Picture:
    """Decode a file, bytes, or a VirtualFile to 8-bit RGB, from grey, palette, alpha, CMYK or 16-bit; EXIF rotation is applied.

    With `longest`, a picture whose longest side exceeds four times as many pixels is shrunk to two to four times, to save
    memory and, for JPEG, decoding time.

    Raises UnreadablePicture with the reason, or BrokenShard; never returns a placeholder.
    """
    try:
        content = source.read_bytes() if isinstance(source, VirtualFile) else source
        with _open(content) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadablePicture(f"{image.width} x {image.height} is over {MAX_PIXELS:,} pixels; shrink the file first")
            whole = image.size
            if longest:
                # draft() keeps both sides at or above the requested size, so the shorter side must be scaled too.
                scale = 2 * longest / max(image.size)
                image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
            picture = _decode_jpeg(content, image, whole) or _to_rgb(ImageOps.exif_transpose(image))
            return shrink(picture, longest)
    except (UnreadablePicture, BrokenShard):
        raise
    except Exception as error:  # PIL's plugins raise anything from OSError to SyntaxError and struct.error
        if isinstance(error, MemoryError):
            raise
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        if isinstance(source, str | Path):
            reason = reason.replace(str(source), Path(source).name)
        raise UnreadablePicture(reason) from error


def convert_image(image: Image.Image, longest: int | None = None) -> Picture:
    """Convert an open picture, as `read_picture` does for a file."""
    return shrink(_to_rgb(ImageOps.exif_transpose(image)), longest)


def _open(source: str | Path | bytes) -> Image.Image:
    """Image.open without its pixel limit, which is a global setting of the process: `read_picture` has its own.

    Pillow's decoders of GIF, TIFF and WebP still check it.
    """
    if isinstance(source, bytes):
        start = source[:16]
    else:
        with open(source, "rb") as stream:
            start = stream.read(16)
    Image.preinit()  # the common formats first
    Image.init()
    for factory, accepts in [Image.OPEN[name] for name in Image.ID]:
        try:
            accepted = accepts is None or accepts(start)
            if not accepted or isinstance(accepted, str):  # a string says which plugin is missing
                continue
            if isinstance(source, bytes):
                return factory(io.BytesIO(source), "")
            return factory(str(source), str(source))  # type: ignore[arg-type]  # opens and closes the file
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # try the next format, as Image.open does
    raise UnidentifiedImageError("cannot identify image file")


def _decode_jpeg(source: str | Path | bytes, image: Image.Image, whole: tuple[int, int]) -> Picture | None:
    """Decode an upright colour or grey JPEG at its `whole` size: the same pixels as Pillow in half the time; otherwise None."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or image.size != whole:
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    try:
        content = (
            torch.frombuffer(bytearray(source), dtype=torch.uint8) if isinstance(source, bytes) else read_file(str(source))
        )
        pixels = decode_jpeg(content, mode=ImageReadMode.RGB)
    except RuntimeError:
        return None  # Pillow can read it, or raises the exact reason
    return Picture(pixels.permute(1, 2, 0).contiguous().numpy(), None)


def _to_rgb(image: Image.Image) -> Picture:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        # 16-bit files arrive as "I;16" or, from some decoders, as 32-bit "I"; both span 0..65535.
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257.0
        grey = np.clip(values + 0.5, 0, 255).astype(np.uint8)
        return Picture(np.repeat(grey[..., None], 3, axis=2), None)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = np.array(image.convert("RGBA"))
        alpha = rgba[..., 3]
        if alpha.min() < 255:
            weight = alpha[..., None].astype(np.float32) / 255
            rgb = (rgba[..., :3] * weight + 255 * (1 - weight) + 0.5).astype(np.uint8)
            return Picture(rgb, alpha)
    return Picture(np.array(image.convert("RGB")), None)


def shrink(picture: Picture, longest: int | None) -> Picture:
    """Shrink a picture over four times as large as `longest` to twice `longest`; others are unchanged, as all are if None."""
    if not longest:
        return picture
    scale = 2 * longest / max(picture.rgb.shape)
    if scale >= 0.5:
        return picture
    size = tuple(max(1, round(extent * scale)) for extent in picture.rgb.shape[1::-1])
    rgb, alpha = (None if part is None else cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in picture)
    assert rgb is not None
    return Picture(rgb, alpha)


def letterbox(picture: np.ndarray, size: int, fill: int = 255) -> np.ndarray:
    """Scale the longest side to `size` and centre on a canvas of value `fill`: uint8 (H, W[, 3]) -> (size, size[, 3])."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    if (new_width, new_height) != (width, height):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        picture = cv2.resize(picture, (new_width, new_height), interpolation=interpolation)
    if new_width == new_height == size:
        return picture
    canvas = np.full((size, size, *picture.shape[2:]), fill, np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = picture
    return canvas
