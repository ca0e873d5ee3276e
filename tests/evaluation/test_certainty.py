"""Known products against unknown ones: the measures of probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from beauty_bafe.evaluation.certainty import Certainty
from beauty_bafe.index.ranking import Evidence, Ranking
from beauty_bafe.retrieval.calibration import Calibration

CALIBRATION = Calibration(scales=(4.0,), unknown=2.0, strangers=(0.1, 0.2, 0.5))


def shortlist(queries: int = 40, answers: int = 8) -> tuple[Ranking, dict[str, set[str]]]:
    """Query i shows product `p{i % answers}`, which stands anywhere in its answers, or nowhere (every fifth)."""
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.random((queries, answers)), axis=1)
    positions = np.array([rng.permutation(answers) for _ in range(queries)])
    names = tuple(f"q{row}" for row in range(queries))
    truth = {name: {f"p{row % answers}" if row % 5 else "gone"} for row, name in enumerate(names)}
    return Ranking(names, tuple(f"p{row}" for row in range(answers)), positions, scores), truth


def test_the_true_product_is_taken_out() -> None:
    ranking, truth = shortlist()
    certainty = Certainty.from_ranking(ranking, truth, CALIBRATION, 0.5)
    assert certainty is not None
    for row, query in enumerate(ranking.query_ids):
        answers, scores = ranking.answers(row), list(ranking.scores[row])
        true = next(iter(truth[query]))
        place = answers.index(true) if true in answers else len(answers) - 1
        del scores[place]
        left = Evidence.of(np.array([scores])[..., None])
        assert certainty.unknown[row] == pytest.approx(CALIBRATION.probabilities(left)[0, 0])
        own = Evidence.of(ranking.scores[row : row + 1, :, None])
        assert certainty.known[row] == pytest.approx(CALIBRATION.probabilities(own)[0, 0])
        assert certainty.right[row] == (answers[0] == true)
    rng = np.random.default_rng(2)
    single = np.concatenate([ranking.scores[..., None], rng.random((40, 8, 1))], axis=-1)
    evidence = Evidence(single, rng.random((40, 8, 8, 2)))
    both = Calibration((4.0, 3.0, 2.0, 1.0, 1.0), 2.0, ())
    more = Certainty.from_ranking(replace(ranking, evidence=evidence), truth, both, 0.5)
    assert more is not None
    np.testing.assert_allclose(more.known, both.probabilities(evidence)[:, 0])
    assert not np.allclose(more.known, certainty.known)
    for row, query in enumerate(ranking.query_ids):
        answers = ranking.answers(row)
        kept = [place for place, answer in enumerate(answers) if answer not in truth[query]][:7]
        own = Evidence(single[row : row + 1, kept], evidence.pairwise[row : row + 1, kept][:, :, kept])
        assert more.unknown[row] == pytest.approx(both.probabilities(own)[0, 0])
    del truth["q3"]
    truth["q4"] = set(ranking.gallery_ids)
    fewer = Certainty.from_ranking(ranking, truth, CALIBRATION, 0.5)
    assert fewer is not None
    others = [row for row in range(40) if row not in (3, 4)]
    np.testing.assert_array_equal(fewer.known, certainty.known[others], "unknown to truth; nothing left without the product")
    np.testing.assert_array_equal(fewer.unknown, certainty.unknown[others])
    assert Certainty.from_ranking(ranking, {"q4": truth["q4"]}, CALIBRATION, 0.5) is None


def test_measures_against_slow_twins() -> None:
    rng = np.random.default_rng(1)
    known, unknown = rng.random(60).round(1), (0.8 * rng.random(60)).round(1)
    right = rng.random(60) < 0.95
    certainty = Certainty(known, right, unknown, 0.5)
    found = certainty.summary()
    wins = [1.0 if own > other else 0.5 if own == other else 0.0 for own in known for other in unknown]
    assert found["auroc"] == pytest.approx(np.mean(wins))
    sure, true = np.concatenate([known, unknown]), np.concatenate([right, np.zeros(60, bool)])
    error = 0.0
    for low in range(10):
        part = (sure >= low / 10) & ((sure < (low + 1) / 10) | ((low == 9) & (sure == 1)))
        error += abs(sure[part].sum() - true[part].sum()) / 120
    assert found["calibration_error"] == pytest.approx(error)
    assert found["false_acceptance"] == (unknown >= 0.5).mean()
    assert found["recognised"] == (known >= 0.5).mean()
    threshold = max(value for value in known if (known[right] >= value).sum() >= 54)
    assert found["precision_at_90"] == pytest.approx(true[sure >= threshold].mean())
    for name in ("auroc", "calibration_error", "precision_at_90"):
        low, high = found[f"{name}_interval"]
        assert 0 <= low < high <= 1


def test_probabilities_that_are_true_have_no_error() -> None:
    rng = np.random.default_rng(0)
    known = rng.random(20_000)
    honest = Certainty(known, rng.random(20_000) < known, np.zeros(20_000), 0.5)
    assert honest._calibration_error(np.arange(20_000)) < 0.01
    for sure, right, count in honest.bins():
        assert right == pytest.approx(sure, abs=0.05)
        assert count > 500
    boastful = Certainty(known, rng.random(20_000) < known / 2, np.zeros(20_000), 0.5)
    assert boastful._calibration_error(np.arange(20_000)) > 0.1


def test_a_recall_that_is_not_reached_has_no_precision() -> None:
    certainty = Certainty(np.full(10, 0.5), np.arange(10) < 8, np.full(10, 0.1), 0.5)
    summary = certainty.summary()
    assert summary["precision_at_90"] is None
    assert summary["precision_at_90_interval"] is None
