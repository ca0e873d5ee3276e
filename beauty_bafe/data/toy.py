"""A synthetic toy catalogue of any size: catalogue photos, and street-like queries with masks and ground truth.

python -m beauty_bafe.data.toy --root toy --products 400 --queries 100 --seed 0
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..manifest import replace_file
from .augmentation.base import Sample
from .augmentation.hands import paste_in_hand
from .augmentation.solids import as_solid
from .backgrounds import procedural_background, random_color
from .datamodule import SaliencyDataModule
from .toy_products import draw_product
from .toy_shapes import CANVAS
from .workers import default_workers

VERSION = 2  # increase it when a drawing changes: folders of an older version are drawn again
# Products come in groups of six: (line within the group, colour). Three colours of one line are near-duplicates.
SIX = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0)]
CATALOGUE, STREET = 1, 2  # part of the seeds, so that the two kinds of pictures use different random numbers
TOY_FOLDER = re.compile(r"products\d+_queries\d+_seed\d+_\d+px")  # names of draw_toy's folders
SOLID, HELD = 0.4, 0.4  # shares of the queries with the product rotated in 3D, and in a hand


def draw_catalogue_photo(seed: int, product: int, size: int) -> np.ndarray:
    """Product `product` on white or off-white, uint8 RGB (size, size, 3)."""
    rng = np.random.default_rng((seed, CATALOGUE, product))
    backdrop = np.array([255, 255, 255] if rng.random() < 0.6 else rng.integers(243, 255, 3), np.int32)
    canvas = np.tile(backdrop, (size, size, 1))
    if rng.random() < 0.3:  # studio light falls off towards the floor
        canvas -= (np.arange(size) * int(rng.integers(4, 14)) // size)[:, None, None]
    layer = _place(_rgba(seed, product), size, rng.uniform(0.75, 0.92), 0.0, (0.5, 0.5), 0.0, rng)
    if rng.random() < 0.5:
        canvas = _shadow(canvas, layer[..., 3], (0, size // 50), size * 0.03, rng.uniform(0.1, 0.25))
    return _over(canvas, layer)


def draw_query(seed: int, query: int, products: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A street-like picture, its true mask and the product it shows: uint8 RGB (H, W, 3), uint8 (H, W), product number."""
    rng = np.random.default_rng((seed, STREET, query))
    product = int(rng.integers(products))
    canvas = procedural_background(rng, size).astype(np.int32)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.6 else 0):  # sometimes other, smaller products
        spot = (rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.95))
        other = _place(
            _rgba(seed, int(rng.integers(products))), size, rng.uniform(0.15, 0.3), rng.uniform(-180, 180), spot, 0.05, rng
        )
        canvas = _over(_shadow(canvas, other[..., 3], (2, 3), 3.0, 0.4), other)
    spot = (rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65))
    angle = rng.uniform(-35, 35) if rng.random() < 0.7 else rng.uniform(-180, 180)
    shown = _rgba(seed, product)
    if rng.random() < SOLID:
        shown = np.dstack(as_solid(*_on_white(shown), rng))
    layer = _place(shown, size, rng.uniform(0.5, 0.95), angle, spot, 0.12, rng)
    if rng.random() < HELD:
        held = paste_in_hand(canvas.clip(0, 255).astype(np.uint8), _on_white(layer, premultiplied=True), rng)
        canvas, mask = held.photo.astype(np.int32), held.mask
    else:
        offset = (int(rng.integers(-8, 9)), int(rng.integers(2, 12)))
        canvas = _over(_shadow(canvas, layer[..., 3], offset, size * 0.025, rng.uniform(0.2, 0.6)), layer)
        mask = layer[..., 3]
    if rng.random() < 0.25:
        canvas, mask = _occlude(canvas, mask, rng)
    picture = _relight(canvas, rng)
    if rng.random() < 0.4:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 1.6))
    if rng.random() < 0.3:  # phone pictures are not square
        cut = int(size * rng.uniform(0.08, 0.16))
        window = (slice(None), slice(cut, -cut)) if rng.random() < 0.5 else (slice(cut, -cut), slice(None))
        picture, mask = picture[window], mask[window]
    return picture, mask, product


