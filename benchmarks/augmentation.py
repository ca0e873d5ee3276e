"""A picture of what each function of augmentation=street does: one row a function, on any catalogue.

python benchmarks/augmentation.py --photos GALLERY --output docs/augmentation.jpg
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from beauty_bafe.data.augmentation import Sample, Surroundings, camera
from beauty_bafe.data.augmentation.hands import hold
from beauty_bafe.data.augmentation.shelves import draw_shelf
from beauty_bafe.data.augmentation.solids import as_box, as_cylinder, tilt
from beauty_bafe.data.backgrounds import Backgrounds, procedural_background
from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.data.photos import load_photo

CONF = (Path(__file__).parents[1] / "conf").resolve()
LABEL = 108  # pixels of a row's name


def smaller(product: Sample) -> Sample:
    """The photo at 0.6 of its size in the middle of the canvas, as street views show products."""
    size = product.mask.shape[0]
    matrix = np.array([[0.6, 0, 0.2 * size], [0, 0.6, 0.2 * size]], np.float32)
    return Sample(
        cv2.warpAffine(product.photo, matrix, (size, size), borderValue=(255, 255, 255)),
        cv2.warpAffine(product.mask, matrix, (size, size)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a folder of catalogue photos, or a csv of id,path")
    parser.add_argument("--backgrounds", help="a folder of photographs; without it scenes are drawn")
    parser.add_argument(
        "--output", default="docs/augmentation.jpg", help="the picture to write (default: docs/augmentation.jpg)"
    )
    parser.add_argument("--columns", type=int, default=9, help="products (default: 9)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    catalog = open_catalog(arguments.photos)
    rng = np.random.default_rng(arguments.seed)
    chosen = rng.choice(len(catalog), arguments.columns, replace=False)
    products = [load_photo(catalog.paths[index], 224) for index in chosen]
    photos = None if arguments.backgrounds is None else open_catalog(arguments.backgrounds)
    surroundings = Surroundings(Backgrounds(photos), lambda rng: products[int(rng.integers(len(products)))])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        street = instantiate(compose("train", ["augmentation=street"]).augmentation)

    def scene(product: Sample) -> np.ndarray:
        return hold(draw_shelf(224, surroundings, rng), smaller(product), rng).photo

    ways: dict[str, Callable[[Sample], np.ndarray]] = {
        "photo": lambda product: product.photo,
        "box": lambda product: as_box(*product, rng).photo,
        "cylinder": lambda product: as_cylinder(*product, rng).photo,
        "tilt": lambda product: tilt(*product, rng).photo,
        "hand": lambda product: hold(procedural_background(rng, 224), smaller(product), rng).photo,
        "shelf": lambda _: draw_shelf(224, surroundings, rng),
        "glare": lambda product: camera.glare(*product, rng),
    }
    steps = ("white_balance", "tone_curve", "motion_blur", "sensor_noise", "low_resolution", "sharpen", "jpeg")
    ways |= {step: lambda product, step=step: getattr(camera, step)(scene(product), rng) for step in steps}
    ways |= {f"all of it, {number}": lambda product: street(*product, surroundings, rng).photo for number in (1, 2, 3)}

    rows = []
    for name, way in ways.items():
        label = np.full((112, LABEL, 3), 255, np.uint8)
        cv2.putText(label, name.replace("_", " "), (4, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (30, 30, 30), 1, cv2.LINE_AA)
        pictures = [cv2.resize(way(product), (112, 112), interpolation=cv2.INTER_AREA) for product in products]
        rows.append(np.hstack([label, *pictures]))
    sheet = cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(arguments.output, sheet, [cv2.IMWRITE_JPEG_QUALITY, 70]):
        raise OSError(f"could not write '{arguments.output}'; give --output a name that ends in .jpg in a folder that is there")
    print(arguments.output)


if __name__ == "__main__":
    main()
