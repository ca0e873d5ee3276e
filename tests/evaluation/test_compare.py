from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.evaluation.compare import compare, main


def systems(queries: int, seed: int = 0) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, set[str]]]:
    """b has the match first where a has it second, in a third of the queries; otherwise they are equal."""
    truth = {f"q{n}": {f"m{n}"} for n in range(queries)}
    a = {query: ["x", next(iter(match))] for query, match in truth.items()}
    chosen = np.random.default_rng(seed).random(queries) < 1 / 3
    b = {query: row[::-1] if better else row for (query, row), better in zip(a.items(), chosen, strict=True)}
    return a, b, truth


def test_a_paired_difference_with_its_interval() -> None:
    a, b, truth = systems(300)
    (row,) = [row for row in compare(a, b, truth, 2) if row.metric == "mAP@2_by_min"]
    better = sum(a[query] != b[query] for query in a)
    assert row.a == 0.5
    assert (row.won, row.lost) == (better, 0)
    assert row.difference == pytest.approx(0.5 * better / 300) == pytest.approx(row.b - row.a)
    # The difference is a mean of 0 and 0.5: its deviation is known without a bootstrap.
    spread = 0.5 * np.sqrt(better / 300 * (1 - better / 300) / 300)
    np.testing.assert_allclose(row.interval, [row.difference - 1.96 * spread, row.difference + 1.96 * spread], atol=0.006)


def test_the_other_way_round_is_its_mirror() -> None:
    a, b, truth = systems(50)
    there, back = compare(a, b, truth, 2)[2], compare(b, a, truth, 2)[2]
    assert (there.won, there.lost) == (back.lost, back.won)
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, truth = systems(60)
    for name, answers in (("a", a), ("b", b)):
        (tmp_path / f"{name}.csv").write_text("".join(f"{q},{','.join(row)}\n" for q, row in answers.items()))
    rows = "".join(f"{query},{next(iter(match))}\n" for query, match in truth.items())
    (tmp_path / "truth.csv").write_text("query,product\n" + rows)
    main([*(str(tmp_path / f"{name}.csv") for name in ("a", "b", "truth")), "--k", "2"])
    output = capsys.readouterr().out
    assert "mAP@2_by_min" in output
    assert output.count("better") == 4, "three divisions and recall@1; recall@2 is the same"
    with pytest.raises(SystemExit, match=r"nothing\.csv"):
        main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), str(tmp_path / "nothing.csv")])
