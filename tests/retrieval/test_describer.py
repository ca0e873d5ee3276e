"""Pictures in memory are described in the way the gallery's were, for copies of its photos that are cached on disk."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beauty_bafe.data.catalog import Skipped, open_catalog
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.extraction.memory import MemoryExtraction
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.rerank.small_copies import SmallCopies
from beauty_bafe.retrieval.describer import EnsembleDescriber
from beauty_bafe.retrieval.ensemble import Concatenation, Fusion
from beauty_bafe.retrieval.gallery import Gallery

ENSEMBLES = {"pca": lambda: Concatenation(False, None, pca=4), "fusion": lambda: Fusion("score", None, 5)}


@pytest.fixture
def members(tiny_checkpoint: Path) -> list[Member]:
    return load_members([str(tiny_checkpoint)], {"gem": Pooling(partial(gem, p=3.0), True), "gems": Pooling(gem, False, 2)})


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_pictures_in_memory_are_described_like_the_gallery(kind: str, toy: Path, members: list[Member], tmp_path: Path) -> None:
    extraction, catalog = FeatureExtraction(tmp_path, precision="32-true"), open_catalog(toy / "gallery")
    ensemble = ENSEMBLES[kind]()
    stored = extraction(members, catalog, str(toy / "gallery"), "pictures", Skipped())
    views = ensemble.fit(stored).transform(stored)
    pictures = [catalog.read(row).rgb for row in range(len(catalog))]
    memory = MemoryExtraction(extraction)
    for number, view in enumerate(views):
        describe = EnsembleDescriber(members, lambda: memory, ensemble, number)
        np.testing.assert_allclose(describe.combine(describe(pictures)), view.vectors, atol=1e-3)
        assert describe.size == members[0].extractor.size


def test_cached_copies_are_those_of_the_same_networks_and_settings(members: list[Member], tmp_path: Path) -> None:
    def about(members: list[Member], **settings: Any) -> str:
        memory = MemoryExtraction(FeatureExtraction(tmp_path, **{"precision": "32-true", **settings}))
        return EnsembleDescriber(members, lambda: memory, Fusion("score", None, 5), 0).about

    first = about(members)
    assert first == about(list(members))
    others = [replace(members[0], pooling=Pooling(spoc, True)), replace(members[0], source="other")]
    changed = [about([other, members[1]]) for other in others] + [about(members[:1])]
    changed += [about(members, **made) for made in ({"scales": (0.7,)}, {"flip": True}, {"dtype": "float16"})]
    assert len({first, *changed}) == 7


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_a_gallery_passes_its_networks_on(kind: str, toy: Path, members: list[Member], tmp_path: Path) -> None:
    """Every index of a fusion gets descriptors of its own member."""
    extraction, catalog = FeatureExtraction(tmp_path / "f", precision="32-true"), open_catalog(toy / "gallery")
    shop = Gallery(members, extraction, ENSEMBLES[kind]())
    shop.open(str(toy / "gallery"), None, ExactIndex(device="cpu"), Skipped())
    shop.steps = [[SmallCopies(5, 10_000)] for _ in shop.indexes]
    queries = catalog.subset(range(3))
    described = shop.describe(queries, str(toy / "gallery"), "queries", Skipped())
    answers = shop.answer(queries, described, 5)
    shop.steps = [[] for _ in shop.indexes]
    assert [answers.answers(row)[0] for row in range(3)] == list(queries.ids)
    assert not np.array_equal(answers.scores, shop.answer(queries, described, 5).scores)
    assert len(list((tmp_path / "f").glob("copydescriptors-*"))) == 1, "described once for all indexes"