def draw_toy(root: str | Path, products: int, queries: int, seed: int, size: int = 256, workers: int | None = None) -> Path:
    """Draw gallery/, queries/, masks/ and truth.csv into a folder of `root` named by size and seed, and return that folder.

    A finished folder is reused; an unfinished one is drawn again, with the same pictures.
    """
    folder = Path(root) / f"products{products}_queries{queries}_seed{seed}_{size}px"
    made = {"version": VERSION, "products": products, "queries": queries, "seed": seed, "size": size}
    note = folder / "toy.json"
    if note.is_file() and json.loads(note.read_text()) == made:
        return folder
    from rich.progress import track

    for name in ("gallery", "queries", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    draw = partial(_write_picture, folder, seed, products, size)
    jobs = [("gallery", i) for i in range(products)] + [("queries", i) for i in range(queries)]
    truth = []
    with ProcessPoolExecutor(workers or default_workers(), initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        for row in track(pool.map(draw, jobs, chunksize=16), f"drawing {products} products, {queries} queries", len(jobs)):
            truth += [row] if row else []
    with (folder / "truth.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("query", "product"), *truth])
    replace_file(note, lambda part: part.write_text(json.dumps(made)))
    return folder


def toy_datamodule(root: str, products: int, toy_seed: int, **options: Any) -> SaliencyDataModule:
    """SaliencyDataModule for a toy catalogue, drawn under `root` on first use.

    Raises ValueError if `root` contains anything else: toys drawn into a folder of pictures would become part of a gallery.
    """
    place = Path(root)
    names = sorted(file.name for file in place.iterdir()) if place.is_dir() else [place.name] if place.exists() else []
    others = [name for name in names if not name.startswith(".") and not TOY_FOLDER.fullmatch(name)]
    if others:
        raise ValueError(
            f"data=toy draws its own catalogue, but data.root={root} contains '{others[0]}'; "
            f"type data=folder data.root={root} for pictures of your own"
        )
    return SaliencyDataModule(draw_toy(root, products, 0, toy_seed) / "gallery", **options)


def _write_picture(folder: Path, seed: int, products: int, size: int, job: tuple[str, int]) -> tuple[str, str] | None:
    kind, index = job
    if kind == "gallery":
        quality = 80 + index * 7 % 16
        _save(folder / kind / f"p{index:06d}.jpg", draw_catalogue_photo(seed, index, size), quality)
        return None
    picture, mask, product = draw_query(seed, index, products, size)
    _save(folder / kind / f"q{index:06d}.jpg", picture, 60 + index * 7 % 36)
    _save(folder / "masks" / f"q{index:06d}.png", mask, 0)
    return f"q{index:06d}", f"p{product:06d}"


def _save(file: Path, picture: np.ndarray, quality: int) -> None:
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(file), picture, [cv2.IMWRITE_JPEG_QUALITY, quality] if quality else []):
        raise OSError(f"could not write '{file}'; is the disk full?")


def _rgba(seed: int, product: int) -> np.ndarray:
    """Product `product` of the catalogue, cropped to its bounding square: uint8 RGBA (S, S, 4)."""
    line, variant = SIX[product % 6]
    whole = draw_product(seed, product // 6 * 4 + line, variant)
    x, y, width, height = cv2.boundingRect(whole[..., 3])
    side = max(width, height)
    trimmed = np.zeros((side, side, 4), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    trimmed[top : top + height, left : left + width] = whole[y : y + height, x : x + width]
    return trimmed


def _place(
    product: np.ndarray,
    size: int,
    scale: float,
    angle: float,
    centre: tuple[float, float],
    perspective: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Scale, rotate (degrees), tilt and move an RGBA product on an empty canvas: RGBA (size, size, 4), alpha premultiplied."""
    side = max(8, round(size * scale))
    small = product.astype(np.uint16)
    small[..., :3] = small[..., :3] * small[..., 3:] // 255
    source = cv2.resize(small.astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA)
    turn = cv2.getRotationMatrix2D((0, 0), angle, 1.0)[:, :2]
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    target = corners @ turn.T + np.array(centre) * size + rng.uniform(-perspective, perspective, (4, 2)) * side
    warp = cv2.getPerspectiveTransform((corners + side / 2).astype(np.float32), target.astype(np.float32))
    return cv2.warpPerspective(source, warp, (size, size), flags=cv2.INTER_LINEAR)


def _on_white(product: np.ndarray, premultiplied: bool = False) -> Sample:
    """An RGBA product as a catalogue photo and its mask."""
    rgb, alpha = product[..., :3].astype(np.uint16), product[..., 3:].astype(np.uint16)
    if premultiplied:
        rgb = np.minimum(rgb * 255 // np.maximum(alpha, 1), 255)
    return Sample(np.where(alpha > 0, rgb, 255).astype(np.uint8), product[..., 3].copy())


def _over(canvas: np.ndarray, layer: np.ndarray) -> np.ndarray:
    weight = layer[..., 3:].astype(np.int32)
    return (layer[..., :3] + (canvas.astype(np.int32) * (255 - weight) + 127) // 255).clip(0, 255).astype(np.uint8)


def _shadow(canvas: np.ndarray, mask: np.ndarray, offset: tuple[int, int], blur: float, depth: float) -> np.ndarray:
    shifted = cv2.warpAffine(mask, np.array([[1, 0, offset[0]], [0, 1, offset[1]]], np.float32), mask.shape[::-1])
    soft = cv2.GaussianBlur(shifted, (0, 0), blur).astype(np.int32)
    return canvas * (65025 - soft[..., None] * int(255 * depth)) // 65025


def _occlude(canvas: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cover a random point of the product with an ellipse."""
    size = mask.shape[0]
    cover = np.zeros_like(mask)
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return canvas, mask
    pick = int(rng.integers(len(ys)))
    axes = (int(size * rng.uniform(0.1, 0.35)), int(size * rng.uniform(0.03, 0.08)))
    cv2.ellipse(cover, (int(xs[pick]), int(ys[pick])), axes, float(rng.integers(180)), 0, 360, 255, -1, cv2.LINE_AA)
    layer = np.concatenate([np.full((*mask.shape, 3), random_color(rng), np.uint8), cover[..., None]], axis=2)
    layer[..., :3] = (layer[..., :3].astype(np.uint16) * cover[..., None] // 255).astype(np.uint8)
    return _over(canvas, layer), (mask.astype(np.uint16) * (255 - cover) // 255).astype(np.uint8)


def _relight(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, a colour cast and sensor noise."""
    gains = cv2.resize(rng.integers(150, 300, (2, 2)).astype(np.uint16), canvas.shape[1::-1]).astype(np.int32)
    cast = rng.integers(228, 272, 3)
    noise = rng.integers(-6, 7, canvas.shape) * int(rng.integers(0, 3)) // 2
    return (canvas * gains[..., None] // 256 * cast // 256 + noise).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw a toy catalogue of beauty products with street-like queries.", prog="python -m beauty_bafe.data.toy"
    )
    parser.add_argument("--root", default="toy", help="folder to draw into (default: toy)")
    parser.add_argument("--products", type=int, default=400, help="catalogue photos (default: 400)")
    parser.add_argument("--queries", type=int, default=100, help="street-like pictures with true masks (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other products (default: 0)")
    parser.add_argument(
        "--size", type=int, default=256, help=f"side in pixels, at most {CANVAS} for full detail (default: 256)"
    )
    arguments = parser.parse_args()
    print(draw_toy(**vars(arguments)))


if __name__ == "__main__":
    main()
