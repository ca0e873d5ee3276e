"""The gallery's side of a search, built from pictures or kept from another day, and its answers to queries."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from ..data.catalog import Catalog, Skipped, open_catalog
from ..models.views import View
from .classical import keep_learned, learn
from .ensemble import Concatenation, Fusion
from .features import FeatureExtraction, Features, Member, describe_members
from .index import Index
from .manifest import locked, replace_file
from .ranking import Ranking, check_k
from .rerank import Found, Scene
from .versions import Versions

CATALOG = "gallery.csv"  # the pictures of a kept index


class Gallery:
    """A gallery that can be asked: how pictures are described and fused, and an index of it per view (or member, where
    rankings are fused).

    `view` changes queries before they are described, see Describer.
    """

    def __init__(
        self,
        members: Sequence[Member],
        extraction: FeatureExtraction,
        ensemble: Concatenation | Fusion,
        view: View | None = None,
    ) -> None:
        self.members, self.extraction, self.ensemble, self.view = members, extraction, ensemble, view
        self.catalog = Catalog((), ())
        self.indexes: list[Index] = []
        self.seconds = 0.0  # that answering took
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
            self.catalog = open_catalog(source)
            # A second run on the same folder waits, and then finds what the first one wrote.
            with locked([] if kept is None else [kept.folder]):
                self._build(source, kept, index, skipped)
            return self
        if kept is None or kept.current() is None:
            raise ValueError(f"index_dir={folder} holds no index yet; give gallery=DIR_OR_CSV to build it from")

        def load(place: Path) -> None:
            learn(self.members, None, place, self.extraction.root)
            self.indexes, self.catalog = self._load(place, index), open_catalog(place / CATALOG)

        kept.read(load)
        print(f"index: {self.indexes[0]}, {len(self.indexes[0].ids)} pictures from {folder}")
        return self

    def _build(self, source: str, kept: Versions | None, index: Index, skipped: Skipped) -> None:
        """Describe the pictures of `source` and index them, as a change of what is `kept` where something is."""
        place = kept.current() if kept is not None else None
        learn(self.members, source, place, self.extraction.root)
        features = self.extraction(self.members, self.catalog, source, "gallery pictures", skipped)
        start = time.perf_counter()
        if place is not None:
            self.indexes = self._load(place, index)
            views = self.ensemble.transform(features)
            changes = [index.hold(view.vectors, view.ids) for index, view in zip(self.indexes, views, strict=True)]
            changed = any(removed or added for removed, added, _ in changes) or open_catalog(place / CATALOG) != self._held()
            how = "{} removed, {} added, {} kept, ensemble as first learned".format(*changes[0])
        else:
            views = self.ensemble.fit(features).transform(features)
            del features
            self.indexes = [copy.copy(index).fit(view.vectors, view.ids) for view in views]
            how, changed = "built", True
        rows, width = self.indexes[0].vectors.shape
        print(f"index: {self.indexes[0]}, {rows} x {width}, {how} in {time.perf_counter() - start:.1f} s")
        if kept is not None and changed:
            kept.write(self._save)

    def describe(self, catalog: Catalog, source: str, what: str, skipped: Skipped) -> list[Features]:
        """Features of each member over pictures to ask with, their masks among them."""
        return self.extraction(self.members, catalog, source, what, skipped, masks=True, view=self.view)

    def answer(
        self, asked: Catalog, described: Sequence[Features], steps: Sequence[Callable[[Found], Found]], k: int
    ) -> Ranking:
        """Search each view for `described` (of the pictures `asked`), re-rank, fuse: the k best of every query.

        Raises ValueError for a bad k.
        """
        check_k(k, len(self.indexes[0].ids))
        depths = [step.keywords.get("depth", 0) for step in steps if isinstance(step, partial)]
        depth = min(max([k, self.ensemble.depth, *depths]), len(self.indexes[0].ids))
        queries = self.ensemble.transform(described)
        start = time.perf_counter()
        rankings = []
        for number, view in enumerate(queries):
            found = self._search(number, view, asked, depth)
            for step in steps:
                found = step(found)
            rankings.append(found.ranking)
        ranking, self.seconds = self.ensemble.fuse(rankings, k), time.perf_counter() - start
        count = len(ranking.query_ids)
        print(f"searched for {count} queries in {self.seconds:.2f} s, {1e3 * self.seconds / count:.2f} ms each")
        return ranking

    def costs(self, queries: int) -> dict[str, float]:
        """Of the last answer: dimensions of a picture, milliseconds a query (re-ranking included), bytes of the index."""
        return {
            "dimensions": sum(index.vectors.shape[1] for index in self.indexes),
            "ms_per_query": 1e3 * self.seconds / max(queries, 1),
            "index_bytes": sum(index.nbytes for index in self.indexes),
        }

    def _search(self, number: int, queries: Features, asked: Catalog, depth: int) -> Found:
        def rehearse(pictures: Catalog) -> Found:
            described = self.describe(pictures, str(pictures.paths[0].parent), "rehearsal pictures", Skipped())
            return self._search(number, self.ensemble.transform(described)[number], pictures, depth)

        index = self.indexes[number]
        scene = Scene(self.catalog, asked, self.extraction.root, rehearse)
        return Found(index.search(queries.vectors, queries.ids, depth), queries, index, scene)

    def _about(self) -> dict[str, object]:
        seen = {"scales": list(self.extraction.scales), "flip": self.extraction.flip}
        return self.ensemble.describe() | seen | {"members": describe_members(self.members)}

    def _load(self, place: Path, index: Index) -> list[Index]:
        """The kept indexes, one a view; the ensemble takes up what it had learned."""
        self.ensemble.load(place)
        views = sorted(place.glob("view*"), key=lambda view: int(view.name.removeprefix("view")))
        return [copy.copy(index).load(view, self._about()) for view in views]

    def _held(self) -> Catalog:
        """The pictures that the index holds, where they lie now."""
        present = set(self.indexes[0].ids)
        held = self.catalog.subset(row for row, name in enumerate(self.catalog.ids) if name in present)
        return Catalog(held.ids, tuple(path.resolve() for path in held.paths))

    def _save(self, place: Path) -> None:
        self.ensemble.save(place)
        keep_learned(self.members, place)
        for number, index in enumerate(self.indexes):
            index.save(place / f"view{number}", self._about())
        held = self._held()

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([("id", "path"), *zip(held.ids, held.paths, strict=True)])

        replace_file(place / CATALOG, write)
