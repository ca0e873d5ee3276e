"""Ensembles and rankings, against slow, obvious twins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.extraction.features import Features
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.ranking import Evidence, Ranking
from beauty_bafe.retrieval.ensemble import Concatenation, Fusion

from .conftest import unit


def features(rows: int, dims: int, seed: int) -> Features:
    vectors = np.random.default_rng(seed).normal(size=(rows, dims)).astype(np.float32)
    return Features(vectors, tuple(f"{seed}-{row}" for row in range(rows)), any_length=True)


def named(features: Features, like: Features) -> Features:
    return Features(features.vectors, like.ids, any_length=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_ensemble_says_whether_its_vectors_have_length_1(normalize: bool) -> None:
    gallery = features(9, 4, 0)
    result = Concatenation(True, None, normalize=normalize).fit([gallery]).transform([gallery])[0]
    assert result.any_length == (not normalize)
    assert np.allclose(np.linalg.norm(result.vectors, axis=1), 1) == normalize


@pytest.mark.parametrize("zscore", [False, True])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_concatenation_against_loops(zscore: bool, weights: list[float] | None) -> None:
    one, two = features(9, 4, 0), features(9, 6, 1)
    two = named(two, one)
    result = Concatenation(zscore, weights).fit([one, two]).transform([one, two])[0]
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
    vectors = Concatenation(False, [0.7, 0.3]).fit([one, two]).transform([one, two])[0].vectors
    cosines = [(m.vectors @ m.vectors.T) / np.outer(*[np.linalg.norm(m.vectors, axis=1)] * 2) for m in (one, two)]
    np.testing.assert_allclose(vectors @ vectors.T, 0.7 * cosines[0] + 0.3 * cosines[1], atol=1e-5)


def test_zscore_takes_the_gallerys_statistics() -> None:
    """The published code takes the queries' own: with one query that is 0 / 0."""
    gallery, query = features(20, 5, 0), features(1, 5, 1)
    ensemble = Concatenation(True, None).fit([gallery])
    alone = ensemble.transform([query])[0].vectors
    assert np.isfinite(alone).all()
    together = ensemble.transform(
        [Features(np.vstack([query.vectors, gallery.vectors]), (*query.ids, *gallery.ids), any_length=True)]
    )[0]
    np.testing.assert_allclose(together.vectors[:1], alone, atol=1e-6)


def test_a_constant_dimension_stays_finite() -> None:
    vectors = features(6, 3, 0).vectors.copy()
    vectors[:, 1] = 4
    gallery = Features(vectors, tuple("abcdef"), any_length=True)
    assert np.isfinite(Concatenation(True, None).fit([gallery]).transform([gallery])[0].vectors).all()


def test_ensemble_refuses_what_does_not_fit() -> None:
    one, two = features(4, 3, 0), features(4, 3, 1)
    with pytest.raises(ValueError, match="for 1 members; give one number"):
        Concatenation(False, [1, 2]).fit([one])
    with pytest.raises(ValueError, match="different pictures"):
        Concatenation(False, None).fit([one, two]).transform([one, two])


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_gallery_is_refused(k: int) -> None:
    index = ExactIndex(device="cpu").fit(unit(3, 4, 0), tuple("abc"))
    with pytest.raises(ValueError, match=rf"k={k}, but the gallery has 3 readable pictures; .*1 to 3"):
        index.search(unit(1, 4, 1), ("q",), k)


