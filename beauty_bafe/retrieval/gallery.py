"""The gallery: built from pictures or loaded, searched, re-ranked, changed and saved."""

from __future__ import annotations

import copy
import csv
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..data.catalog import Catalog, Skipped, open_catalog, stamp
from ..data.images import Pictures
from ..data.rehearsal import Rehearsal
from ..extraction.features import Features
from ..extraction.local import FeatureExtraction
from ..extraction.members import Member, describe_members
from ..extraction.memory import MemoryExtraction
from ..index.base import Index
from ..index.ranking import Ranking, check_k
from ..manifest import digest, locked, replace_file
from ..models.inference import halving
from ..models.views import View
from ..rerank.candidates import Candidates, Reranker, SearchContext, TrainableReranker
from ..versions import Versions
from .calibration import SHORTLIST, Calibration
from .classical import load_or_fit, save_learned
from .describer import EnsembleDescriber, Extraction
from .ensemble import Concatenation, Fusion

log = logging.getLogger("beauty_bafe")

CATALOG = "gallery.csv"  # ids and paths of a saved gallery
LEARNED = "learned.json"  # what its re-rankers and calibration have learned


class Gallery:
    """A searchable gallery: members that describe pictures, an ensemble of them, and indexes (one per member if the ensemble
    fuses rankings, otherwise one).

    `view`: how queries are described, see Describer. `catalog`: the gallery's pictures that are files.
    """

    def __init__(
        self,
        members: Sequence[Member],
        extraction: Extraction,
        ensemble: Concatenation | Fusion,
        view: View | None = None,
    ) -> None:
        self.members, self.extraction, self.ensemble, self.view = members, extraction, ensemble, view
        self.catalog = Catalog((), ())
        self.indexes: list[Index] = []
        self.steps: list[list[Reranker]] = []
        self.calibration: Calibration | None = None
        self._learned: dict[str, Any] = {}
        self._feature_cache: dict[Any, Any] = {}  # see SearchContext
        for member in members:
            if view is not None and not member.trained:
                raise ValueError(
                    f"{member.name} was not trained to predict masks, which this query view requires; "
                    "type checkpoints='[RUN/checkpoints/best.ckpt]', or query=whole"
                )

    def open(self, source: str | None, folder: str | None, index: Index, skipped: Skipped) -> Self:
        """Build the gallery from the pictures of `source`, or load it from `folder`.

        With both, a gallery saved in `folder` is updated to match the catalogue; its ensemble is not learned again.
        Raises ValueError, with the name of the key, if it was made with other members or settings.
        """
        kept = Versions(Path(folder)) if folder is not None else None
        if source is not None:
            pictures = open_catalog(source)
            # A second run on the same folder waits, then reads what the first one wrote.
            with locked([] if kept is None else [kept.folder]):
                log.info(self.build(pictures, source, index, skipped, kept))
            return self
        if kept is None or kept.current() is None:
            raise ValueError(f"index_dir={folder} holds no index yet; type gallery=DIR_OR_CSV to build one")

        kept.read(lambda place: self.load(place, index))
        log.info(f"index: {self.indexes[0]}, {len(self.indexes[0])} pictures from {folder}")
        return self

    def build(self, pictures: Pictures, source: str, index: Index, skipped: Skipped, kept: Versions | None = None) -> str:
        """Describe and index the pictures, or update the gallery in `kept` if there is one; returns a message about it."""
        place = kept.current() if kept is not None else None
        self.catalog = pictures.files
        load_or_fit(self.members, pictures, source, place, self.extraction.root)
        features = self.extraction(self.members, pictures, source, "gallery pictures", skipped)
        start = time.perf_counter()
        if place is not None:
            self.indexes = self._load_indexes(place, index)
            self._read_learned(place)
            views = self.ensemble.transform(features)
            changes = [index.sync(view.vectors, view.ids) for index, view in zip(self.indexes, views, strict=True)]
            changed = any(removed or added for removed, added, _ in changes)
            changed = changed or open_catalog(place / CATALOG) != self._indexed_files()
            how = "{} removed, {} added, {} kept, ensemble as first learned".format(*changes[0])
        else:
            views = self.ensemble.fit(features).transform(features)
            del features
            self.indexes = [
                index.for_view(number, self._about()).fit(view.vectors, view.ids) for number, view in enumerate(views)
            ]
            how, changed = "built", True
        first = self.indexes[0]
        done = f"index: {first}, {len(first)} x {first.dimensions}, {how} in {time.perf_counter() - start:.1f} s"
        if kept is not None and changed:
            kept.write(self.save)
        return done

    def added(self, pictures: Pictures, described: Sequence[Features]) -> Gallery:
        """This gallery with more pictures; the ensemble stays as first learned. Raises ValueError for an existing id."""
        larger = copy.copy(self)
        larger.indexes = [index.clone() for index in self.indexes]
        for index, view in zip(larger.indexes, self.ensemble.transform(described), strict=True):
            index.add(view.vectors, view.ids)
        new, held = pictures.files, self._indexed_files()
        larger.catalog = Catalog(held.ids + new.ids, held.paths + new.paths)
        return larger

    def removed(self, ids: tuple[str, ...]) -> Gallery:
        """This gallery without these pictures. Raises ValueError for an unknown id."""
        smaller = copy.copy(self)
        smaller.indexes = [index.clone() for index in self.indexes]
        for index in smaller.indexes:
            index.remove(ids)
        smaller.catalog = smaller._indexed_files()
        return smaller

    def describe(self, pictures: Pictures, source: str, what: str, skipped: Skipped) -> list[Features]:
        """Features of each member for queries, with masks."""
        return self.extraction(self.members, pictures, source, what, skipped, masks=True, view=self.view)

    def rehearse(self, steps: Sequence[Reranker], rehearsal: Rehearsal, about: str, folder: str | None = None) -> None:
        """Set the re-ranking steps; they and the calibration learn from street views of the gallery's photos.

        `about`: the settings of all of them. If a loaded gallery has learned with the same settings, nothing is learned again;
        otherwise the result is written to `folder` (index_dir). Without views, or photos to draw them from, answers get no
        probabilities, and learning is tried again once the photos change.
        """
        self.steps = [list(steps) for _ in self.indexes]
        if self._learned.get("about") == about and self._is_current(rehearsal):
            for own, learned in zip(self.steps, self._learned["weights"], strict=True):
                trainable = [number for number, step in enumerate(own) if isinstance(step, TrainableReranker)]
                for number, weights in zip(trainable, learned, strict=True):
                    own[number] = replace(own[number], weights=weights)  # type: ignore[type-var]
            known = self._learned["calibration"]
            self.calibration = None if known is None else Calibration.from_dict(known)
            return
        self.calibration = self._calibrate(rehearsal)
        found = [[step.weights for step in own if isinstance(step, TrainableReranker)] for own in self.steps]
        learned = [[None if weights is None else dict(weights) for weights in own] for own in found]
        known = None if self.calibration is None else self.calibration.to_dict()
        photos = self._photo_digest() if rehearsal.views and known is None else None
        self._learned = {"about": about, "weights": learned, "calibration": known, "photos": photos}
        if folder is not None:
            Versions(Path(folder)).read(self._write_learned)

    def _is_current(self, rehearsal: Rehearsal) -> bool:
        """Whether learning again would change nothing: without a calibration, only if the photos are still the same."""
        if self._learned["calibration"] is not None or not rehearsal.views:
            return True
        return self._learned["photos"] == self._photo_digest()

    def _photo_digest(self) -> str:
        return digest(*self.catalog.ids, *map(stamp, self.catalog.paths))

    def _calibrate(self, rehearsal: Rehearsal) -> Calibration | None:
        if not rehearsal.views or not len(self.catalog):
            return None
        with self.extraction.folder(f"rehearsal-{digest(*self.catalog.ids, *map(str, self.catalog.paths))}") as where:
            views = rehearsal.draw(self.catalog, where)
            if not len(views):
                return None
            described = self.describe(views, str(where), "street views of gallery pictures", Skipped())
            ranking = self._answer(views, described, SHORTLIST, learn=True)
        if ranking.positions.shape[1] < 2:
            return None
        names = np.array(ranking.gallery_ids)[ranking.positions]
        return Calibration.fit(ranking.get_evidence(), names == np.array(ranking.query_ids)[:, None])

    def _read_learned(self, place: Path) -> None:
        file = place / LEARNED
        self._learned = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _write_learned(self, place: Path) -> None:
        if not os.access(place, os.W_OK):
            return  # a read-only copy can still be searched
        replace_file(place / LEARNED, lambda part: part.write_text(json.dumps(self._learned), encoding="utf-8"))

    def answer(self, pictures: Pictures, described: Sequence[Features], k: int) -> Ranking:
        """Search each index for the queries, re-rank and fuse: the k best answers to each.

        `described`: features of the queries, see `describe`; `pictures`: the queries themselves, for re-rankers that use
        them. Raises ValueError for a bad k.
        """
        return self.shortlist(pictures, described, k).first(k)

    def shortlist(self, pictures: Pictures, described: Sequence[Features], k: int) -> Ranking:
        """Like `answer`, but with at least the SHORTLIST answers that probabilities are computed from (see Calibration)."""
        check_k(k, len(self.indexes[0]))
        ranking = self._answer(pictures, described, max(k, SHORTLIST if self.calibration is not None else 0))
        if self.calibration is None:
            return ranking
        return replace(ranking, probabilities=self.calibration.probabilities(ranking.get_evidence()))

    def _answer(self, pictures: Pictures, described: Sequence[Features], k: int, learn: bool = False) -> Ranking:
        """The k best answers, or as many as the gallery holds and the re-rankers keep."""
        steps = self.steps or [[] for _ in self.indexes]
        depths = [k, self.ensemble.depth, *(step.depth for own in steps for step in own)]
        depth = min(max(depths), len(self.indexes[0]))
        rankings = []
        views = self.ensemble.transform(described)
        for number, (own, index, queries) in enumerate(zip(steps, self.indexes, views, strict=True)):
            describe = EnsembleDescriber(self.members, lambda: self._memory, self.ensemble, number)
            context = SearchContext(self.catalog, pictures, self.extraction.root, self._feature_cache, describe)
            candidates = Candidates(index.search(queries.vectors, queries.ids, depth), queries, index, context)
            for place, step in enumerate(own):
                if learn and isinstance(step, TrainableReranker):
                    own[place] = step = step.fit(candidates)
                candidates = step(candidates)
            rankings.append(candidates.ranking)
        return self.ensemble.fuse(rankings, min(k, *(ranking.positions.shape[1] for ranking in rankings), depth))

    @cached_property
    def _memory(self) -> MemoryExtraction:
        """For pictures that are not files; networks are compiled when they are first used."""
        made = self.extraction
        assert isinstance(made, MemoryExtraction | FeatureExtraction)
        return MemoryExtraction(made) if isinstance(made, FeatureExtraction) else made

    def costs(self) -> dict[str, float]:
        """Dimensions of a descriptor and bytes of the indexes."""
        return {
            "dimensions": sum(index.dimensions for index in self.indexes),
            "index_bytes": sum(index.nbytes for index in self.indexes),
        }

    def _about(self) -> dict[str, object]:
        scales = self.extraction.scales
        seen = {"scales": list(scales), "flip": self.extraction.flip, **halving(scales)}
        return self.ensemble.describe() | seen | {"members": describe_members(self.members)}

    def load(self, place: Path, index: Index) -> None:
        """Read a saved gallery. Raises ValueError with the name of a key that differs."""
        load_or_fit(self.members, None, "", place, self.extraction.root)
        self.indexes = self._load_indexes(place, index)
        self.catalog = open_catalog(place / CATALOG) if (place / CATALOG).is_file() else Catalog((), ())
        self._read_learned(place)

    def _load_indexes(self, place: Path, index: Index) -> list[Index]:
        """Load the ensemble and the saved indexes."""
        self.ensemble.load(place)
        views = sorted(place.glob("view*"), key=lambda view: int(view.name.removeprefix("view")))
        about = self._about()
        return [index.for_view(number, about).load(view, about) for number, view in enumerate(views)]

    def _indexed_files(self) -> Catalog:
        """The files of the pictures in the index, with absolute paths."""
        held = self.catalog.subset(row for row, name in enumerate(self.catalog.ids) if name in self.indexes[0].row_of)
        return Catalog(held.ids, tuple(path.resolve() for path in held.paths))

    def save(self, place: Path) -> None:
        """Write the ensemble, the indexes and the paths of the pictures to a folder."""
        self.ensemble.save(place)
        save_learned(self.members, place)
        for number, index in enumerate(self.indexes):
            index.save(place / f"view{number}", self._about())
        self._write_learned(place)
        held = self._indexed_files()
        if not len(held):
            return

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([("id", "path"), *zip(held.ids, held.paths, strict=True)])

        replace_file(place / CATALOG, write)
