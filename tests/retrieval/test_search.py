"""Ensemble, index, ranking and re-ranking, each against a slow, obvious twin."""

from __future__ import annotations

import numpy as np
import pytest

from beauty_bafe.retrieval.ensemble import Concatenation
from beauty_bafe.retrieval.features import Features
from beauty_bafe.retrieval.index import FlatIndex
from beauty_bafe.retrieval.ranking import Ranking
from beauty_bafe.retrieval.rerank import expand_queries


def features(rows: int, dims: int, seed: int) -> Features:
    vectors = np.random.default_rng(seed).normal(size=(rows, dims)).astype(np.float32)
    return Features(vectors, tuple(f"{seed}-{row}" for row in range(rows)))


def named(features: Features, like: Features) -> Features:
    return Features(features.vectors, like.ids)


@pytest.mark.parametrize("zscore", [False, True])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_concatenation_against_loops(zscore: bool, weights: list[float] | None) -> None:
    one, two = features(9, 4, 0), features(9, 6, 1)
    two = named(two, one)
    result = Concatenation(zscore, weights).fit([one, two]).transform([one, two])
    for row in range(9):
        parts = []
        for member, weight in zip((one, two), weights or [1, 1], strict=True):
            vector = member.vectors[row].astype(float)
            if zscore:
                vector = (vector - member.vectors.mean(0)) / member.vectors.std(0)
            parts.append(vector / np.linalg.norm(vector) * weight**0.5)
        expected = np.concatenate(parts)
        np.testing.assert_allclose(result.vectors[row], expected / np.linalg.norm(expected), atol=1e-5)


def test_a_weight_is_a_share_of_the_score() -> None:
    one, two = features(5, 4, 0), features(5, 4, 1)
    two = named(two, one)
    vectors = Concatenation(False, [0.7, 0.3]).fit([one, two]).transform([one, two]).vectors
    cosines = [(m.vectors @ m.vectors.T) / np.outer(*[np.linalg.norm(m.vectors, axis=1)] * 2) for m in (one, two)]
    np.testing.assert_allclose(vectors @ vectors.T, 0.7 * cosines[0] + 0.3 * cosines[1], atol=1e-5)


def test_zscore_takes_the_gallerys_statistics() -> None:
    """The published code takes the queries' own: with one query that is 0 / 0."""
    gallery, query = features(20, 5, 0), features(1, 5, 1)
    ensemble = Concatenation(True, None).fit([gallery])
    alone = ensemble.transform([query]).vectors
    assert np.isfinite(alone).all()
    together = ensemble.transform([Features(np.vstack([query.vectors, gallery.vectors]), (*query.ids, *gallery.ids))])
    np.testing.assert_allclose(together.vectors[:1], alone, atol=1e-6)


def test_a_constant_dimension_stays_finite() -> None:
    vectors = features(6, 3, 0).vectors.copy()
    vectors[:, 1] = 4
    gallery = Features(vectors, tuple("abcdef"))
    assert np.isfinite(Concatenation(True, None).fit([gallery]).transform([gallery]).vectors).all()


def test_ensemble_refuses_what_does_not_fit() -> None:
    one, two = features(4, 3, 0), features(4, 3, 1)
    with pytest.raises(ValueError, match="for 1 checkpoints; give one number"):
        Concatenation(False, [1, 2]).fit([one])
    with pytest.raises(ValueError, match="different pictures"):
        Concatenation(False, None).fit([one, two]).transform([one, two])


def unit(rows: int, dims: int, seed: int) -> np.ndarray:
    vectors = features(rows, dims, seed).vectors
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_flat_index_is_exact() -> None:
    gallery, queries = unit(300, 16, 0), unit(20, 16, 1)
    ranking = FlatIndex("cpu").fit(gallery, tuple(map(str, range(300)))).search(queries, tuple("abcdefghijklmnopqrst"), 7)
    scores = queries.astype(float) @ gallery.T.astype(float)
    assert np.array_equal(ranking.positions, np.argsort(-scores, axis=1)[:, :7])
    np.testing.assert_allclose(ranking.scores, -np.sort(-scores, axis=1)[:, :7], atol=1e-5)


def test_equal_scores_keep_the_gallerys_order() -> None:
    gallery = np.repeat(unit(1, 8, 0), 5, axis=0)
    ranking = FlatIndex("cpu").fit(gallery, tuple("abcde")).search(gallery[:1], ("q",), 5)
    assert ranking.answers(0) == list("abcde")


@pytest.mark.parametrize(("device", "message"), [("gpu", "faiss sees no GPU here"), ("cuda", "type auto, cpu or gpu")])
def test_a_gpu_that_is_not_there_is_refused(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    with pytest.raises(ValueError, match=message):
        FlatIndex(device)


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_gallery_is_refused(k: int) -> None:
    index = FlatIndex("cpu").fit(unit(3, 4, 0), tuple("abc"))
    with pytest.raises(ValueError, match=rf"k={k}, but the gallery has 3 readable pictures; .*1 to 3"):
        index.search(unit(1, 4, 1), ("q",), k)


@pytest.mark.parametrize(
    ("positions", "scores", "message"),
    [
        ([[0, 0]], [[0.9, 0.8]], "twice"),
        ([[0, 1]], [[0.8, 0.9]], "must not rise"),
        ([[0, -1]], [[0.9, 0.8]], "must lie in 0..2"),
        ([[0, 1], [0, 1]], [[0.9, 0.8]], "do not fit 1 queries"),
    ],
)
def test_a_ranking_checks_itself(positions: list[list[int]], scores: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranking(("q",), tuple("abc"), np.array(positions), np.array(scores))


@pytest.mark.parametrize("n", [1, 3, 12, 99])
def test_query_expansion_against_loops(n: int) -> None:
    gallery = Features(unit(40, 6, 0), tuple(map(str, range(40))))
    queries = Features(unit(5, 6, 1), tuple("abcde"))
    index = FlatIndex("cpu").fit(gallery.vectors, gallery.ids)
    result = expand_queries(index.search(queries.vectors, queries.ids, 7), queries, gallery, index, n=n, alpha=2.0)
    for row in range(5):
        query = queries.vectors[row].astype(float)
        scores = gallery.vectors @ query
        total = query.copy()
        for position in np.argsort(-scores)[:n]:
            total += max(scores[position], 0) ** 2 * gallery.vectors[position]
        expected = gallery.vectors @ (total / np.linalg.norm(total))
        np.testing.assert_allclose(result.scores[row], np.sort(expected)[::-1][:7], atol=1e-5)
        assert set(result.positions[row]) == set(np.argsort(-expected)[:7])
