"""A picture of what each function of augmentation=street does: one row a function, on any catalogue.

python benchmarks/augmentation.py --photos GALLERY --output docs/augmentation.jpg
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from beauty_bafe.data.augmentation import Sample, Surroundings, camera
from beauty_bafe.data.augmentation.hands import paste_in_hand
from beauty_bafe.data.augmentation.shelves import draw_shelf
from beauty_bafe.data.augmentation.solids import RECTANGULAR, UPRIGHT, as_box, as_cylinder, tilt
from beauty_bafe.data.backgrounds import Backgrounds, procedural_background
from beauty_bafe.data.catalog import open_catalog
from beauty_bafe.data.photos import load_photo

CONF = (Path(__file__).parents[1] / "conf").resolve()
LABEL = 124  # pixels of a row's name
SIZE = 224  # pixels of a photo, as in training


def smaller(product: Sample) -> Sample:
    """The photo at 0.6 of its size in the middle of the canvas, as street views show products."""
    size = product.mask.shape[0]
    matrix = np.array([[0.6, 0, 0.2 * size], [0, 0.6, 0.2 * size]], np.float32)
    return Sample(
        cv2.warpAffine(product.photo, matrix, (size, size), borderValue=(255, 255, 255)),
        cv2.warpAffine(product.mask, matrix, (size, size)),
    )


def filled(product: Sample) -> float:
    """The share of its bounding box that a product fills."""
    left, top, width, height = cv2.boundingRect(product.mask)
    return cv2.countNonZero(product.mask[top : top + height, left : left + width]) / max(1, width * height)


def is_bottle(product: Sample) -> bool:
    """Upright and in one piece from side to side, as as_solid asks of a cylinder, and not a thin thing."""
    _, _, width, height = cv2.boundingRect(product.mask)
    starts = np.diff((product.mask > 127).astype(np.int8), axis=1, prepend=0) == 1
    return height > UPRIGHT * width and filled(product) > 0.6 and starts.sum(axis=1).max() == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="a folder of catalogue photos, or a csv of id,path")
    parser.add_argument("--backgrounds", help="a folder of photographs; without it scenes are drawn")
    parser.add_argument(
        "--output", default="docs/augmentation.jpg", help="the picture to write (default: docs/augmentation.jpg)"
    )
    parser.add_argument("--columns", type=int, default=9, help="pictures a row (default: 9)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    catalog, count = open_catalog(arguments.photos), arguments.columns
    rng = np.random.default_rng(arguments.seed)
    order = rng.permutation(len(catalog))

    def find(fits: Callable[[Sample], bool]) -> list[Sample]:
        """The first `count` products that a function is made for; any where there are too few."""
        photos = (load_photo(catalog.paths[index], SIZE) for index in order)
        found = list(itertools.islice(filter(fits, photos), count))
        return [*found, *products][:count]

    products = [load_photo(catalog.paths[index], SIZE) for index in order[:count]]
    photos = None if arguments.backgrounds is None else open_catalog(arguments.backgrounds)
    surroundings = Surroundings(Backgrounds(photos), lambda rng: products[int(rng.integers(count))])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        street = instantiate(compose("train", ["augmentation=street"]).augmentation)

    rows: dict[str, list[np.ndarray]] = {
        "photo": [product.photo for product in products],
        "box": [as_box(*product, rng).photo for product in find(lambda product: filled(product) > RECTANGULAR)],
        "cylinder": [as_cylinder(*product, rng).photo for product in find(is_bottle)],
        "tilt": [tilt(*product, rng).photo for product in products],
        "hand": [paste_in_hand(procedural_background(rng, SIZE), smaller(product), rng).photo for product in products],
        "shelf": [draw_shelf(SIZE, surroundings, rng) for _ in products],
        "glare": [camera.glare(*product, rng) for product in products],
    }
    scenes = [paste_in_hand(draw_shelf(SIZE, surroundings, rng), smaller(product), rng).photo for product in products]
    steps = ("white_balance", "tone_curve", "motion_blur", "sensor_noise", "low_resolution", "sharpen", "jpeg")
    rows["before the camera"] = scenes
    rows |= {step: [getattr(camera, step)(scene, rng) for scene in scenes] for step in steps}
    for number in (1, 2):
        views = [street(*product, surroundings, rng) for product in products]
        rows[f"all of it, {number}"] = [view.photo for view in views]
        rows[f"its masks, {number}"] = [cv2.cvtColor(view.mask, cv2.COLOR_GRAY2RGB) for view in views]

    lines = []
    for name, pictures in rows.items():
        label = np.full((112, LABEL, 3), 255, np.uint8)
        cv2.putText(label, name.replace("_", " "), (4, 60), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (30, 30, 30), 1, cv2.LINE_AA)
        lines.append(np.hstack([label, *(cv2.resize(part, (112, 112), interpolation=cv2.INTER_AREA) for part in pictures)]))
    sheet = cv2.cvtColor(np.vstack(lines), cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(arguments.output, sheet, [cv2.IMWRITE_JPEG_QUALITY, 70]):
        raise OSError(f"could not write '{arguments.output}'; give --output a name that ends in .jpg in a folder that is there")
    print(arguments.output)


if __name__ == "__main__":
    main()
