"""Probabilities on data whose truth is known, and what a gallery learns once and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.index.ranking import Evidence, Ranking
from beauty_bafe.retrieval.calibration import RIDGE, SHORTLIST, Calibration
from beauty_bafe.retrieval.submission import write_answers

K, LIFT = SHORTLIST, 3.0


def fit(single: np.ndarray, right: np.ndarray) -> Calibration:
    return Calibration.fit(Evidence.of(single), right)


def sure_of(calibration: Calibration, single: np.ndarray) -> np.ndarray:
    return calibration.probabilities(Evidence.of(single))


def draw(queries: int, seed: int, known: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scores of K answers, normal with deviation 1 around 0, and around LIFT for the right one; sorted, float (Q, K, 1).

    Each query's picture raises or lowers all of its scores.
    """
    rng = np.random.default_rng(seed)
    right = np.zeros((queries, K), bool)
    right[:, 0] = known
    scores = rng.normal(size=(queries, K)) + LIFT * right + 10 * rng.normal(size=(queries, 1))
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(scores, order, axis=1)[..., None], np.take_along_axis(right, order, axis=1)


def test_bayes_rule_is_found_again() -> None:
    """Half of the queries known, P(i) = exp(LIFT s_i) / (K exp(LIFT^2 / 2) + sum_j exp(LIFT s_j))."""
    fitted = fit(*draw(20_000, 0))
    assert fitted.scales[0] == pytest.approx(LIFT, rel=0.15)
    assert fitted.unknown == pytest.approx(np.log(K) + LIFT**2 / 2, rel=0.15)
    scores = np.concatenate([draw(5000, 1)[0], draw(5000, 2, known=False)[0]])
    right = np.concatenate([draw(5000, 1)[1], draw(5000, 2, known=False)[1]])
    sure = sure_of(fitted, scores)[:, 0]
    for low in np.arange(0, 1, 0.2):
        part = (sure >= low) & (sure < low + 0.2)
        assert abs(sure[part].mean() - right[part, 0].mean()) < 0.05


def test_so_many_strangers_pass_for_known() -> None:
    fitted = fit(*draw(5000, 0))
    strangers = sure_of(fitted, draw(20_000, 3, known=False)[0][:, : K - 1])[:, 0]
    for rate in (0.01, 0.1, 0.5):
        assert (strangers > fitted.threshold(rate)).mean() == pytest.approx(rate, abs=0.35 * rate)
    for rate in (0, 0.0001, 0.01, 0.0101, 0.5, 0.9996):
        passing = [int((np.array(fitted.strangers) >= fitted.threshold(other)).sum()) for other in (rate, rate + 1 / 5000)]
        assert passing == [int(rate * 5000), int(rate * 5000) + 1], "the most that may, not one more"
    assert fitted.threshold(1) == 0
    with pytest.raises(ValueError, match=r"known_at=1.5: type the share of unknown products to accept as known, from 0"):
        fitted.threshold(1.5)


def test_probabilities_fall_along_a_row_and_leave_room_for_none() -> None:
    fitted = fit(*draw(500, 0))
    scores = -np.sort(-np.random.default_rng(1).normal(size=(50, SHORTLIST + 30, 1)), axis=1)
    sure = sure_of(fitted, scores)
    assert sure.dtype == np.float32
    assert (np.diff(sure, axis=1) <= 0).all()
    assert (sure[:, :SHORTLIST].sum(axis=1) < 1).all()
    np.testing.assert_array_equal(sure[:, :SHORTLIST], sure_of(fitted, scores[:, :SHORTLIST]), "more answers change none")
    huge = sure_of(fitted, 1e6 * scores)
    assert np.isfinite(huge).all()


def test_separable_queries_are_not_believed_for_ever() -> None:
    scores = np.tile([10.0, 1.0, 0.0], (8, 1))[..., None]
    right = np.tile([True, False, False], (8, 1))
    fitted = fit(scores, right)
    assert 0.8 < sure_of(fitted, scores)[0, 0] < 0.95, "eight queries"
    assert sure_of(fitted, scores[:, 1:])[0, 0] < 0.2
    lost = fit(scores, np.zeros_like(right))
    assert sure_of(lost, scores).max() < 0.2, "where nothing is ever found, nothing is likely to be right"


def test_scores_of_any_scale_give_the_same_probabilities() -> None:
    scores, right = draw(1000, 0)
    sure = [sure_of(fit(factor * scores, right), factor * scores) for factor in (1, 1e-4, 1e3)]
    np.testing.assert_allclose(sure[1], sure[0], atol=2e-3)
    np.testing.assert_allclose(sure[2], sure[0], atol=2e-3)


