"""The gallery's side of a search, built from pictures or kept from another day, and its answers to queries."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..data.catalog import Catalog, Skipped, open_catalog
from .ensemble import Concatenation, Fusion
from .features import FeatureExtraction, Features, Member, describe_members
from .index import Index
from .manifest import replace_file
from .ranking import Ranking, check_k
from .rerank import Found


def open_gallery(
    source: str | None,
    folder: str | None,
    members: Sequence[Member],
    extraction: FeatureExtraction,
    ensemble: Concatenation | Fusion,
    index: Index,
    skipped: Skipped,
) -> tuple[Catalog, list[Index]]:
    """The catalogue and an index per view of it (one, or one a member where rankings are fused).

    Without `folder` everything is built from the pictures of `source`. With it, what it holds is taken up, changed only
    where the catalogue changed, under the ensemble learned when it was first built; without `source` it answers as it is.
    Raises ValueError where the folder was made with other members or settings (the key is named).
    """
    place = Path(folder) if folder is not None else None
    saved = place is not None and (place / "gallery.csv").is_file()
    about = ensemble.describe() | {"members": describe_members(members)}
    if source is None:
        if place is None or not saved:
            raise ValueError(f"index_dir={folder} holds no index yet; give gallery=DIR_OR_CSV to build it from")
        indexes = _load(place, ensemble, index, about)
        print(f"index: {indexes[0]}, {len(indexes[0].ids)} pictures from {place}")
        return open_catalog(place / "gallery.csv"), indexes

    catalog = open_catalog(source)
    features = extraction(members, catalog, source, "gallery pictures", skipped)
    start = time.perf_counter()
    if saved and place is not None:
        indexes = _load(place, ensemble, index, about)
        views = ensemble.transform(features)
        changes = [index.hold(view.vectors, view.ids) for index, view in zip(indexes, views, strict=True)]
        how = f"{changes[0]}, ensemble as first learned"
    else:
        views = ensemble.fit(features).transform(features)
        del features
        indexes = [copy.copy(index).fit(view.vectors, view.ids) for view in views]
        how = "built"
    rows, width = indexes[0].vectors.shape
    print(f"index: {indexes[0]}, {rows} x {width}, {how} in {time.perf_counter() - start:.1f} s")
    if place is not None:
        _save(place, catalog, indexes, ensemble, about)
    return catalog, indexes


def _load(place: Path, ensemble: Concatenation | Fusion, index: Index, about: dict[str, object]) -> list[Index]:
    """The kept indexes, one a view; `ensemble` takes up what it had learned."""
    ensemble.load(place)
    return [copy.copy(index).load(view, about) for view in sorted(place.glob("view*"))]


def _save(
    place: Path, catalog: Catalog, indexes: Sequence[Index], ensemble: Concatenation | Fusion, about: dict[str, object]
) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "gallery.csv").unlink(missing_ok=True)  # written last: a folder without it is not complete
    ensemble.save(place)
    for number, index in enumerate(indexes):
        index.save(place / f"view{number}", about)
    present = set(indexes[0].ids)
    rows = [(name, path.resolve()) for name, path in zip(catalog.ids, catalog.paths, strict=True) if name in present]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([("id", "path"), *rows])

    replace_file(place / "gallery.csv", write)


def answer(
    queries: Sequence[Features],
    indexes: Sequence[Index],
    steps: Sequence[Callable[[Found], Found]],
    ensemble: Concatenation | Fusion,
    k: int,
) -> Ranking:
    """Search each view for its queries, re-rank, fuse: the k best of every query. Raises ValueError for a bad k."""
    check_k(k, len(indexes[0].ids))
    asked = [step.keywords.get("depth", 0) for step in steps if isinstance(step, partial)]
    depth = min(max([k, ensemble.depth, *asked]), len(indexes[0].ids))
    start = time.perf_counter()
    rankings = []
    for view, index in zip(queries, indexes, strict=True):
        found = Found(index.search(view.vectors, view.ids, depth), view, index)
        for step in steps:
            found = step(found)
        rankings.append(found.ranking)
    ranking, seconds = ensemble.fuse(rankings, k), time.perf_counter() - start
    count = len(ranking.query_ids)
    print(f"searched for {count} queries in {seconds:.2f} s, {1e3 * seconds / count:.2f} ms each")
    return ranking
