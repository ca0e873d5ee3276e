"""A gallery on disk and one query, as several test files need them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from beauty_bafe.data.catalog import Skipped, open_catalog
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.index.base import Index
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Ranking
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.retrieval.ensemble import Concatenation
from beauty_bafe.retrieval.gallery import Gallery

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


class Shop:
    """A gallery folder, its index folder, and one query answered from them."""

    index: Callable[[], Index] = partial(ExactIndex, device="cpu")

    def __init__(self, root: Path, toy: Path, checkpoint: Path, ensemble: type = Concatenation, **settings: object) -> None:
        self.root, self.kind, self.settings = root, ensemble, settings
        self.members = load_members(str(checkpoint), dict(enumerate(POOLINGS)))
        self.extraction = FeatureExtraction(root / "features", num_workers=0, device="cpu", precision="32-true")
        self.query = sorted((toy / "queries").iterdir())[0]
        shutil.copytree(toy / "gallery", root / "gallery")

    def open(self, gallery: bool = True, kept: bool = True) -> Gallery:
        shop = Gallery(self.members, self.extraction, self.kind(**self.settings))
        gallery_source = str(self.root / "gallery") if gallery else None
        return shop.open(gallery_source, str(self.root / "index") if kept else None, self.index(), Skipped())

    def files(self) -> dict[Path, int]:
        """Every file of the kept index, and when it was written."""
        return {file: file.stat().st_mtime_ns for file in (self.root / "index").rglob("*") if file.name != "lock"}

    def answer(self, gallery: bool = True, kept: bool = True, k: int = 5) -> Ranking:
        shop = self.open(gallery, kept)
        assert set(shop.indexes[0].ids) <= set(shop.catalog.ids)
        (self.root / "queries").mkdir(exist_ok=True)
        shutil.copy(self.query, self.root / "queries" / "q.jpg")
        queries = open_catalog(self.root / "queries")
        return shop.answer(queries, shop.describe(queries, str(self.root / "queries"), "queries", Skipped()), k)
