"""The weights that are learned for evidence, and what they are beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.optimize import minimize

from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Evidence, Ranking
from beauty_bafe.rerank.appearance import APPEARANCE
from beauty_bafe.rerank.candidates import Candidates, reorder
from beauty_bafe.rerank.evidence import EvidenceReranker, fit_weights


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
