"""Search a gallery from Python: build or load a Retriever, then search, add, remove, save."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from . import cli
from .config import CONF, check_targets, compose
from .data.catalog import Skipped, open_catalog
from .data.images import ImageLike, Images
from .data.places import Place
from .extraction.features import Features, mean_masks
from .extraction.memory import MemoryExtraction
from .index.ranking import check_k
from .manifest import digest, locked, replace_file
from .models.exported import checkpoint_bytes
from .models.inference import MASK_SIZE
from .recipe import resolve_auto
from .retrieval.gallery import Gallery
from .retrieval.parts import Parts, build_parts
from .versions import Versions

ABOUT = "retriever.json"
# Settings of retrieve.py that are arguments here, or that only matter for its files.
SCRIPT_ONLY = (
    *("checkpoints", "gallery", "queries", "truth", "masks", "index_dir", "output_dir", "submission", "k"),
    *("report", "report_queries", "features", "num_workers", "known_at", "hydra"),
)


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer. `score`: higher is better, comparable within one query. `path`: the picture's file or URL, None if it
    has none.

    `probability`: that the answer is right, 0 to 1; None if it could not be learned (see `rehearsal` in conf/retrieve.yaml,
    and `Calibration`).
    """

    id: str
    score: float
    probability: float | None
    path: Place | None


class _State(NamedTuple):
    """The state that a search uses: replaced as a whole, never modified."""

    gallery: Gallery
    paths: Mapping[str, Place]


