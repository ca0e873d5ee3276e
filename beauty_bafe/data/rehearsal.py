"""Street views of gallery photos: queries whose answer is known, drawn without any label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from .augmentation import Augmentation, Sample, Surroundings, draw_other
from .backgrounds import Backgrounds
from .catalog import Catalog, open_catalog
from .photos import load_photo
from .pictures import UnreadablePicture

SIDE = 640  # pixels of a street view; what looks at it from close by needs more than a network does


@dataclass(frozen=True)
class Rehearsal:
    """Practice queries for a gallery: street views of `views` of its photos, drawn by `augmentation` on `backgrounds`.

    `views`: how many, 0 for none. `backgrounds`: a folder of photographs, None for drawn scenes.
    """

    views: int
    augmentation: Augmentation
    backgrounds: str | None = None

    def draw(self, catalog: Catalog, folder: Path) -> Catalog:
        """Street views of a catalogue's photos in `folder`; none where no product can be cut out."""
        photos = Backgrounds(None if self.backgrounds is None else open_catalog(self.backgrounds))
        return draw_street_views(catalog, self.views, self.augmentation, photos, SIDE, folder)


def draw_street_views(
    catalog: Catalog, count: int, augmentation: Augmentation, backgrounds: Backgrounds, size: int, folder: Path
) -> Catalog:
    """Augment `count` photos, drawn without return, into `folder`; each picture has the id of the photo it shows.

    Photos whose product cannot be cut out are passed over. Files that are there and would not change stay untouched.
    """
    order = np.random.default_rng((0, len(catalog))).permutation(len(catalog)).tolist()
    photos: dict[int, Sample] = {}
    for index in order:
        if len(photos) == count:
            break
        try:
            photos[index] = load_photo(catalog.paths[index], size)
        except (UnreadablePicture, ValueError):
            continue
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(photos)

    def other(rng: np.random.Generator, number: int) -> Sample:
        return photos[chosen[draw_other(rng, number, len(chosen))]]

    paths = []
    for number, index in enumerate(chosen):
        surroundings = Surroundings(backgrounds, partial(other, number=number))
        view = augmentation(*photos[index], surroundings, np.random.default_rng((0, number)))
        paths.append(folder / f"{number:04d}.png")
        data = cv2.imencode(".png", cv2.cvtColor(view.photo, cv2.COLOR_RGB2BGR))[1].tobytes()
        if not paths[-1].is_file() or paths[-1].read_bytes() != data:
            paths[-1].write_bytes(data)
    return Catalog(tuple(catalog.ids[index] for index in chosen), tuple(paths))
