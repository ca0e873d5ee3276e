"""Rehearsal: synthetic street views of gallery photos, queries whose match is known without labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from ..progress import show_progress
from .augmentation import Augmentation, Sample, Surroundings, draw_other
from .backgrounds import Backgrounds
from .catalog import Catalog, open_catalog
from .photos import load_photo
from .pictures import UnreadablePicture

PROGRESS_ABOVE = 32  # views up to which no progress is shown
SIDE = 640  # pixels of a street view; re-ranking needs more detail than a network


@dataclass(frozen=True)
class Rehearsal:
    """Synthetic queries for a gallery: street views of `views` of its photos, rendered by `augmentation` on `backgrounds`.

    `views`: their number, 0 for none. `backgrounds`: a folder of photographs, None for procedural scenes.
    """

    views: int
    augmentation: Augmentation
    backgrounds: str | None = None

    def draw(self, catalog: Catalog, folder: Path, seed: tuple[int, ...] = (0,)) -> Catalog:
        """Street views of a catalogue's photos, written to `folder`; none if no product can be segmented."""
        photos = Backgrounds(None if self.backgrounds is None else open_catalog(self.backgrounds))
        return draw_street_views(catalog, self.views, self.augmentation, photos, SIDE, folder, seed)


def draw_street_views(
    catalog: Catalog,
    count: int,
    augmentation: Augmentation,
    backgrounds: Backgrounds,
    size: int,
    folder: Path,
    seed: tuple[int, ...] = (0,),
) -> Catalog:
    """Write augmented views of `count` photos, sampled without replacement, to `folder`; each has the id of its photo.

    Photos whose product cannot be segmented are skipped. Files that would not change are not written again.
    """
    order = np.random.default_rng((*seed, len(catalog))).permutation(len(catalog)).tolist()
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
    drawn = show_progress(chosen, f"drawing {len(chosen)} street views", len(chosen), PROGRESS_ABOVE)
    for number, index in enumerate(drawn):
        surroundings = Surroundings(backgrounds, partial(other, number=number))
        view = augmentation(*photos[index], surroundings, np.random.default_rng((*seed, number)))
        paths.append(folder / f"{number:04d}.png")
        data = cv2.imencode(".png", cv2.cvtColor(view.photo, cv2.COLOR_RGB2BGR))[1].tobytes()
        if not paths[-1].is_file() or paths[-1].read_bytes() != data:
            paths[-1].write_bytes(data)
    return Catalog(tuple(catalog.ids[index] for index in chosen), tuple(paths))