class Retriever:
    """A gallery of product pictures and the networks to search it with.

    Create one with `Retriever.build(...)` or `Retriever.load(...)`. An image is a path (str or Path), a PIL image, the bytes
    of an encoded file, or a uint8 array or tensor (H, W, 3) in RGB. All methods are thread-safe. Only `save` writes to
    folders of yours; street views for calibration (rehearsal), VLAD and re-rankers that use the pictures have temporary
    folders, which are removed after use or with the object. Answers are bit for bit those of retrieve.py for the same
    checkpoints, gallery, queries and settings, unless retrieve.py compiles the network on a GPU: a Retriever does so only
    with extraction.runtime=compiled.
    """

    def __init__(self, parts: Parts, gallery: Gallery, checkpoints: Sequence[str], overrides: Sequence[str]) -> None:
        self._checkpoints, self._overrides = list(checkpoints), list(overrides)
        self._changing = threading.Lock()
        gallery.rehearse(parts.steps, parts.rehearsal, parts.about)
        self.skipped: list[tuple[str, str, str]] = []  # gallery pictures left out by `build`: id, path, reason
        self._set_gallery(gallery)
        self.describe([np.zeros((8, 8, 3), np.uint8)])  # builds the engine for queries, so that the first search is fast

    @classmethod
    def build(
        cls,
        checkpoints: str | Path | Sequence[str | Path],
        gallery: str | Path | Mapping[str, ImageLike],
        overrides: Sequence[str] = (),
    ) -> Retriever:
        """Describe a gallery and index it.

        `checkpoints`: what train.py or `beauty-bafe export` wrote; several become one ensemble. `gallery`: a folder of
        pictures, a csv with the columns id,path, the URL of either, or a dict of id -> image. `overrides`: settings as
        retrieve.py takes them, such as "query=whole", "size=320" or "device=cpu"; by default those stored in the checkpoints.
        Unreadable pictures of a folder or csv are left out and listed in `skipped`, up to the share max_skipped.

        Raises ValueError for files that are not checkpoints, unknown settings, or an empty or unreadable gallery; TypeError
        for values that are not images.
        """
        files = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
        parts, shop = _prepare([str(file) for file in files], overrides)
        skipped = Skipped()
        pictures = Images.named(gallery) if isinstance(gallery, Mapping) else open_catalog(gallery)
        if not len(pictures):
            raise ValueError("the gallery is empty; give a dict of at least one id -> image")
        shop.build(pictures, str(gallery) if isinstance(gallery, str | Path) else "gallery", parts.index, skipped)
        retriever = cls(parts, shop, [str(file) for file in files], overrides)
        retriever.skipped = skipped.rows
        return retriever

    @classmethod
    def load(cls, folder: str | Path, overrides: Sequence[str] = ()) -> Retriever:
        """Load a saved retriever. `overrides`, such as "device=cpu", are applied after those it was built with.

        Raises ValueError if `folder` holds no retriever, or one whose settings differ (the message names the key).
        """

        def read(place: Path) -> Retriever:
            if not (place / ABOUT).is_file():
                raise ValueError(f"'{folder}' was not written by Retriever.save; retrieve.py index_dir={folder} can use it")
            about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            # Hydra refuses a group that is chosen twice.
            words = list({word.partition("=")[0]: word for word in [*about["overrides"], *overrides]}.values())
            files = [str(_kept(Path(folder), name)) for name in about["checkpoints"]]
            parts, gallery = _prepare(files, words, from_file=True)
            gallery.load(place, parts.index)
            return cls(parts, gallery, files, words)

        if Versions(Path(folder)).current() is None:
            raise ValueError(f"'{folder}' holds no retriever; Retriever.save(folder) writes one")
        return Versions(Path(folder)).read(read)

    def save(self, folder: str | Path) -> None:
        """Write gallery, settings and checkpoints to `folder`, for `load`; an earlier version there is replaced atomically.

        Pictures are not copied. Raises ValueError if a checkpoint file has changed since it was loaded, FileNotFoundError
        if it is gone.
        """
        gallery, place = self._state.gallery, Path(folder)
        sources = {member.source for member in gallery.members}
        names = []
        with locked([place]):
            for file in self._checkpoints:
                content = checkpoint_bytes(file)
                names.append(digest(*content.values()))
                if names[-1] not in sources:
                    raise ValueError(f"'{file}' has changed since it was loaded; build the retriever again")
                # Named by content and kept beside the versions, so that processes with an older version still find them.
                for name, data in content.items():
                    kept = _kept(place, names[-1]) / name
                    if not kept.is_file():
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        replace_file(kept, partial(_write, data))
            about = json.dumps({"checkpoints": names, "overrides": self._overrides}, indent=1)

            def write(version: Path) -> None:
                gallery.save(version)
                (version / ABOUT).write_text(about, encoding="utf-8")

            Versions(place).write(write)

    def search(self, images: Iterable[ImageLike], k: int = 7) -> list[list[Hit]]:
        """The k best pictures of the gallery for each image, best first.

        Raises ValueError for a bad k or an unreadable image, TypeError for other types, with the number of the image.
        """
        return self.search_with_masks(images, k)[0]

    def search_with_masks(self, images: Iterable[ImageLike], k: int = 7) -> tuple[list[list[Hit]], np.ndarray | None]:
        """The results of `search` and the masks of `describe`, in one pass."""
        state = self._state
        check_k(k, len(state.gallery.indexes[0]))
        queries = Images.numbered(images)
        if not len(queries):
            return [], np.zeros((0, MASK_SIZE, MASK_SIZE), np.uint8)
        described = self._described(state.gallery, queries)
        ranking = state.gallery.answer(queries, described, k)
        hits = [
            [
                Hit(name, float(score), sure, state.paths.get(name))
                for name, score, sure in zip(ranking.answers(row), ranking.scores[row], ranking.certainty(row), strict=True)
            ]
            for row in range(len(queries))
        ]
        return hits, mean_masks(described).masks

    def describe(self, images: Iterable[ImageLike]) -> tuple[np.ndarray, np.ndarray | None]:
        """Describe images as queries: vectors, float32 (N, D) of length 1, and saliency masks, uint8 (N, 112, 112).

        Masks are None if no pooling uses them. If the ensemble fuses rankings, the vectors of its members are concatenated.
        Raises as `search` does.
        """
        gallery = self._state.gallery
        queries = Images.numbered(images)
        if not len(queries):
            width = sum(index.dimensions for index in gallery.indexes)
            return np.zeros((0, width), np.float32), np.zeros((0, MASK_SIZE, MASK_SIZE), np.uint8)
        described = self._described(gallery, queries)
        views = gallery.ensemble.transform(described)
        return np.concatenate([view.vectors for view in views], axis=1), mean_masks(described).masks

    def add(self, images: Mapping[str, ImageLike]) -> None:
        """Add pictures by id. Later searches see all of them; if one fails, none is added.

        Raises ValueError for an existing id or an unreadable picture, TypeError for other types.
        """
        new = Images.named(images)
        if not len(new):
            return
        self._check_new(new)
        gallery = self._state.gallery
        described = gallery.extraction(gallery.members, new, "added", "added pictures", Skipped())
        with self._changing:
            self._set_gallery(self._state.gallery.added(new, described))

    def remove(self, ids: Iterable[str]) -> None:
        """Remove pictures by id. Later searches see none of them; if one fails, none is removed.

        Raises ValueError for an unknown id, or if the gallery would be empty; TypeError for a single str.
        """
        if isinstance(ids, str):
            raise TypeError(f"got one id; give a list of ids, ['{ids}']")
        gone = tuple(dict.fromkeys(ids))
        with self._changing:
            gallery = self._state.gallery
            if gone and set(gone) >= set(gallery.indexes[0].ids):
                raise ValueError("that would remove every picture of the gallery; add others first")
            if gone:
                self._set_gallery(gallery.removed(gone))

    def threshold(self, rate: float) -> float | None:
        """The lowest probability at which a best answer counts as known, if a share `rate` of unknown products may be accepted.

        None if there are no probabilities. Raises ValueError for a rate outside 0 to 1. See `Calibration.threshold`.
        """
        calibration = self._state.gallery.calibration
        return None if calibration is None else calibration.threshold(rate)

    def path(self, name: str) -> Place | None:
        """The file or URL of the picture with this id; None for an unknown id or a picture that was added from memory."""
        return self._state.paths.get(name)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the gallery's pictures."""
        return self._state.gallery.indexes[0].ids

    def __len__(self) -> int:
        return len(self.ids)

    def _described(self, gallery: Gallery, queries: Images) -> list[Features]:
        return gallery.describe(queries, "queries", "queries", Skipped())

    def _check_new(self, new: Images) -> None:
        """Check before the pictures are described; the index checks again when they are added."""
        if known := self._state.gallery.indexes[0].row_of.keys() & new.ids:
            raise ValueError(f"the gallery already holds '{min(known)}'; remove it first to replace it")

    def _set_gallery(self, gallery: Gallery) -> None:
        self._state = _State(gallery, dict(zip(gallery.catalog.ids, gallery.catalog.paths, strict=True)))

    def __repr__(self) -> str:
        return f"<Retriever: {len(self)} pictures, {self._state.gallery.indexes[0]}>"


