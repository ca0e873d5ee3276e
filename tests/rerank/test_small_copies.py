"""Small queries are compared with small copies of the gallery's photos; all others keep their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.torch import save_file

from beauty_bafe.data.catalog import Catalog
from beauty_bafe.data.photos import load_photo
from beauty_bafe.data.pictures import read_picture
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.rerank import dense, local_features, small_copies
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.dense import CanvasExtractor, Pair
from beauty_bafe.rerank.keypoints import Sift
from beauty_bafe.rerank.matching import NearestNeighbours
from beauty_bafe.rerank.pair_network import PairNetwork
from beauty_bafe.rerank.small_copies import SIDES, CopyDescriptors, SmallCopies, SmallCopyExtractor, product_share, small_copy
from beauty_bafe.rerank.verification import Verification
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


def test_the_product_is_measured_by_plausible_masks_alone() -> None:
    dust, faint = np.zeros((56, 56), np.uint8), np.full((56, 56), 100, np.uint8)
    dust[3, 3] = 255
    for mask in (None, np.zeros((56, 56), np.uint8), np.full((56, 56), 255, np.uint8), dust, faint):
        assert product_share(mask) == 1
    assert product_share(square_mask()) == pytest.approx(0.5)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_copy_is_blurred_shrunk_and_compressed(with_mask: bool) -> None:
    picture, mask = textured(0), square_mask() if with_mask else None
    copy, side = small_copy(picture, mask, 40), 80 if with_mask else 40
    blurred = cv2.GaussianBlur(picture, (0, 0), 0.6 * SIZE / side)
    bgr = cv2.cvtColor(cv2.resize(blurred, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    read = cv2.imdecode(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    assert np.array_equal(copy, cv2.cvtColor(read, cv2.COLOR_BGR2RGB))
    large = small_copy(picture, mask, 1000)
    assert large.shape == picture.shape, "never enlarged"
    assert 0.5 < np.abs(large.astype(int) - picture).mean() < 10, "but compressed"
    for shape in ((1, 1), (1, 700), (700, 3)):
        assert max(small_copy(np.zeros((*shape, 3), np.uint8), None, 40).shape) <= 40


@pytest.mark.parametrize(
    ("side", "share", "small"), [(3000, 0.45, False), (1800, 0.08, True), (320, 0.5, False), (318, 0.5, True)]
)
def test_small_is_counted_in_the_pixels_of_the_file(tmp_path: Path, side: int, share: float, small: bool) -> None:
    """Whatever the size at which a large file is decoded; a product of exactly 160 pixels is not small."""
    mask = np.zeros((112, 112), np.uint8)
    mask[: round(112 * share), : round(112 * share)] = 255
    picture = cv2.resize(textured(3), (side, side), interpolation=cv2.INTER_NEAREST)
    found, _ = search(tmp_path, {"q": picture}, mask[None])
    ranked = SmallCopies(6, 160)(found)
    assert ranked.small is not None
    assert ranked.small.tolist() == [small]


def test_only_small_queries_change_and_as_a_slow_twin_computes(tmp_path: Path) -> None:
    small, large = cv2.resize(textured(3), (90, 90)), cv2.resize(textured(2), (400, 400))
    found, describe = search(tmp_path, {"large": large, "small": small, "cropped": textured(4)}, np.stack([square_mask()] * 3))
    ranked = SmallCopies(6, 160)(found)
    assert ranked.small is not None
    assert ranked.small.tolist() == [False, True, True], "products of 200, 45 and 100 pixels"
    assert ranked.rescored, "whether or not a query is small"
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


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, metric: str) -> None:
    pictures = {"large": cv2.resize(textured(2), (400, 400)), "small": cv2.resize(textured(3), (90, 90))}
    found, _ = search(tmp_path, pictures)
    vectors = found.index.get(list(found.ranking.gallery_ids))
    index = ExactIndex(device="cpu", metric=metric).fit(vectors, found.ranking.gallery_ids)
    found = replace(found, index=index, ranking=index.search(found.queries.vectors, found.queries.ids, 6))
    step = SmallCopies(2, 160)
    both = step(found).ranking
    for row in (0, 1):
        alone = step(found.take(np.array([row]))).ranking
        assert alone.answers(0) == both.answers(row)
        np.testing.assert_array_equal(alone.scores[0], both.scores[row])
    assert both.answers(0) == found.ranking.answers(0)
    np.testing.assert_allclose(both.scores[0], np.sort(vectors @ found.queries.vectors[0])[::-1], atol=1e-5)
    assert both.answers(1)[2:] == found.ranking.answers(1)[2:], "the others follow"
    assert found.context is not None
    unlike = Colours()
    unlike.combine = lambda members: -Colours().combine(members)  # type: ignore[method-assign]
    context = replace(found.context, describe=unlike, cache={}, folder=tmp_path / "unlike")
    scores = step(replace(found, context=context)).ranking.scores
    assert (np.diff(scores, axis=1) <= 0).all(), "also if those that are compared become less similar than the others"


def test_fewer_candidates_than_asked_and_many_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {f"q{number}": cv2.resize(textured(number), (80, 80)) for number in range(5)}
    found, _ = search(tmp_path, pictures)
    whole = SmallCopies(4, 160)(found).ranking
    assert whole.positions.shape == (5, 6)
    short = replace(found, ranking=found.index.search(found.queries.vectors, found.queries.ids, 2))
    assert SmallCopies(4, 160)(short).ranking.positions.shape == (5, 4)
    monkeypatch.setattr(small_copies, "BLOCK", 2)
    assert SmallCopies(4, 160)(found).ranking.as_answers() == whole.as_answers()
    assert SmallCopies(99, 160)(found).ranking.positions.shape == (5, 6)


def test_copies_are_described_once_and_only_for_small_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, describe = search(tmp_path, {"large": cv2.resize(textured(2), (400, 400))})
    assert SmallCopies(6, 160)(found).rescored
    assert not describe.seen
    found, describe = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    first = SmallCopies(3, 160)(found).ranking
    assert len(describe.seen) == 3 * len(SIDES), "of three candidates"
    found, describe = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    monkeypatch.setattr(local_features, "read_picture", lambda path, _size: pytest.fail(f"{path} is read again"))
    assert SmallCopies(3, 160)(found).ranking.as_answers() == first.as_answers()
    assert not describe.seen, "read from disk"


def test_keypoints_of_small_queries_are_matched_with_those_of_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = cv2.resize(warped(textured(3)), (90, 90)), cv2.resize(warped(textured(2)), (400, 400))
    found, _ = search(tmp_path, {"large": large, "small": small})
    step = Verification(6, {"inliers": 1.0}, DETECTOR, NearestNeighbours(0.9))
    without = step.evidence(found).single
    looked: list[str] = []
    extract = SmallCopyExtractor.extract

    def note(self, rgb, mask):
        looked.append("copy")
        return extract(self, rgb, mask)

    monkeypatch.setattr(SmallCopyExtractor, "extract", note)
    asked = replace(found.ranking, positions=np.array([[0, 1], [2, 3]]), scores=np.zeros((2, 2)))
    one = replace(found, small=np.array([False, True]), ranking=asked)
    step.evidence(one)
    assert len(looked) == 2, "of the candidates of the small query"
    looked.clear()
    evidence = step.evidence(replace(found, small=np.array([False, True]))).single
    np.testing.assert_array_equal(evidence[0], without[0])
    query = DETECTOR.extract(small[..., ::-1], None)
    photos = [load_photo(tmp_path / "gallery" / f"{name}.png", SIZE) for name in found.ranking.answers(1)]
    copies = [SmallCopyExtractor(DETECTOR).extract(photo.photo, photo.mask) for photo in photos]
    np.testing.assert_allclose(evidence[1], step._score(query, copies)[:, :4])
    assert not np.allclose(evidence[1], without[1])
    verified = step(SmallCopies(6, 160)(found)).ranking
    assert [verified.answers(row)[0] for row in range(2)] == ["p2", "p3"]


def test_a_network_compares_copies_with_small_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({name: part.contiguous() for name, part in PairNetwork(False).state_dict().items()}, tmp_path / "v.safetensors")
    compared: list[np.ndarray] = []

    def score(_: PairNetwork, pairs: list[Pair]) -> np.ndarray:
        compared.extend(pair.candidate for pair in pairs)
        return np.zeros(len(pairs))

    monkeypatch.setattr(dense, "score_pairs", score)
    found, _ = search(tmp_path, {"small": cv2.resize(warped(textured(3)), (90, 90))})
    network = str(tmp_path / "v.safetensors")
    step = Verification(1, {"inliers": 1.0}, DETECTOR, NearestNeighbours(0.9), network=network, compared=1)
    step.evidence(replace(found, small=np.array([True])))
    photo = load_photo(tmp_path / "gallery" / f"{found.ranking.answers(0)[0]}.png", SIZE)
    expected = SmallCopyExtractor(CanvasExtractor(DETECTOR)).extract(photo.photo, photo.mask).pixels
    assert np.array_equal(compared[0], expected)


def test_features_of_copies_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    extractors = [SmallCopyExtractor(DETECTOR), SmallCopyExtractor(DETECTOR, 64), CopyDescriptors("a", Colours()), DETECTOR]
    keys = {str(one.key()) for one in extractors}
    for name, value in [("BLUR", 1.0), ("QUALITY", 70), ("VERSION", 99)]:
        with monkeypatch.context() as changed:
            changed.setattr(small_copies, name, value)
            keys |= {str(one.key()) for one in extractors[:3]}
    monkeypatch.setattr(small_copies, "SIDES", (99,))
    keys |= {str(one.key()) for one in (CopyDescriptors("a", Colours()), CopyDescriptors("b", Colours()))}
    assert len(keys) == 4 + 9 + 2
    assert CopyDescriptors("a", Colours()) == CopyDescriptors("a", Colours()) != CopyDescriptors("b", Colours())
    many = [np.full((2, 3), number, np.float32) for number in range(11)]
    kept = CopyDescriptors("a", Colours())
    assert [part[0, 0] for part in kept.unpack(kept.pack(many))] == list(range(11))


def test_wrong_settings_say_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small_copies\.below=0: type a side in pixels, 1 or more, or leave out small_copies"):
        SmallCopies(6, 0)
    with pytest.raises(ValueError, match="depth=0"):
        SmallCopies(0, 160)
    found, _ = search(tmp_path, {"small": cv2.resize(textured(3), (90, 90))})
    assert found.context is not None
    with pytest.raises(ValueError, match="needs the networks that described the gallery"):
        SmallCopies(6, 160)(replace(found, context=replace(found.context, describe=None)))
    with pytest.raises(ValueError, match=r"must be the first step, as in rerank=\[small_copies,sift_verified\]"):
        SmallCopies(6, 160)(SmallCopies(6, 160)(found))
    with pytest.raises(ValueError, match="this search has only descriptors"):
        SmallCopies(6, 160)(replace(found, context=None))
