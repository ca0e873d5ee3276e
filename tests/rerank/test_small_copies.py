"""Small queries are compared with small copies of the gallery's photos; all others keep their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from beauty_bafe.data.catalog import Catalog, Skipped, open_catalog
from beauty_bafe.data.photos import load_photo
from beauty_bafe.data.pictures import read_picture
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.extraction.local import FeatureExtraction
from beauty_bafe.extraction.members import Member, load_members
from beauty_bafe.extraction.memory import MemoryExtraction
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.rerank import local_features, small_copies
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.keypoints import Sift
from beauty_bafe.rerank.matching import NearestNeighbours
from beauty_bafe.rerank.small_copies import SIDES, CopyDescriptors, OfSmallCopy, SmallCopies, product_side, small_copy
from beauty_bafe.rerank.verification import Verification
from beauty_bafe.retrieval.describer import EnsembleDescriber
from beauty_bafe.retrieval.ensemble import Concatenation, Fusion
from tests.textured import SIZE, textured, warped

DETECTOR = Sift(SIZE, 300)
SQUARE = slice(14, 42)  # of a mask of 56 cells: half of the picture's side


class Colours:
    """Two members: one describes a picture by its edges, which a small copy lacks, the other by its colours."""

    about, size = "colours", SIZE

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.seen += [picture.shape for picture in pictures]
        canvases = [cv2.resize(picture, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR) for picture in pictures]
        edges = [cv2.resize(cv2.convertScaleAbs(cv2.Laplacian(canvas, cv2.CV_32F)), (40, 40)) for canvas in canvases]
        colours = [cv2.resize(canvas, (6, 6), interpolation=cv2.INTER_AREA) for canvas in canvases]
        return [np.stack([part.ravel().astype(np.float32) + 1 for part in parts]) for parts in (edges, colours)]

    def combine(self, members: Sequence[np.ndarray]) -> np.ndarray:
        return unit(np.concatenate([unit(part) for part in members], axis=1)).astype(np.float32)

    def vectors(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        return self.combine(self(pictures))


def square_mask() -> np.ndarray:
    mask = np.zeros((56, 56), np.uint8)
    mask[SQUARE, SQUARE] = 255
    return mask


def search(folder: Path, queries: dict[str, np.ndarray], masks: np.ndarray | None = None) -> tuple[Candidates, Colours]:
    """Six textured products, and their pictures as queries; all described by Colours."""
    paths = [folder / "gallery" / f"p{number}.png" for number in range(6)]
    asked = [folder / "queries" / f"{name}.png" for name in queries]
    for path, picture in zip(paths + asked, [*map(textured, range(6)), *queries.values()], strict=True):
        path.parent.mkdir(exist_ok=True, parents=True)
        if not path.exists():
            cv2.imwrite(str(path), picture)
    gallery, catalog = (Catalog(tuple(path.stem for path in some), tuple(some)) for some in (paths, asked))
    describe = Colours()
    index = ExactIndex(device="cpu").fit(describe.vectors([read_picture(path).rgb for path in paths]), gallery.ids)
    described = Features(describe.vectors([read_picture(path).rgb for path in asked]), catalog.ids, masks)
    context = SearchContext(gallery, catalog, folder / "features", {}, describe)
    describe.seen.clear()
    return Candidates(index.search(described.vectors, described.ids, 6), described, index, context), describe


def test_the_product_is_measured_in_the_picture_s_own_pixels() -> None:
    wide = np.zeros((100, 200, 3), np.uint8)
    assert product_side(wide, None) == product_side(wide, np.zeros((56, 56), np.uint8)) == 200
    assert product_side(wide, square_mask()) == pytest.approx(100)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_copy_has_a_product_of_the_side_and_the_faults_of_jpeg(with_mask: bool) -> None:
    picture, mask = textured(0), square_mask() if with_mask else None
    copy = small_copy(picture, mask, 40)
    assert copy.shape == ((80, 80, 3) if with_mask else (40, 40, 3))
    plain = cv2.resize(picture, copy.shape[:2], interpolation=cv2.INTER_AREA)
    assert 1 < np.abs(copy.astype(int) - plain).mean() < 30
    assert small_copy(picture, mask, 1000).shape == picture.shape, "never larger than the picture"
    assert np.array_equal(copy, small_copy(picture, mask, 40))


def test_only_small_queries_change_and_as_a_slow_twin_computes(tmp_path: Path) -> None:
    small, large = cv2.resize(textured(3), (90, 90)), cv2.resize(textured(2), (400, 400))
    found, describe = search(tmp_path, {"large": large, "small": small, "cropped": textured(4)}, np.stack([square_mask()] * 3))
    ranked = SmallCopies(6, 160)(found)
    assert ranked.small is not None
    assert ranked.small.tolist() == [False, True, True], "products of 200, 45 and 100 pixels"
    assert ranked.rescored
    assert ranked.ranking.answers(0) == found.ranking.answers(0)
    np.testing.assert_array_equal(ranked.ranking.scores[0], found.ranking.scores[0])
    for row in (1, 2):
        expected = {}
        for number in range(6):
            photo = textured(number)[..., ::-1]  # OpenCV wrote it as BGR
            # The product is measured by the backdrop.
            mask = ((photo < 255).any(axis=2) * 255).astype(np.uint8)
            parts = [describe.vectors([read]) for read in (photo, *(small_copy(photo, mask, side) for side in SIDES))]
            expected[f"p{number}"] = float(unit(np.sum(parts, axis=0))[0] @ found.queries.vectors[row])
        answers = dict(zip(ranked.ranking.answers(row), ranked.ranking.scores[row].tolist(), strict=True))
        assert answers == pytest.approx(expected, abs=0.002)
        assert list(answers.values()) == sorted(answers.values(), reverse=True)
        assert ranked.ranking.scores[row].tolist() != pytest.approx(found.ranking.scores[row].tolist(), abs=0.01)
    one = ranked.take(np.array([2, 0]))
    assert one.small is not None
    assert one.small.tolist() == [True, False]


def test_fewer_candidates_than_asked_and_many_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {f"q{number}": cv2.resize(textured(number), (80, 80)) for number in range(5)}
    found, _ = search(tmp_path, pictures)
    whole = SmallCopies(4, 160)(found).ranking
    assert whole.positions.shape == (5, 4)
    monkeypatch.setattr(small_copies, "BLOCK", 2)
    assert SmallCopies(4, 160)(found).ranking.as_answers() == whole.as_answers()
    assert SmallCopies(99, 160)(found).ranking.positions.shape == (5, 6)


def test_copies_are_described_once_and_only_for_small_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, describe = search(tmp_path, {"large": cv2.resize(textured(2), (400, 400))})
    SmallCopies(6, 160)(found)
    assert not describe.seen
    found, describe = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    first = SmallCopies(3, 160)(found).ranking
    assert len(describe.seen) == 3 * len(SIDES), "of three candidates"
    found, describe = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    monkeypatch.setattr(local_features, "read_picture", lambda path, _size: pytest.fail(f"{path} is read again"))
    assert SmallCopies(3, 160)(found).ranking.as_answers() == first.as_answers()
    assert not describe.seen, "read from disk"


def test_keypoints_of_small_queries_are_matched_with_those_of_copies(tmp_path: Path) -> None:
    small, large = cv2.resize(warped(textured(3)), (90, 90)), cv2.resize(warped(textured(2)), (400, 400))
    found, _ = search(tmp_path, {"large": large, "small": small})
    step = Verification(6, {"inliers": 1.0}, DETECTOR, NearestNeighbours(0.9))
    without = step.evidence(found)
    evidence = step.evidence(replace(found, small=np.array([False, True])))
    np.testing.assert_array_equal(evidence[0], without[0])
    query = DETECTOR.extract(small[..., ::-1], None)
    photos = [load_photo(tmp_path / "gallery" / f"{name}.png", SIZE) for name in found.ranking.answers(1)]
    copies = [OfSmallCopy(DETECTOR).extract(photo.photo, photo.mask) for photo in photos]
    np.testing.assert_allclose(evidence[1], step._score(query, copies))
    assert not np.allclose(evidence[1], without[1])
    verified = step(SmallCopies(6, 160)(found)).ranking
    assert [verified.answers(row)[0] for row in range(2)] == ["p2", "p3"]


def test_features_of_copies_have_folders_of_their_own() -> None:
    keys = [OfSmallCopy(DETECTOR).key(), OfSmallCopy(DETECTOR, 64).key(), DETECTOR.key()]
    assert len({str(key) for key in keys}) == 3
    one, other = (CopyDescriptors(about, 8, Colours()) for about in ("a", "b"))
    assert one.key() != other.key()
    assert one == CopyDescriptors("a", 8, Colours()) != other


def test_wrong_settings_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below=0: type a side in pixels, 1 or more, or leave out small_copies"):
        SmallCopies(6, 0)
    with pytest.raises(ValueError, match="depth=0"):
        SmallCopies(0, 160)
    found, _ = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    assert found.context is not None
    with pytest.raises(ValueError, match="needs the networks that described the gallery"):
        SmallCopies(6, 160)(replace(found, context=replace(found.context, describe=None)))
    with pytest.raises(ValueError, match="type it first, as in rerank=\\[small_copies,sift_verified\\]"):
        SmallCopies(6, 160)(SmallCopies(6, 160)(found))
    with pytest.raises(ValueError, match="this search has only descriptors"):
        SmallCopies(6, 160)(replace(found, context=None))


@pytest.mark.parametrize("ensemble", [Concatenation(False, None, pca=4), Fusion("score", None, 5)], ids=["pca", "fusion"])
def test_pictures_in_memory_are_described_like_the_gallery(
    ensemble: Concatenation | Fusion, toy: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    poolings = {"gem": Pooling(partial(gem, p=3.0), True), "spoc": Pooling(spoc, False)}
    members: list[Member] = load_members([str(tiny_checkpoint)], poolings)
    extraction = FeatureExtraction(tmp_path, precision="32-true")
    catalog = open_catalog(toy / "gallery")
    stored = ensemble.fit(extraction(members, catalog, str(toy / "gallery"), "pictures", Skipped()))
    views = stored.transform(extraction(members, catalog, str(toy / "gallery"), "pictures", Skipped()))
    pictures = [catalog.read(row).rgb for row in range(len(catalog))]
    for number, view in enumerate(views):
        describe = EnsembleDescriber(members, MemoryExtraction(extraction), ensemble, number)
        np.testing.assert_allclose(describe.combine(describe(pictures)), view.vectors, atol=1e-3)
        assert describe.about == EnsembleDescriber(members, MemoryExtraction(extraction), ensemble, 0).about
        assert describe.about != EnsembleDescriber(members[:1], MemoryExtraction(extraction), ensemble, 0).about
        assert describe.size == members[0].extractor.size