def _kept(folder: Path, name: str) -> Path:
    return folder / "checkpoints" / f"{Path(name).name}.ckpt"


def _write(content: bytes, file: Path) -> None:
    file.write_bytes(content)


def _prepare(checkpoints: Sequence[str], words: Sequence[str], from_file: bool = False) -> tuple[Parts, Gallery]:
    """The parts that the settings name, and an empty gallery. `from_file`: the words are from a file and not trusted."""
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if key.split(".")[0] in SCRIPT_ONLY:
            raise ValueError(
                f"{word}: {key} is not an override of a Retriever; it is an argument of a method, or for retrieve.py only"
            )
    if fault := cli.find_fault(CONF, "retrieve", words):
        raise ValueError(fault)
    cfg = compose("retrieve", words)
    if from_file:
        # Resolved first, as an interpolation can build a target from strings.
        used = [cfg[key] for key in cfg if key not in SCRIPT_ONLY and isinstance(cfg[key], DictConfig)]
        check_targets([OmegaConf.to_container(part, resolve=True) for part in used], "the saved retriever")
    cfg.checkpoints = list(checkpoints)
    if not checkpoints and not cli.untrained_models(cfg):
        raise ValueError(
            "no checkpoints; give ['RUN/checkpoints/best.ckpt'], or overrides=['model=NAME'] for an untrained network"
        )
    resolve_auto(cfg, CONF)
    parts = build_parts(cfg)
    return parts, Gallery(parts.members, MemoryExtraction(parts.extraction), parts.ensemble, parts.view)
