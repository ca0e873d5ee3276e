from __future__ import annotations

import csv
import errno
from pathlib import Path

import numpy as np
import pytest

from beauty_bafe.index.ranking import Ranking
from beauty_bafe.retrieval.submission import check_submission, main, read_submission, write_submission

RANKING = Ranking(("q,1", "q2"), ("a", "b,c", "d"), np.array([[1, 0], [2, 1]]), np.array([[0.9, 0.5], [0.4, 0.4]]))


def test_no_header_best_first_and_back(tmp_path: Path) -> None:
    write_submission(RANKING, tmp_path / "out" / "answers.csv")
    assert (tmp_path / "out" / "answers.csv").read_text() == '"q,1","b,c",a\nq2,d,"b,c"\n'
    assert read_submission(tmp_path / "out" / "answers.csv") == {"q,1": ["b,c", "a"], "q2": ["d", "b,c"]}


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers.csv"
    file.write_text("old\n")

    class Full:
        def __init__(self, stream: object, **options: object) -> None: ...

        def writerows(self, rows: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(csv, "writer", Full)
    with pytest.raises(OSError, match=r"could not write .*answers.csv.*is the disk full"):
        write_submission(RANKING, file)
    assert file.read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


@pytest.mark.parametrize(
    ("text", "message"), [("q1,a\nq1,b\n", "line 2 repeats the query 'q1'"), ("q1\n", "line 1 has no answers")]
)
def test_broken_submissions_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_submission(tmp_path / "a.csv")


GOOD = "q1,a,b,c\nq2,d,e,f\n"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        (GOOD, []),
        ("q1,a,b\nq2,d,e,f\n", ["line 1 ('q1') has 2 answers, not 3"]),
        ("q1,a,b,a\nq2,d,e,f\n", ["line 1 ('q1') contains a more than once"]),
        ("q1,a,b,z\nq2,d,e,f\n", ["line 1 ('q1') has answers that are not in the gallery: z"]),
        ("q2,d,e,f\nq1,a,b,c\n", ["the queries are not in the order of --queries"]),
        ("q1,a,b,c\n", ["1 queries are not answered, the first 'q2'"]),
        (GOOD + "q2,d,e,f\n", ["the query 'q2' occurs 2 times", "the queries are not in the order of --queries"]),
        (
            "query,a,b,c\n" + GOOD,
            ["line 1: 'query' is not among the 2 queries; leave out any header"],
        ),
        ("", ["the file is empty", "2 queries are not answered, the first 'q1'"]),
    ],
)
def test_a_file_is_verified(tmp_path: Path, text: str, faults: list[str]) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert check_submission(tmp_path / "a.csv", 3, list("abcdef"), ["q1", "q2"]) == faults


def test_the_check_command(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(GOOD)
    main(["check", str(tmp_path / "a.csv"), "--k", "3"])
    assert "no faults (ids not checked; add --gallery and --queries)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"(?s)faults.*line 1 .'q1'. has 3 answers, not 7"):
        main(["check", str(tmp_path / "a.csv"), "--gallery", str(toy / "gallery")])
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        main(["check", str(tmp_path / "a.csv"), "--queries", "nowhere"])
