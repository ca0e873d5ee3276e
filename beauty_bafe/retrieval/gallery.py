"""The gallery's side of a search, built from pictures or kept from another day, and its answers to queries."""

from __future__ import annotations

import copy
import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

from ..data.catalog import Catalog, Skipped, open_catalog
from ..data.images import Pictures
from ..models.views import View
from .classical import keep_learned, learn
from .ensemble import Concatenation, Fusion
from .features import Features, Member, describe_members
from .index import Index
from .manifest import locked, replace_file
from .ranking import Ranking, check_k
from .rerank import Candidates, Reranker, SearchContext
from .versions import Versions

log = logging.getLogger("beauty_bafe")

CATALOG = "gallery.csv"  # the pictures of a kept index


class Extraction(Protocol):
    """Describes pictures, see FeatureExtraction (kept on disk) and MemoryExtraction. `root`: where files may be kept."""

    root: Path
    scales: tuple[float, ...]
    flip: bool

    def __call__(
        self,
        members: Sequence[Member],
        pictures: Pictures,
        source: str,
        what: str,
        skipped: Skipped,
        masks: bool = False,
        view: View | None = None,
    ) -> list[Features]: ...


class Gallery:
    """A gallery that can be searched: how pictures are described and fused, and an index of it per view (or member, where
    rankings are fused).

    `view` changes queries before they are described, see Describer. `catalog`: the pictures that lie in files.
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
        for member in members:
            if view is not None and not member.trained:
                raise ValueError(
                    f"{member.name} was never trained to make masks, which changing the queries needs; "
                    "type checkpoints='[RUN/checkpoints/best.ckpt]', or query=whole"
                )

    def open(self, source: str | None, folder: str | None, index: Index, skipped: Skipped) -> Self:
        """Build it from the pictures of `source`, or take it from `folder`.

        What `folder` holds is changed only where the catalogue changed, under the ensemble learned when it was first built;
        without `source` it answers as it is. Raises ValueError where it was made with other members or settings (the key is
        named).
        """
        kept = Versions(Path(folder)) if folder is not None else None
        if source is not None:
            pictures = open_catalog(source)
            # A second run on the same folder waits, and then finds what the first one wrote.
            with locked([] if kept is None else [kept.folder]):
                log.info(self.build(pictures, source, index, skipped, kept))
            return self
        if kept is None or kept.current() is None:
            raise ValueError(f"index_dir={folder} holds no index yet; give gallery=DIR_OR_CSV to build it from")

        kept.read(lambda place: self.load(place, index))
        log.info(f"index: {self.indexes[0]}, {len(self.indexes[0])} pictures from {folder}")
        return self

    def build(self, pictures: Pictures, source: str, index: Index, skipped: Skipped, kept: Versions | None = None) -> str:
        """Describe the pictures and index them, as a change of what is `kept` where something is; returns what was done."""
        place = kept.current() if kept is not None else None
        self.catalog = pictures.files
        learn(self.members, pictures, source, place, self.extraction.root)
        features = self.extraction(self.members, pictures, source, "gallery pictures", skipped)
        start = time.perf_counter()
        if place is not None:
            self.indexes = self._load_indexes(place, index)
            views = self.ensemble.transform(features)
            changes = [index.sync(view.vectors, view.ids) for index, view in zip(self.indexes, views, strict=True)]
            changed = any(removed or added for removed, added, _ in changes) or open_catalog(place / CATALOG) != self._held()
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
        """This gallery with more pictures, the ensemble as first learned. Raises ValueError for an id that is there already."""
        larger = copy.copy(self)
        larger.indexes = [index.clone() for index in self.indexes]
        for index, view in zip(larger.indexes, self.ensemble.transform(described), strict=True):
            index.add(view.vectors, view.ids)
        new, held = pictures.files, self._held()
        larger.catalog = Catalog(held.ids + new.ids, held.paths + new.paths)
        return larger

    def removed(self, ids: tuple[str, ...]) -> Gallery:
        """This gallery without these pictures. Raises ValueError for an id that is not there."""
        smaller = copy.copy(self)
        smaller.indexes = [index.clone() for index in self.indexes]
        for index in smaller.indexes:
            index.remove(ids)
        smaller.catalog = smaller._held()
        return smaller

    def describe(self, pictures: Pictures, source: str, what: str, skipped: Skipped) -> list[Features]:
        """Features of each member over pictures to ask with, their masks among them."""
        return self.extraction(self.members, pictures, source, what, skipped, masks=True, view=self.view)

    def answer(self, query_catalog: Catalog, described: Sequence[Features], steps: Sequence[Reranker], k: int) -> Ranking:
        """Search each view for `described`, re-rank, fuse: the k best of every query.

        `query_catalog`: those queries that are files.

        Raises ValueError for a bad k.
        """
        check_k(k, len(self.indexes[0]))
        depth = min(max([k, self.ensemble.depth, *(step.depth for step in steps)]), len(self.indexes[0]))
        rankings = []
        for number, view in enumerate(self.ensemble.transform(described)):
            found = self._search(number, view, query_catalog, depth)
            for step in steps:
                found = step(found)
            rankings.append(found.ranking)
        return self.ensemble.fuse(rankings, k)

    def costs(self) -> dict[str, float]:
        """Dimensions of a picture and bytes of the index."""
        return {
            "dimensions": sum(index.dimensions for index in self.indexes),
            "index_bytes": sum(index.nbytes for index in self.indexes),
        }

    def _search(self, number: int, queries: Features, query_catalog: Catalog, depth: int) -> Candidates:
        def rehearse(pictures: Catalog) -> Candidates:
            described = self.describe(pictures, str(pictures.paths[0].parent), "rehearsal pictures", Skipped())
            return self._search(number, self.ensemble.transform(described)[number], pictures, depth)

        index = self.indexes[number]
        context = SearchContext(self.catalog, query_catalog, self.extraction.root, rehearse)
        return Candidates(index.search(queries.vectors, queries.ids, depth), queries, index, context)

    def _about(self) -> dict[str, object]:
        seen = {"scales": list(self.extraction.scales), "flip": self.extraction.flip}
        return self.ensemble.describe() | seen | {"members": describe_members(self.members)}

    def load(self, place: Path, index: Index) -> None:
        """Take what `save` wrote. Raises ValueError naming the key that differs."""
        learn(self.members, None, "", place, self.extraction.root)
        self.indexes = self._load_indexes(place, index)
        self.catalog = open_catalog(place / CATALOG) if (place / CATALOG).is_file() else Catalog((), ())

    def _load_indexes(self, place: Path, index: Index) -> list[Index]:
        """The kept indexes, one a view; the ensemble takes up what it had learned."""
        self.ensemble.load(place)
        views = sorted(place.glob("view*"), key=lambda view: int(view.name.removeprefix("view")))
        about = self._about()
        return [index.for_view(number, about).load(view, about) for number, view in enumerate(views)]

    def _held(self) -> Catalog:
        """The files of the pictures that the index holds, where they lie now."""
        held = self.catalog.subset(row for row, name in enumerate(self.catalog.ids) if name in self.indexes[0].row_of)
        return Catalog(held.ids, tuple(path.resolve() for path in held.paths))

    def save(self, place: Path) -> None:
        """Write ensemble, indexes and where the pictures lie into a folder of their own."""
        self.ensemble.save(place)
        keep_learned(self.members, place)
        for number, index in enumerate(self.indexes):
            index.save(place / f"view{number}", self._about())
        held = self._held()
        if not len(held):
            return

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([("id", "path"), *zip(held.ids, held.paths, strict=True)])

        replace_file(place / CATALOG, write)