@pytest.mark.parametrize(
    ("positions", "scores", "message"),
    [
        ([[0, 0]], [[0.9, 0.8]], "twice"),
        ([[0, 1]], [[0.8, 0.9]], "must not increase"),
        ([[0, -1]], [[0.9, 0.8]], "must lie in 0..2"),
        ([[0, 1], [0, 1]], [[0.9, 0.8]], "do not fit 1 queries"),
        ([[0, 1]], [[np.nan, 0.8]], r"scores of query 'q' are not finite: \[nan, 0.8\]; type rerank=none"),
        ([[0, 1]], [[0.9, -np.inf]], "are not finite"),
    ],
)
def test_a_ranking_checks_itself(positions: list[list[int]], scores: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranking(("q",), tuple("abc"), np.array(positions), np.array(scores))


def test_evidence_must_fit_its_ranking() -> None:
    with pytest.raises(ValueError, match=r"pairwise evidence \(1, 3, 3, 1\) does not fit that of each answer \(1, 2, 1\)"):
        Evidence(np.zeros((1, 2, 1)), np.zeros((1, 3, 3, 1)))
    with pytest.raises(ValueError, match=r"evidence \(1, 3, 2\) does not fit positions \(1, 2\)"):
        Ranking(("q",), tuple("abc"), np.array([[0, 1]]), np.array([[0.9, 0.8]]), evidence=Evidence.of(np.zeros((1, 3, 2))))


@pytest.mark.parametrize("whiten", [False, True])
def test_pca_against_the_covariance(whiten: bool) -> None:
    rng = np.random.default_rng(0)
    mixed = (rng.normal(size=(400, 12)) * np.linspace(3, 0.1, 12)) @ rng.normal(size=(12, 12)) + 2
    gallery = Features(mixed.astype(np.float32), tuple(map(str, range(400))), any_length=True)
    (result,) = Concatenation(False, None, pca=5, whiten=whiten).fit([gallery]).transform([gallery])
    rows = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    values, axes = np.linalg.eigh(np.cov(rows.T))
    kept = (rows - rows.mean(0)) @ axes[:, ::-1][:, :5]
    kept = kept / np.sqrt(values[::-1][:5]) if whiten else kept
    expected = kept / np.linalg.norm(kept, axis=1, keepdims=True)
    np.testing.assert_allclose(result.vectors @ result.vectors.T, expected @ expected.T, atol=2e-3)


def test_more_pca_dimensions_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"ensemble.pca=9 of 6 dimensions and 20 gallery pictures; .* from 1 to 6"):
        Concatenation(False, None, pca=9).fit([features(20, 6, 0)])


@pytest.mark.parametrize("ensemble", [Concatenation(True, [2, 1], pca=3, whiten=True), Concatenation(True, None)])
def test_one_query_a_year_later_is_treated_as_today(ensemble: Concatenation, tmp_path: Path) -> None:
    one, two = features(30, 4, 0), features(30, 6, 1)
    today = ensemble.fit([one, named(two, one)]).transform([one, named(two, one)])[0]
    ensemble.save(tmp_path)
    later = Concatenation(ensemble.zscore, ensemble.weights, ensemble.pca, ensemble.whiten).load(tmp_path)
    row = [Features(member.vectors[7:8], ("q",), any_length=True) for member in (one, two)]
    np.testing.assert_allclose(later.transform(row)[0].vectors[0], today.vectors[7], atol=1e-6)


@pytest.mark.parametrize("method", ["score", "rank"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_fusion_against_loops(method: str, weights: list[float] | None) -> None:
    gallery = [unit(40, 8, seed) for seed in (0, 1)]
    ids = tuple(map(str, range(40)))
    rankings = [
        ExactIndex(device="cpu").fit(g, ids).search(unit(6, 8, 5 + n), tuple("abcdef"), 12) for n, g in enumerate(gallery)
    ]
    fused = Fusion(method, weights, 12).fit([features(4, 2, 0)] * 2).fuse(rankings, 7)
    for query in range(6):
        total = dict.fromkeys(set(rankings[0].positions[query]) | set(rankings[1].positions[query]), 0.0)
        for ranking, weight in zip(rankings, weights or [1, 1], strict=True):
            places, scores = list(ranking.positions[query]), ranking.scores[query].astype(float)
            for candidate in total:
                rank = places.index(candidate) if candidate in places else None
                if method == "rank":
                    total[candidate] += 0 if rank is None else weight / (61 + rank)
                else:
                    total[candidate] += weight * (scores[-1 if rank is None else rank] - scores.mean()) / scores.std()
        best = sorted(total, key=lambda candidate: (-round(total[candidate], 9), candidate))[:7]
        assert list(fused.positions[query]) == best


def test_too_short_a_ranking_says_what_to_raise() -> None:
    ranking = ExactIndex(device="cpu").fit(unit(9, 4, 0), tuple("abcdefghi")).search(unit(1, 4, 1), ("q",), 3)
    with pytest.raises(ValueError, match=r"k=7, but re-ranking or fusion kept 3 answers; raise their depth"):
        ranking.first(7)


@pytest.mark.parametrize("method", ["score", "rank"])
def test_fusion_of_too_short_rankings_says_what_to_raise(method: str) -> None:
    """Re-ranking with a depth below k leaves each member fewer answers than are wanted."""
    index = ExactIndex(device="cpu").fit(unit(9, 4, 0), tuple("abcdefghi"))
    rankings = [index.search(unit(2, 4, seed), ("p", "q"), 3) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"k=7, but re-ranking or fusion kept 3 answers; raise their depth"):
        Fusion(method, None, 100).fuse(rankings, 7)