def test_it_survives_a_file() -> None:
    fitted = fit(*draw(100, 0))
    assert Calibration.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_further_evidence_has_a_scale_of_its_own() -> None:
    """Two independent measurements, and noise: each gets the scale that Bayes' rule gives it, whatever its unit."""
    scores, right = draw(20_000, 0)
    rng = np.random.default_rng(4)
    second = rng.normal(size=right.shape) + 2 * right
    evidence = np.concatenate([scores, 5 * second[..., None], rng.normal(size=(*right.shape, 1))], axis=-1)
    fitted = fit(evidence, right)
    similarity, informative, noise, lead = fitted.scales
    assert (informative, noise) == pytest.approx((2 / 5, 0), rel=0.15, abs=0.05)
    assert similarity + lead == pytest.approx(LIFT, rel=0.15), "both rise with the similarity"
    assert fitted.unknown == pytest.approx(np.log(K) + (LIFT**2 + 2**2) / 2, rel=0.15)
    misleading = np.concatenate([scores, -second[..., None]], axis=-1)
    assert fit(misleading, right).scales[1] == 0


@pytest.mark.parametrize("same", [0.0, -1.0, 8.0, -1e6])
def test_evidence_that_never_differs_changes_nothing(same: float) -> None:
    scores, right = draw(300, 0)
    alone = fit(scores, right)
    both = fit(np.concatenate([scores, np.full_like(scores, same)], axis=-1), right)
    assert both.scales == pytest.approx((alone.scales[0], 0, alone.scales[1]), rel=1e-4)
    assert both.unknown == pytest.approx(alone.unknown, rel=1e-4)
    nearly = np.full_like(scores, same)
    nearly[0, 0] += 1
    assert fit(np.concatenate([scores, nearly], axis=-1), right).scales[0] == pytest.approx(alone.scales[0], rel=0.05)
    nothing = fit(np.full_like(scores, same), right)
    assert sure_of(nothing, np.full_like(scores, same)) == pytest.approx(0.5 / K, rel=0.2)


@pytest.mark.parametrize(("kinds", "pairs"), [(1, 0), (3, 0), (2, 2)])
def test_the_likelihood_is_highest(kinds: int, pairs: int) -> None:
    """Against a slow twin that maximises it step by step. Minima are taken over the answers that remain."""
    scores, right = draw(80, 5)
    rng = np.random.default_rng(6)
    single = np.concatenate([scores, 3 + rng.normal(size=(80, K, kinds - 1)) + right[..., None]], axis=-1)
    pairwise = rng.normal(size=(80, K, K, pairs)) + 0.5 * right[:, :, None, None] - 0.5 * right[:, None, :, None]
    pairwise[rng.random((80, K, K)) < 0.5] = np.nan
    pairwise[:, range(K), range(K)] = -100.0  # of an answer and itself: not used
    pairwise[:, 7] = np.nan  # nothing on one of the answers
    fitted = Calibration.fit(Evidence(single, pairwise), right)

    def features(query: int, rows: list[int]) -> np.ndarray:
        seen = []
        for row in rows:
            others = [other for other in rows if other != row]
            lead = min(single[query, row, 0] - single[query, other, 0] for other in others)
            numbers = [single[query, row, 0] - np.median(single[query, rows, 0]), *single[query, row, 1:], lead]
            for kind in range(pairs):
                found = [value for value in pairwise[query, row, others, kind] if not np.isnan(value)]
                numbers.append(min(found, default=0.0))
            seen.append(numbers)
        return np.array(seen)

    every = np.stack([features(query, list(range(K))) for query in range(80)])
    spread = every.std(axis=(0, 1))

    def loss(values: np.ndarray) -> float:
        total, doubt = 0.0, 1 / 82
        for query in range(80):
            for known in (True, False):
                rows = [row for row in range(K) if known or not right[query, row]]
                own = [rows.index(int(right[query].argmax()))] if known else [0]
                seen = features(query, rows)
                logits = [*(seen @ values[:-1]), values[-1]]
                sure = np.log(np.exp(logits) / np.sum(np.exp(logits)))
                weight = 1 - doubt if known else doubt
                total -= (weight * sure[own[0]] + (1 - weight) * sure[-1]) / 80
        return total + RIDGE * float(((values[1:-1] * spread[1:]) ** 2).sum())

    best = np.array([*fitted.scales, fitted.unknown])
    assert len(best) == kinds + 1 + pairs + 1
    assert (best[-1 - pairs : -1] > 0.1).all()
    for number in range(len(best)):
        for step in (-0.02, 0.02):
            other = best.copy()
            other[number] += step
            assert (number < len(best) - 1 and other[number] < 0) or loss(other) > loss(best)


def test_a_later_answer_is_never_more_probable() -> None:
    """The order may come from evidence that probabilities do not use."""
    sure = sure_of(Calibration((1.0, 1.0), 0.0, ()), np.array([[[0.5, 1.0], [0.5, 3.0], [0.5, 0.0]]]))
    expected = np.exp([1.0, 3.0, 0.0]) / (1 + np.exp([1.0, 3.0, 0.0]).sum())
    np.testing.assert_allclose(sure[0], [expected[0], expected[0], expected[2]], rtol=1e-6)


