"""What a gallery learns from street views of its own photos, and when it learns it again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from beauty_bafe.data.augmentation import Sample
from beauty_bafe.data.catalog import Skipped, open_catalog
from beauty_bafe.data.rehearsal import Rehearsal
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import load_members
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Evidence
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem
from beauty_bafe.rerank.candidates import Candidates, Reranker
from beauty_bafe.rerank.evidence import EvidenceReranker
from beauty_bafe.retrieval.ensemble import Concatenation
from beauty_bafe.retrieval.gallery import Gallery


@dataclass(frozen=True)
class Counting:
    """A re-ranker that changes nothing and learns how many views it was shown."""

    depth: int = 3
    weights: Mapping[str, float] | None = None

    def fit(self, examples: Candidates) -> Reranker:
        assert all(name in examples.ranking.gallery_ids for name in examples.ranking.query_ids)
        return replace(self, weights={"views": len(examples.ranking.query_ids)})

    def __call__(self, found: Candidates) -> Candidates:
        assert self.weights is not None, "it learns before it answers"
        return found


def paste(photo: np.ndarray, mask: np.ndarray, surroundings: object, rng: np.random.Generator) -> Sample:
    """A street view of a kind that descriptors without training still recognise."""
    return Sample(np.where(mask[..., None] > 127, photo, np.uint8(200)), mask)


@pytest.fixture
def open_gallery(toy: Path, tiny_checkpoint: Path, tmp_path: Path):
    def build(source: Path | None = toy / "gallery") -> Gallery:
        members = load_members(str(tiny_checkpoint), {"gem": Pooling(gem, saliency=False)})
        extraction = FeatureExtraction(tmp_path / "features", num_workers=0, device="cpu", precision="32-true")
        gallery = Gallery(members, extraction, Concatenation(zscore=False, weights=None))
        return gallery.open(
            None if source is None else str(source), str(tmp_path / "index"), ExactIndex(device="cpu"), Skipped()
        )

    return build


def test_it_is_learned_once_for_an_index_dir(open_gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rehearsal = str(tmp_path / "index"), Rehearsal(12, paste)
    first = open_gallery()
    first.rehearse([Counting()], rehearsal, "settings", folder)
    assert first.steps == [[Counting(weights={"views": 12})]]
    assert first.calibration is not None
    monkeypatch.setattr(Rehearsal, "draw", lambda *_: pytest.fail("drawn again"))
    for source in (None, Path(first.catalog.paths[0]).parent):
        later = open_gallery(source)
        later.rehearse([Counting()], rehearsal, "settings", folder)
        assert (later.steps, later.calibration) == (first.steps, first.calibration)
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda *_: False)
    copied = open_gallery(None)
    copied.rehearse([Counting()], Rehearsal(4, paste), "of a read-only copy", folder)
    assert copied.steps == [[Counting(weights={"views": 4})]]
    monkeypatch.undo()
    again = open_gallery(None)
    again.rehearse([Counting()], Rehearsal(3, paste), "settings", folder)
    assert again.steps == [[Counting(weights={"views": 12})]], "nothing was written"
    other = open_gallery(None)
    other.rehearse([Counting()], Rehearsal(5, paste), "other settings", folder)
    assert other.steps == [[Counting(weights={"views": 5})]]


@dataclass(frozen=True)
class Nearness(EvidenceReranker):
    """Knows the right photo of a street view, and the first answer to any other query."""

    depth: int = 5
    weights: Mapping[str, float] | None = None
    kinds = ("near", "far")
    absolute = ("near",)

    def evidence(self, candidates: Candidates) -> Evidence:
        ranking = candidates.ranking
        names = np.array(ranking.gallery_ids)[ranking.positions[:, : self.depth]]
        right = names == np.array(ranking.query_ids)[:, None]
        right[:, 0] |= ~right.any(axis=1)
        return Evidence.of(np.stack([2.0 * right, ~right], axis=-1))


def test_probabilities_come_from_absolute_evidence(open_gallery, toy: Path) -> None:
    gallery = open_gallery()
    gallery.rehearse([Nearness()], Rehearsal(24, paste), "")
    queries = open_catalog(toy / "queries")
    ranking = gallery.shortlist(queries, gallery.describe(queries, "queries", "queries", Skipped()), 3)
    assert gallery.calibration is not None
    assert len(gallery.calibration.scales) == 3, "of the similarity, of what is near, and of the lead"
    assert gallery.calibration.scales[1] > 0.5
    assert ranking.evidence.single.shape == (24, 5, 2)
    np.testing.assert_array_equal(ranking.probabilities, gallery.calibration.probabilities(ranking.evidence))


def test_probabilities_rise_with_what_was_learned(open_gallery, toy: Path) -> None:
    gallery = open_gallery()
    gallery.rehearse([], Rehearsal(48, paste), "")
    queries = open_catalog(toy / "queries")
    ranking = gallery.answer(queries, gallery.describe(queries, "queries", "queries", Skipped()), 3)
    assert ranking.probabilities.shape == (24, 3)
    assert (np.diff(ranking.probabilities, axis=1) <= 0).all()
    assert ranking.probabilities[:, 0].max() > ranking.probabilities[:, 0].min() > 0
    photos = gallery.catalog
    certain = gallery.answer(photos, gallery.describe(photos, "photos", "photos", Skipped()), 3)
    assert certain.probabilities[:, 0].mean() > ranking.probabilities[:, 0].mean(), "catalogue photos are surely known"


def test_without_views_there_are_no_probabilities(open_gallery, toy: Path, tmp_path: Path) -> None:
    gallery = open_gallery()
    gallery.rehearse([], Rehearsal(0, paste), "")
    queries = open_catalog(toy / "queries")
    ranking = gallery.answer(queries, gallery.describe(queries, "queries", "queries", Skipped()), 3)
    assert ranking.probabilities is None
    assert ranking.certainty(0) == [None] * 3


def test_photos_that_were_away_teach_later(open_gallery, toy: Path, tmp_path: Path) -> None:
    """What could not be learned is not kept for good; as long as nothing changes, photos are not looked through again."""
    folder, rehearsal = str(tmp_path / "index"), Rehearsal(12, paste)
    shutil.copytree(toy / "gallery", tmp_path / "gallery")
    open_gallery(tmp_path / "gallery")
    (tmp_path / "gallery").rename(tmp_path / "away")
    for _ in range(2):
        gallery = open_gallery(None)
        gallery.rehearse([Counting()], rehearsal, "settings", folder)
        assert gallery.calibration is None
    (tmp_path / "away").rename(tmp_path / "gallery")
    gallery = open_gallery(None)
    gallery.rehearse([Counting()], rehearsal, "settings", folder)
    assert gallery.steps == [[Counting(weights={"views": 12})]]
    assert gallery.calibration is not None


def test_photos_without_a_plain_backdrop_teach_nothing(open_gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noise").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (96, 96, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "noise" / f"{number}.png"), noise)
    gallery, folder = open_gallery(tmp_path / "noise"), str(tmp_path / "index")
    gallery.rehearse([], Rehearsal(12, paste), "", folder)
    assert gallery.calibration is None
    monkeypatch.setattr(Rehearsal, "draw", lambda *_: pytest.fail("looked through again"))
    later = open_gallery(tmp_path / "noise")
    later.rehearse([], Rehearsal(12, paste), "", folder)
    assert later.calibration is None
