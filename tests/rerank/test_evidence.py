"""Evidence of two pictures laid over each other, the weights that are learned for it, and what they are beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from scipy.optimize import minimize

from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Evidence, Ranking
from beauty_bafe.rerank.appearance import APPEARANCE, compare_appearance, contrast_candidates
from beauty_bafe.rerank.candidates import Candidates, reorder
from beauty_bafe.rerank.evidence import EvidenceReranker, fit_weights
from beauty_bafe.rerank.keypoints import THUMBNAIL
from beauty_bafe.rerank.matching import Geometry

MATRIX = np.array([[0.9, -0.2, 30], [0.2, 0.9, -20], [0, 0, 1.0]])
SIZE = 320


def smooth(seed: int, inside: slice = slice(8, 56)) -> np.ndarray:
    """The thumbnail of a smooth random picture whose product is a square."""
    thumbnail = np.random.default_rng(seed).integers(0, 255, (8, 8, 4), np.uint8)
    thumbnail = cv2.resize(thumbnail, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_CUBIC)
    thumbnail[..., 3] = 0
    thumbnail[inside, inside, 3] = 255
    return thumbnail


def laid_over(seen: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """What another camera sees of it; `matrix` leads from its canvas to that of `seen`."""
    scale = np.diag([THUMBNAIL / SIZE, THUMBNAIL / SIZE, 1])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(seen, scale @ matrix @ np.linalg.inv(scale), (THUMBNAIL, THUMBNAIL), flags=flags)


def test_the_same_picture_under_a_known_geometry() -> None:
    shop, geometry = smooth(0), Geometry(20, MATRIX)
    inliers, lightness, chroma, colour = compare_appearance(laid_over(shop, MATRIX), shop, geometry, SIZE)
    assert inliers == pytest.approx(np.log(21))
    assert min(lightness, chroma) > 0.97
    assert -0.3 < colour <= 0
    other = compare_appearance(laid_over(smooth(1), MATRIX), shop, geometry, SIZE)
    assert max(other[1:3]) < 0.5
    assert other[3] < 4 * colour
    askew = compare_appearance(laid_over(shop, MATRIX), shop, Geometry(20, np.eye(3)), SIZE)
    assert askew[1] < 0.8, "under another geometry other things lie over each other"


def test_light_and_its_colour_are_taken_out() -> None:
    shop = smooth(0)
    thumbnail = shop.astype(int)
    thumbnail[..., 0] = thumbnail[..., 0] // 2 + 20
    thumbnail[..., 1:3] = thumbnail[..., 1:3] + [9, -6]
    seen = thumbnail.clip(0, 255).astype(np.uint8)
    _, lightness, chroma, colour = compare_appearance(seen, shop, Geometry(5, np.eye(3)), SIZE)
    assert min(lightness, chroma) > 0.97
    assert colour > -0.3


def test_without_geometry_or_overlap_nothing_is_seen() -> None:
    assert compare_appearance(smooth(0), smooth(0), None, SIZE) == [0.0] * len(APPEARANCE)
    away = Geometry(3, np.array([[1, 0, 1000.0], [0, 1, 0], [0, 0, 1]]))
    assert compare_appearance(smooth(0), smooth(0), away, SIZE) == [pytest.approx(np.log(4)), 0, 0, 0]
    flat = np.full((THUMBNAIL, THUMBNAIL, 4), 255, np.uint8)
    assert compare_appearance(flat, flat, Geometry(3, np.eye(3)), SIZE)[1:] == [0, 0, 0], "a plain picture is like every other"


def test_a_fit_may_miss_by_a_pixel() -> None:
    """Print as fine as a thumbnail's pixels, laid over itself one of them off."""
    thumbnail = np.random.default_rng(0).integers(0, 255, (THUMBNAIL, THUMBNAIL, 4), np.uint8)
    thumbnail[..., 3] = 255
    shop, step = thumbnail, SIZE / THUMBNAIL
    for matrix, least in ((np.eye(3), 0.99), (np.array([[1, 0, step], [0, 1, 0], [0, 0, 1]]), 0.6)):
        _, lightness, chroma, _ = compare_appearance(shop, shop, Geometry(5, matrix), SIZE)
        assert min(lightness, chroma) > least


