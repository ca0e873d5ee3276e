"""Each re-ranking against a slow, obvious twin that holds everything at once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from beauty_bafe.extraction.features import Features
from beauty_bafe.index.base import Index
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Ranking
from beauty_bafe.rerank import descriptors
from beauty_bafe.rerank.candidates import Candidates, with_depth

ROWS, QUERIES, DIMS = 60, 4, 8


def unit(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = np.abs(rng.normal(size=(rows, DIMS))) + rng.integers(3, size=(rows, 1)) * np.eye(DIMS)[rng.integers(4, size=rows)]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=["array", "by id"])
def found(request: pytest.FixtureRequest, index_by_id: type[Index]) -> Candidates:
    """What a re-ranker may know of an index is what any index has: `index_by_id` has no array."""
    empty = ExactIndex(device="cpu", first_pass="float32") if request.param == "array" else index_by_id()  # type: ignore[call-arg]
    index = empty.fit(unit(ROWS, 0), tuple(map(str, range(ROWS))))
    queries = Features(unit(QUERIES, 1), tuple("abcd"))
    return Candidates(index.search(queries.vectors, queries.ids, 7), queries, index)


def by_likeness(items: np.ndarray, query: np.ndarray) -> list[int]:
    return list(np.argsort(-(items.astype(float) @ query.astype(float)), kind="stable"))


def check(ranking: Ranking, row: int, candidates: list[int], scores: list[float], atol: float = 1e-5) -> None:
    """The same scores, and the same order wherever scores differ by more than rounding."""
    expected = dict(zip(candidates, scores, strict=True))
    assert set(ranking.positions[row]) <= set(candidates)
    np.testing.assert_allclose([expected[p] for p in ranking.positions[row]], ranking.scores[row], atol=atol)
    np.testing.assert_allclose(ranking.scores[row], sorted(scores, reverse=True)[: len(ranking.scores[row])], atol=atol)


@pytest.mark.parametrize("n", [1, 3, 12, 99])
def test_query_expansion(found: Candidates, n: int) -> None:
    result = descriptors.QueryExpansion(n=n, alpha=2.0)(found)
    gallery = found.index.get(found.index.ids).astype(float)
    for row, query in enumerate(found.queries.vectors.astype(float)):
        total = query.copy()
        for position in by_likeness(gallery, query)[:n]:
            total += max(gallery[position] @ query, 0) ** 2 * gallery[position]
        check(result.ranking, row, list(range(ROWS)), list(gallery @ (total / np.linalg.norm(total))))
        np.testing.assert_allclose(result.queries.vectors[row], total / np.linalg.norm(total), atol=1e-5)


@pytest.mark.parametrize("n", [0, 2, 99])
def test_gallery_augmentation(found: Candidates, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "BLOCK", 16)
    monkeypatch.setattr(descriptors, "PROGRESS_ABOVE", 10)
    result = descriptors.GalleryAugmentation(n=n, alpha=3.0)(found)
    gallery = found.index.get(found.index.ids).astype(float)
    augmented = []
    for vector in gallery:
        total = sum(max(gallery[p] @ vector, 0) ** 3 * gallery[p] for p in by_likeness(gallery, vector)[: n + 1])
        augmented.append(total / np.linalg.norm(total))
    for row, query in enumerate(found.queries.vectors.astype(float)):
        check(result.ranking, row, list(range(ROWS)), list(np.array(augmented) @ query))
    assert np.array_equal(found.index.get(found.index.ids), unit(ROWS, 0)), "the index it started from is unchanged"
    np.testing.assert_allclose(result.index.get(result.index.ids), augmented, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "k1", "k2", "weight"), [(60, 10, 4, 0.3), (20, 6, 1, 0.0), (8, 20, 6, 1.0), (999, 5, 3, 0.5)]
)
def test_k_reciprocal(found: Candidates, depth: int, k1: int, k2: int, weight: float) -> None:
    result = descriptors.KReciprocal(depth, k1, k2, weight)(found)
    for row, query in enumerate(found.queries.vectors):
        candidates = by_likeness(found.index.get(found.index.ids), query)[:depth]
        items = np.concatenate([query[None], found.index.get(found.index.ids)[candidates]]).astype(float)
        size = len(items)
        similarity = items @ items.T
        order = [sorted(range(size), key=lambda j, i=i: (j != i, -similarity[i, j])) for i in range(size)]

        def mutual(i: int, k: int, order: list[list[int]] = order) -> set[int]:
            return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

        encodings = []
        for i in range(size):
            wide = set(mutual(i, k1))
            for j in mutual(i, k1):
                half = mutual(j, round(k1 / 2))
                if len(half & mutual(i, k1)) >= 2 / 3 * len(half):
                    wide |= half
            values = {j: math.exp(similarity[i, j] - 1) if j != i else 1.0 for j in wide}
            encodings.append(np.array([values.get(j, 0) / sum(values.values()) for j in range(size)]))
        averaged = [np.mean([encodings[j] for j in order[i][:k2]], axis=0) for i in range(size)]
        scores = []
        for i in range(1, size):
            shared = sum(min(a, b) for a, b in zip(averaged[0], averaged[i], strict=True))
            either = sum(max(a, b) for a, b in zip(averaged[0], averaged[i], strict=True))
            scores.append(-((1 - weight) * (1 - shared / either) + weight * (1 - similarity[0, i])))
        check(result.ranking, row, candidates, scores)


@pytest.mark.parametrize(("depth", "k", "seeds"), [(60, 10, 3), (15, 4, 1), (5, 99, 99)])
def test_diffusion(found: Candidates, depth: int, k: int, seeds: int) -> None:
    """The solution of the linear system is the limit of spreading: f = alpha S f + y, again and again."""
    result = descriptors.Diffusion(depth, k, seeds, alpha=0.8, gamma=3.0)(found)
    for row, query in enumerate(found.queries.vectors.astype(float)):
        candidates = by_likeness(found.index.get(found.index.ids), query)[:depth]
        items = found.index.get(found.index.ids)[candidates].astype(float)
        near = [[j for j in by_likeness(items, item) if j != i][:k] for i, item in enumerate(items)]
        affinity = np.zeros((len(items), len(items)))
        for i in range(len(items)):
            for j in near[i]:
                if i in near[j]:
                    affinity[i, j] = max(items[i] @ items[j], 0) ** 3
        degree = affinity.sum(1)
        start = np.array([max(item @ query, 0) ** 3 if rank < seeds else 0 for rank, item in enumerate(items)])
        flow = start.copy()
        for _ in range(400):
            spread = [
                sum(affinity[i, j] / math.sqrt(degree[i] * degree[j]) * flow[j] for j in np.flatnonzero(affinity[i]))
                for i in range(len(items))
            ]
            flow = 0.8 * np.array(spread) + start
        check(result.ranking, row, candidates, list(flow), atol=1e-4)


@pytest.mark.parametrize(("depth", "k"), [(60, 9), (20, 3), (4, 9)])
def test_superglobal(found: Candidates, depth: int, k: int) -> None:
    result = descriptors.SuperGlobal(depth, k, beta=0.15)(found)
    for row, query in enumerate(found.queries.vectors.astype(float)):
        candidates = by_likeness(found.index.get(found.index.ids), query)[:depth]
        items = found.index.get(found.index.ids)[candidates].astype(float)
        refined = []
        for i, item in enumerate(items):
            total, weight = item.copy(), 1.0
            for j in [j for j in by_likeness(items, item) if j != i][:k]:
                total += 0.15 * (item @ items[j]) * items[j]
                weight += 0.15 * (item @ items[j])
            refined.append(total / weight)
        first = [vector @ query for vector in refined]
        best = sorted(range(len(items)), key=lambda i: -first[i])[: k + 1]
        largest = [max(refined[i][d] for i in best) for d in range(DIMS)]
        check(result.ranking, row, candidates, [(f + vector @ largest) / 2 for f, vector in zip(first, refined, strict=True)])


STEPS = [
    descriptors.QueryExpansion(3, 3.0),
    descriptors.GalleryAugmentation(3, 3.0),
    descriptors.KReciprocal(30, 10, 3, 0.3),
    descriptors.Diffusion(30, 10, 3, 0.9, 3.0),
    descriptors.SuperGlobal(30, 5, 0.15),
]


@pytest.mark.parametrize("step", STEPS)
def test_a_querys_answer_does_not_depend_on_the_others(found: Candidates, step) -> None:
    together = step(found).ranking
    for row in range(QUERIES):
        query = Features(found.queries.vectors[row : row + 1], found.queries.ids[row : row + 1])
        alone = step(Candidates(found.index.search(query.vectors, query.ids, 7), query, found.index)).ranking
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)
        assert list(alone.positions[0]) == list(together.positions[row])


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("second", STEPS)
def test_steps_follow_each_other(found: Candidates, first, second) -> None:
    assert second(first(found)).ranking.positions.shape[1] >= 7


@pytest.mark.parametrize("step", STEPS)
def test_duplicates_and_a_gallery_smaller_than_the_depth(step) -> None:
    """Ten times the same picture and one other: nothing divides by zero, nothing is lost."""
    vectors = np.concatenate([np.repeat(unit(1, 0), 10, axis=0), unit(1, 5)])
    index = ExactIndex(device="cpu", first_pass="float32").fit(vectors, tuple("abcdefghijk"))
    queries = Features(unit(1, 0), ("q",))
    ranking = step(Candidates(index.search(queries.vectors, queries.ids, 11), queries, index)).ranking
    assert np.isfinite(ranking.scores).all()
    assert ranking.answers(0)[-1] == "k"


@pytest.mark.parametrize("step", STEPS)
def test_vectors_of_any_length_are_compared_by_their_direction(step) -> None:
    """As BAFE's code leaves them: z-scored, of lengths around 30, searched by L2. Six products, ten pictures each."""
    rng = np.random.default_rng(0)
    product = np.repeat(np.arange(6), 10)

    def pictures(products: np.ndarray) -> np.ndarray:
        directions = np.eye(DIMS)[products] + 0.1 * rng.normal(size=(len(products), DIMS))
        return (directions * rng.uniform(25, 35, size=(len(products), 1))).astype(np.float32)

    index = ExactIndex("l2", device="cpu").fit(pictures(product), tuple(map(str, range(60))))
    queries = Features(pictures(np.arange(6)), tuple("abcdef"), any_length=True)
    found = Candidates(index.search(queries.vectors, queries.ids, 7), queries, index)
    for result in (found, step(found)):
        assert (product[result.ranking.positions[:, :7]] == np.arange(6)[:, None]).all()

    larger = ExactIndex("l2", device="cpu").fit(1024 * index.get(index.ids), index.ids)
    longer = Features(1024 * queries.vectors, queries.ids, any_length=True)
    scaled = step(Candidates(larger.search(longer.vectors, longer.ids, 7), longer, larger)).ranking
    assert np.array_equal(scaled.positions, step(found).ranking.positions), "units of length do not matter"


def test_every_step_states_its_depth(found: Candidates) -> None:
    """Asked for that many answers at once, a step does not search a second time."""
    assert [step.depth for step in STEPS] == [3, 0, 30, 30, 30]
    for step in STEPS:
        deep = replace(found, ranking=found.index.search(found.queries.vectors, found.queries.ids, max(step.depth, 7)))
        assert with_depth(deep, step.depth) is deep
        assert np.array_equal(step(deep).ranking.positions[:, :7], step(found).ranking.positions[:, :7])