def test_a_file_of_an_earlier_version_is_read() -> None:
    old = {"scale": 4.0, "unknown": 2.0, "strangers": [0.1]}
    assert Calibration.from_dict(old) == Calibration((4.0,), 2.0, (0.1,))
    scores = np.array([[3.0, 1.0, 0.0]])[..., None]
    before = np.exp(4 * (scores[0, :, 0] - 1))
    np.testing.assert_allclose(sure_of(Calibration.from_dict(old), scores)[0], before / (np.exp(2) + before.sum()), rtol=1e-6)


def test_the_lead_is_the_margin_over_the_most_similar_other_answer() -> None:
    """With a scale for it alone; answers beyond SHORTLIST are compared with the first SHORTLIST."""
    led = Calibration((0.0, 1.0), 0.0, ())
    scores = np.array([[5.0, 4.0, 4.0, *np.zeros(SHORTLIST)]])[..., None]
    leads = np.exp([1.0, -1.0, -1.0, *np.full(SHORTLIST, -5.0)])
    np.testing.assert_allclose(sure_of(led, scores)[0], leads / (1 + leads[:SHORTLIST].sum()), rtol=1e-6)
    np.testing.assert_allclose(sure_of(led, scores[:, 1:3])[0], [1 / 3, 1 / 3], rtol=1e-6)
    assert sure_of(led, scores[:, :1])[0] == pytest.approx(0.5), "no other answer, no lead"


def test_only_the_first_answers_are_rivals() -> None:
    pairwise = np.zeros((1, SHORTLIST + 5, SHORTLIST + 5, 1))
    pairwise[0, 0, SHORTLIST - 1], pairwise[0, :, SHORTLIST:] = -2.0, -9.0
    by_rivals = Calibration((0.0, 0.0, 1.0), 0.0, ())
    sure = by_rivals.probabilities(Evidence(np.zeros((1, SHORTLIST + 5, 1)), pairwise))[0]
    assert sure[0] == pytest.approx(np.exp(-2) / (1 + np.exp(-2) + SHORTLIST - 1))


def test_scales_of_other_evidence_are_refused() -> None:
    evidence = Evidence(np.zeros((1, 3, 2)), np.zeros((1, 3, 3, 2)))
    for scales in (2, 5):
        assert np.isfinite(Calibration((1.0,) * scales, 0.0, ()).probabilities(evidence)).all()
    for scales in (1, 3, 4, 6):
        with pytest.raises(ValueError, match=f"{scales} scales do not fit 5 numbers for each answer; calibrate again"):
            Calibration((1.0,) * scales, 0.0, ()).probabilities(evidence)


def test_a_rival_that_is_removed_no_longer_counts() -> None:
    rivalry = np.full((1, 3, 3, 1), np.nan)
    rivalry[0, 0, 1:, 0], rivalry[0, 1, 2, 0] = (-2.0, 3.0), 1.0
    evidence = Evidence(np.zeros((1, 3, 1)), rivalry)
    by_rivals = Calibration((0.0, 0.0, 1.0), 0.0, ())

    def of(answers: list[int]) -> np.ndarray:
        return by_rivals.probabilities(evidence.pick(np.array([answers])))[0]

    for answers, lowest in ([0, 1, 2], [-2.0, 1.0, 0.0]), ([0, 2], [3.0, 0.0]), ([2, 1, 0], [0.0, 1.0, -2.0]):
        expected = np.exp(lowest)
        np.testing.assert_allclose(of(answers), np.minimum.accumulate(expected / (1 + expected.sum())), rtol=1e-6)


@pytest.mark.parametrize(("shape", "right"), [((0, 5, 1), (0, 5)), ((3, 1, 1), (3, 1)), ((3, 3, 1), (3, 2))])
def test_what_cannot_be_learned_from(shape: tuple[int, ...], right: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="calibration needs queries with two answers or more"):
        fit(np.zeros(shape), np.zeros(right, bool))


def test_the_file_of_answers(tmp_path: Path) -> None:
    positions, scores = np.array([[1, 0], [0, 1]]), np.array([[0.9, 0.5], [0.4, 0.1]])
    sure = np.array([[0.8, 0.1], [0.2, 0.05]], np.float32)
    write_answers(Ranking(("q", 'a "b"'), ("x", "y"), positions, scores, sure), tmp_path / "answers.csv", 0.5)
    assert (tmp_path / "answers.csv").read_text().splitlines() == [
        "query,rank,id,score,probability,known",
        "q,1,y,0.9,0.8000,yes",
        "q,2,x,0.5,0.1000,yes",
        '"a ""b""",1,x,0.4,0.2000,no',
        '"a ""b""",2,y,0.1,0.0500,no',
    ]
    write_answers(Ranking(("q",), ("x", "y"), positions[:1], scores[:1]), tmp_path / "answers.csv", None)
    assert (tmp_path / "answers.csv").read_text().splitlines()[1] == "q,1,y,0.9,,"