def test_only_what_shows_both_products_is_compared() -> None:
    shop = smooth(0)
    other = smooth(1).copy()
    other[8:32] = shop[8:32]
    half = other.copy()
    half[32:, :, 3] = 0
    geometry = Geometry(5, np.eye(3))
    for pair in ((shop, half), (half, shop)):
        assert min(compare_appearance(*pair, geometry, SIZE)[1:3]) > 0.95
    assert max(compare_appearance(other, shop, geometry, SIZE)[1:3]) < 0.9
    corner = shop.copy()
    corner[..., 3] = 0
    corner[8:21, 8, 3] = 255
    assert compare_appearance(corner, shop, geometry, SIZE)[1:] == [0, 0, 0], "13 pixels"
    corner[21, 8, 3] = 255
    assert compare_appearance(corner, shop, geometry, SIZE)[1] > 0.95, "14 pixels"


def test_colours_that_differ_wholly_count_no_more_than_two_dozen_levels() -> None:
    thumbnails = np.random.default_rng(0).choice([0, 255], (2, THUMBNAIL, THUMBNAIL, 4)).astype(np.uint8)
    thumbnails = np.repeat(np.repeat(thumbnails[:, ::16, ::16], 16, 1), 16, 2)
    thumbnails[..., 3] = 255
    first, second = (np.ascontiguousarray(thumbnail) for thumbnail in thumbnails)
    assert compare_appearance(first, second, Geometry(5, np.eye(3)), SIZE)[3] == -2


def variants() -> tuple[np.ndarray, list[np.ndarray]]:
    """What three variants of a product have in common, and the variants: a square of each is of another colour."""
    shop = smooth(0)
    colours = [(90, 200, 128), (150, 60, 200), (200, 100, 60)]
    drawn = [shop.copy() for _ in colours]
    for thumbnail, colour in zip(drawn, colours, strict=True):
        thumbnail[20:30, 20:30, :3] = colour
    return shop, drawn


def test_the_contrast_tells_which_variant_it_is() -> None:
    """Seen by another camera, in other light; the third is one that is not among the candidates."""
    _, (a, b, other) = variants()
    geometries = [Geometry(20, MATRIX), Geometry(4, MATRIX)]
    for thumbnail, expected in ((a, 1.0), (b, -1.0), (other, 0.0)):
        seen = laid_over(thumbnail, MATRIX).astype(int)
        seen[..., :3] += [-20, 9, -6]
        contrast = contrast_candidates(seen.clip(0, 255).astype(np.uint8), [a, b], geometries, SIZE)
        assert contrast[0, 1] == pytest.approx(expected, abs=0.3)
        assert contrast[1, 0] == -contrast[0, 1]
        assert np.isnan(np.diag(contrast)).all()


@pytest.mark.parametrize("fine", [False, True])
def test_the_contrast_against_a_slow_twin(fine: bool) -> None:
    """In another light. With `fine` print all over, the candidates agree at fewer than 25 pixels."""
    _, (a, b, other) = variants()
    if fine:
        b = smooth(1)
    query = a.copy()
    query[18:40, 18:28, :3] = other[18:40, 18:28, :3]
    query[..., :3] = (query[..., :3].astype(int) + np.array([-20, 9, -6])).clip(0, 255).astype(np.uint8)
    contrast = contrast_candidates(query, [a, b], [Geometry(9, np.eye(3))] * 2, SIZE)
    own, first, second = (
        cv2.GaussianBlur(part[..., :3].astype(np.float64) * [100 / 255, 1, 1], (0, 0), 0.7) for part in (query, a, b)
    )
    places = [(y, x) for y in range(8, 56) for x in range(8, 56)]
    differing = [place for place in places if np.linalg.norm(first[place] - second[place]) > 10]
    agreeing = [place for place in places if place not in differing]
    assert (len(agreeing) < 25) == fine
    cast = np.mean([(first[place] + second[place]) / 2 - own[place] for place in (places if fine else agreeing)], axis=0)
    above = below = 0.0
    for place in differing:
        difference = np.linalg.norm(first[place] - second[place])
        seen = own[place] + cast
        above += (difference - 10) * (np.linalg.norm(seen - second[place]) - np.linalg.norm(seen - first[place]))
        below += (difference - 10) * difference
    assert contrast[0, 1] == pytest.approx(above / below, abs=1e-4)
    assert abs(contrast[0, 1]) < 0.95


