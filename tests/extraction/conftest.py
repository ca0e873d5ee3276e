"""A folder of pictures, one of them unreadable, and the tiny network to describe it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from beauty_bafe.data.catalog import Catalog, Skipped, from_folder
from beauty_bafe.extraction.features import Features
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.models.views import View

ATTENTION = Pooling(spoc, saliency=True)
GEM = Pooling(gem, saliency=False)


@pytest.fixture
def folder(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    for number in range(7):
        write_picture(f"pictures/p{number}.jpg", (40 + 9 * number, 50), seed=number)
    (tmp_path / "pictures" / "p3.jpg").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def describe(tmp_path: Path, tiny_checkpoint: Path) -> Callable[..., list[Features]]:
    """Describe a folder or catalogue with the tiny network."""

    def describe(
        source: Path | Catalog,
        *poolings: Pooling,
        store: str = "features",
        members: Sequence[Member] | None = None,
        skipped: Skipped | None = None,
        masks: bool = False,
        view: View | None = None,
        **options: object,
    ) -> list[Features]:
        settings: dict[str, object] = {"num_workers": 0, "device": "cpu", "precision": "32-true", "max_skipped": 0.99}
        extraction = FeatureExtraction(tmp_path / store, **settings | options)  # type: ignore[arg-type]
        catalog = source if isinstance(source, Catalog) else from_folder(source)
        members = members or load_members(str(tiny_checkpoint), dict(enumerate(poolings or (ATTENTION,))))
        return extraction(members, catalog, "source", "pictures", skipped or Skipped(), masks, view)

    return describe
