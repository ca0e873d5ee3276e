from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.evaluation.metrics import DIVISIONS, average_precision, evaluate, read_truth


def slow_ap(answers: list[str], matches: set[str], k: int, division: str) -> float:
    relevant = [answers[i] in matches for i in range(min(k, len(answers)))]
    total = sum(sum(relevant[: i + 1]) / (i + 1) for i in range(len(relevant)) if relevant[i])
    divisor = {"hits": sum(relevant), "matches": len(matches), "min": min(len(matches), k)}[division]
    return total / divisor if sum(relevant) else 0


@pytest.mark.parametrize("division", DIVISIONS)
def test_average_precision_against_its_definition(division: str) -> None:
    for answers in itertools.permutations("abcde", 4):
        for matches in ({"a"}, {"a", "c"}, {"a", "b", "c", "x", "y"}, {"z"}):
            for k in (1, 3, 7):
                assert average_precision(answers, matches, k, division) == pytest.approx(
                    slow_ap(list(answers), matches, k, division)
                )


def test_the_three_divisions_differ_where_matches_are_missed() -> None:
    answers = {"q": ["a", "x", "b"]}
    values = evaluate(answers, {"q": {"a", "b", "c", "d"}}, k=3).values
    total = 1 + 2 / 3
    assert values["mAP@3_by_hits"][0] == pytest.approx(total / 2)
    assert values["mAP@3_by_matches"][0] == pytest.approx(total / 4)
    assert values["mAP@3_by_min"][0] == pytest.approx(total / 3)
    assert values["recall@1"][0] == values["recall@3"][0] == 1


def test_unanswered_queries_count_as_zero_and_strangers_not_at_all() -> None:
    evaluation = evaluate({"q1": ["a"], "stranger": ["b"]}, {"q1": {"a"}, "q2": {"b"}}, k=1)
    summary = evaluation.summary()
    assert summary["mAP@1_by_min"] == 0.5
    assert summary["queries"] == 2
    assert evaluation.unanswered == ("q2",)


def test_interval_covers_the_mean_and_shrinks() -> None:
    rng = np.random.default_rng(0)

    def interval(count: int) -> tuple[float, float, float]:
        answers = {f"q{i}": [rng.choice(["a", "b"])] for i in range(count)}
        summary = evaluate(answers, {key: {"a"} for key in answers}, k=1).summary()
        low, high = summary["recall@1_interval"]
        return low, summary["recall@1"], high

    few, many = interval(50), interval(2000)
    assert few[0] < few[1] < few[2]
    assert many[2] - many[0] == pytest.approx(2 * 1.96 * (0.25 / 2000) ** 0.5, rel=0.1)


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(ValueError, match="no query in common: truth has q1 …, the answers r1 …"):
        evaluate({"r1": ["a"]}, {"q1": {"a"}}, k=1)


def test_truth_rows(tmp_path: Path) -> None:
    file = tmp_path / "truth.csv"
    file.write_text("query,product\nq1,a\nq1,b\nq2,c.d\n")
    assert read_truth(file) == {"q1": {"a", "b"}, "q2": {"c.d"}}


def test_the_challenges_ragged_file(tmp_path: Path) -> None:
    file = tmp_path / "val.csv"
    text = "Validation Image ID,Training Image ID\r\n1.jpg,n01.jpg,n02.jpg,n03\r\n2,n04,,,\r\n\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_truth(file) == {"1": {"n01", "n02", "n03"}, "2": {"n04"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [("query,product\nq1\n", "line 2: the query 'q1' has no answer"), ("query,product\n", "no rows below its header")],
)
def test_broken_truth(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "truth.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_truth(tmp_path / "truth.csv")
    with pytest.raises(ValueError, match="does not exist"):
        read_truth(tmp_path / "nothing.csv")


def test_median_rank_and_the_rows_behind_the_means(tmp_path: Path) -> None:
    answers = {"q1": ["a", "b"], "q2": ["x", "b"], "q3": ["x", "y"]}
    truth = {"q1": {"a"}, "q2": {"b"}, "q3": {"c"}, "q4": {"d"}}
    evaluation = evaluate(answers, truth, 2)
    assert evaluation.ranks.tolist() == [1, 2, np.inf, np.inf]
    assert evaluation.summary()["median_rank"] is None, "half of the queries have no match"
    assert evaluate(answers, {q: truth[q] for q in ("q1", "q2", "q3")}, 2).summary()["median_rank"] == 2
    evaluation.write_per_query(tmp_path / "rows.csv")
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["query"], row["rank"]) for row in rows] == [("q1", "1"), ("q2", "2"), ("q3", ""), ("q4", "")]
    assert float(rows[1]["mAP@2_by_min"]) == 0.5