def test_there_is_no_contrast_where_nothing_can_be_compared() -> None:
    shop, (a, b, _) = variants()
    fit = Geometry(4, np.eye(3))

    def compared(query: np.ndarray, candidates: list[np.ndarray], geometries: list[Geometry | None]) -> bool:
        return bool(np.isfinite(contrast_candidates(query, candidates, geometries, SIZE)).any())

    assert compared(a, [a, b], [fit, fit])
    assert not compared(a, [a, b], [fit, None])
    assert not compared(a, [a, b], [fit, Geometry(3, np.eye(3))]), "too few inliers"
    assert not compared(a, [shop, shop.copy()], [fit, fit]), "the same picture twice"
    assert not compared(a, [a, b], [fit, Geometry(9, np.array([[1, 0, 1000.0], [0, 1, 0], [0, 0, 1]]))]), "one is elsewhere"
    hidden = a.copy()
    hidden[17:33, 17:33, 3] = 0
    assert not compared(hidden, [a, b], [fit, fit]), "a hand covers what differs"
    corner = a.copy()
    corner[..., 3] = 0
    for pixels, enough in ((49, False), (50, True)):
        corner[20:30, 20:25, 3].flat = 0
        corner[20:30, 20:25, 3] = (255 * (np.arange(50) < pixels)).reshape(10, 5)
        assert compared(corner, [a, b], [fit, fit]) == enough, "pixels that show all three"
    faint = shop.copy()
    for levels, enough in ((11, False), (40, True)):  # 1 and 30 above what counts, at about a hundred pixels
        faint[20:30, 20:30, 1] = (shop[20:30, 20:30, 1].astype(int) + levels).clip(0, 255)
        assert compared(a, [shop, faint], [fit, fit]) == enough
    contrast = contrast_candidates(a, [b, a, b, shop], [None, fit, fit, None], SIZE)
    assert np.argwhere(np.isfinite(contrast)).tolist() == [[1, 2], [2, 1]]


def test_the_candidates_with_the_most_inliers_are_compared() -> None:
    _, (a, b, _) = variants()
    geometries: list[Geometry | None] = [Geometry(4 + number % 10, np.eye(3)) for number in range(10)]
    contrast = contrast_candidates(a, [a, b] * 5, geometries, SIZE)
    expected = [[row, column] for row in range(2, 10) for column in range(2, 10) if (row - column) % 2]
    assert np.argwhere(np.isfinite(contrast)).tolist() == expected


def test_pairwise_evidence_follows_its_candidates(found: Candidates) -> None:
    """Of answers i and j it is 100 i + j, whatever is sorted, left out or added afterwards."""

    class Paired(Told):
        def evidence(self, found: Candidates) -> Evidence:
            positions = found.ranking.positions[:, : self.depth]
            pairwise = 100.0 * positions[:, :, None] + positions[:, None, :]
            return Evidence(super().evidence(found).single, pairwise[..., None])

    def check(ranking: Ranking, kinds: int) -> None:
        pairwise = ranking.get_evidence().pairwise
        assert pairwise.shape == (*ranking.positions.shape, ranking.positions.shape[1], kinds)
        expected = 100.0 * ranking.positions[:, :, None] + ranking.positions[:, None, :]
        np.testing.assert_array_equal(pairwise, np.repeat(expected[..., None], kinds, axis=-1))

    step = Paired(10, {"told": 2.1}, (0.0,) * 9 + (1.0,))
    once = step(found)
    assert once.ranking.as_answers() != found.ranking.as_answers()
    check(once.ranking, 1)
    twice = step(once)
    assert twice.ranking.as_answers() != once.ranking.as_answers()
    check(twice.ranking, 2)
    check(replace(step, depth=4)(twice).ranking, 3)
    check(twice.take(np.array([2, 0])).ranking, 2)
    check(twice.ranking.first(3), 2)


def training_examples(weights: list[float], queries: int = 400, answers: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries whose right answer is drawn by the model itself."""
    rng = np.random.default_rng(0)
    similarity, evidence = rng.normal(size=(queries, answers)), rng.normal(size=(queries, answers, len(APPEARANCE)))
    chances = np.exp(2 * (similarity + evidence @ weights))
    right = [rng.choice(answers, p=row / row.sum()) for row in chances]
    return similarity, evidence, np.arange(answers) == np.array(right)[:, None]


def test_weights_are_found_again() -> None:
    truth = [0.5, 0.0, 1.0, 0.2]
    similarity, evidence, hit = training_examples(truth)
    found = fit_weights(similarity, evidence, hit)
    np.testing.assert_allclose(found, truth, atol=0.12)
    scores = similarity + evidence @ found
    assert hit[np.arange(len(hit)), scores.argmax(axis=1)].mean() > hit[np.arange(len(hit)), similarity.argmax(axis=1)].mean()


def test_weights_against_a_slow_twin() -> None:
    similarity, evidence, hit = training_examples([0.5, 0.1, 1.0, 0.2], queries=40)
    hit[:5] = False  # teach nothing
    values = np.concatenate([similarity[..., None], evidence], axis=2)[5:]
    spread = values.reshape(-1, 5).std(axis=0) + 1e-6

    def loss(weights: np.ndarray) -> float:
        total = 0.0
        for row, right in zip(values / spread, hit[5:], strict=True):
            scores = [float(answer @ weights) for answer in row]
            total -= scores[int(right.argmax())] - np.log(sum(np.exp(score) for score in scores))
        return total / len(values) + 0.01 * float((weights[1:] ** 2).sum())

    slow = (
        minimize(
            loss,
            np.ones(5),
            method="Nelder-Mead",
            bounds=[(0.1, None)] + [(0, None)] * 4,
            options={"maxiter": 9000, "xatol": 1e-6, "fatol": 1e-10},
        ).x
        / spread
    )
    np.testing.assert_allclose(fit_weights(similarity, evidence, hit), slow[1:] / slow[0], rtol=2e-3, atol=2e-4)


def test_evidence_that_misleads_weighs_nothing() -> None:
    similarity, evidence, hit = training_examples([0.5, 0.0, 0.0, 0.0])
    found = fit_weights(similarity, -evidence, hit)
    assert found[0] == 0
    assert not fit_weights(similarity, evidence, np.zeros_like(hit)).any(), "nothing to learn from"


def test_misleading_likeness_is_not_outweighed_beyond_measure() -> None:
    similarity, evidence, hit = training_examples([0.5, 0.0, 0.0, 0.0])
    found = fit_weights(-similarity, evidence, hit)
    assert 0 < found[0] < 100


@dataclass(frozen=True)
class Told(EvidenceReranker):
    """Its evidence is `told`, by rank."""

    depth: int
    weights: Mapping[str, float] | None
    told: tuple[float, ...] = (0.0,)
    kinds = ("told", "other")
    absolute: ClassVar[tuple[str, ...]] = ("told",)

    def evidence(self, found: Candidates) -> Evidence:
        queries, answers = found.ranking.positions[:, : self.depth].shape
        return Evidence.of(np.broadcast_to(np.resize(self.told, answers)[:, None], (queries, answers, 2)))


class Placing(Told):
    """Its evidence distinguishes candidates, and says nothing about probabilities."""

    absolute = ()


@pytest.fixture(params=["ip", "l2", "l1", "ip, any length", "l2, any length"])
def found(request: pytest.FixtureRequest) -> Candidates:
    """The ten answers of each of three queries."""
    rng = np.random.default_rng(0)
    metric, _, free = request.param.partition(", ")
    vectors, queries = (rng.normal(size=(rows, 4)) for rows in (30, 3))
    if free:
        vectors, queries = vectors * rng.uniform(20, 40, (30, 1)), queries * 30
    else:
        vectors, queries = unit(vectors), unit(queries)
    index = ExactIndex(metric, "cpu").fit(vectors.astype(np.float32), tuple(map(str, range(30))))
    asked = Features(queries.astype(np.float32), tuple("abc"), any_length=bool(free))
    return Candidates(index.search(asked.vectors, asked.ids, 10), asked, index)


def test_without_evidence_the_order_stays_whatever_the_index_measures(found: Candidates) -> None:
    ranked = Told(10, {"told": 1.0})(found).ranking
    assert ranked.as_answers() == found.ranking.as_answers()
    cosines = unit(found.vectors(10)) @ unit(found.queries.vectors)[..., None]
    np.testing.assert_allclose(ranked.scores, -np.sort(-cosines[..., 0], axis=1), atol=1e-6)


def test_it_looks_deeper_than_what_was_found(found: Candidates) -> None:
    """Also when it learns: 30 pictures are asked for where 10 were found, and each query is named after the 20th."""
    last = (0.0,) * 29 + (1.0,)
    deep = found.index.search(found.queries.vectors, found.queries.ids, 30)
    ranked = Told(30, {"told": 3.0}, last)(found).ranking
    assert [ranked.answers(row)[0] for row in range(3)] == [deep.answers(row)[-1] for row in range(3)]
    names = tuple(deep.answers(row)[19] for row in range(3))
    named = replace(found, queries=replace(found.queries, ids=names), ranking=replace(found.ranking, query_ids=names))
    learned = Told(30, None, (0.0,) * 19 + (1.0,) + (0.0,) * 10).fit(named)
    assert learned.weights is not None
    assert learned.weights["told"] > 0.1
    assert learned(named).ranking.as_answers().keys() == {*names}
    assert all(answers[0] == name for name, answers in learned(named).ranking.as_answers().items())


def test_what_is_not_found_has_no_rank(found: Candidates, capsys: pytest.CaptureFixture[str]) -> None:
    """One query is named after its second answer, one after its first, one after none."""
    names = found.ranking.answers(0)[1], found.ranking.answers(1)[0], "nobody"
    named = replace(found, queries=replace(found.queries, ids=names), ranking=replace(found.ranking, query_ids=names))
    Told(10, None).fit(named)
    printed = capsys.readouterr().out
    assert "weights learned from 3 street views: " in printed
    assert "; mean reciprocal rank 0.500, 0.500 without re-ranking" in printed


@pytest.mark.parametrize("kind", [Told, Placing])
def test_weights_are_beside_a_likeness_of_at_most_one(found: Candidates, kind: type[Told]) -> None:
    """Vectors of length 30 do not drown them, and distances do not double them; a second step goes on from there."""
    last = kind(10, {"told": 2.1}, (0.0,) * 9 + (1.0,))
    ranked = last(found)
    assert [ranked.ranking.answers(row)[0] for row in range(3)] == [found.ranking.answers(row)[-1] for row in range(3)]
    again = last(ranked).ranking
    assert [again.answers(row)[0] for row in range(3)] == [found.ranking.answers(row)[-2] for row in range(3)]
    plain = Told(10, {})(found).ranking.scores
    expected = np.roll(plain, 1, axis=1)[..., None]  # the similarity stays with its candidate
    if kind is Told:
        expected = np.concatenate([expected, np.broadcast_to(np.eye(10)[0][:, None], expected.shape)], axis=-1)
    np.testing.assert_array_equal(ranked.ranking.get_evidence().single, expected)
    assert again.evidence is not None
    assert again.evidence.single.shape[2] == (3 if kind is Told else 1)
    np.testing.assert_array_equal(again.evidence.single[:, 0, 0], plain[:, 8])
    np.testing.assert_array_equal(ranked.take(np.array([2])).ranking.get_evidence().single, expected[2:])
    np.testing.assert_array_equal(ranked.ranking.first(4).get_evidence().single, expected[:, :4])
    assert reorder(ranked, again.scores).ranking.evidence is None, "other re-rankers' scores replace it"


@pytest.mark.parametrize(
    ("depth", "weights", "message"),
    [
        (0, {"told": 1.0}, "depth=0: type how many of each query's first candidates to re-rank, 1 or more"),
        (5, 0.05, r"weights=0.05: type a number for each kind of evidence, as in \{told: 0.05\}, or null to learn them"),
        (5, {"told": None}, r"weights: \{told: None\} is not a finite number; type one, as in \{told: 0.05\}"),
        (5, {"other": float("nan")}, r"weights: \{other: nan\} is not a finite number"),
        (5, {"tolt": 1.0}, r"weights: tolt is not a kind of evidence here; type some of told, other"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(depth: int, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Told(depth, weights)
