"""Submission files. The challenge's have no header: each row is a query id, then k gallery ids, best first."""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..data.catalog import open_catalog
from ..index.ranking import Ranking
from ..manifest import replace_file


def write_submission(ranking: Ranking, file: str | Path) -> None:
    """Write one line per query, atomically."""
    _write_rows(file, ([query, *ranking.answers(row)] for row, query in enumerate(ranking.query_ids)))


def write_answers(ranking: Ranking, file: str | Path, threshold: float | None) -> None:
    """Write one line per answer, with a header: query, rank from 1, id, score, probability, known.

    `known`: yes if the best answer to the query has a probability of at least `threshold`, otherwise no (the product is
    probably not in the gallery). Probability and known are empty without a calibration.
    """
    rows: list[list[object]] = [["query", "rank", "id", "score", "probability", "known"]]
    for row, query in enumerate(ranking.query_ids):
        known = "" if ranking.probabilities is None or threshold is None else ("no", "yes")[is_known(ranking, row, threshold)]
        answers = zip(ranking.answers(row), ranking.scores[row].tolist(), ranking.certainty(row), strict=True)
        for rank, (name, score, sure) in enumerate(answers, start=1):
            rows.append([query, rank, name, f"{score:.6g}", "" if sure is None else f"{sure:.4f}", known])
    _write_rows(file, rows)


def is_known(ranking: Ranking, row: int, threshold: float) -> bool:
    """Whether the best answer in this row reaches `threshold`. Raises ValueError for a ranking without probabilities."""
    if ranking.probabilities is None:
        raise ValueError("the ranking has no probabilities; type rehearsal.views=384")
    return bool(ranking.probabilities[row].max() >= threshold)


def _write_rows(file: str | Path, rows: Iterable[Sequence[object]]) -> None:
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)

    replace_file(file, write)


def read_submission(file: str | Path) -> dict[str, list[str]]:
    """Query id -> gallery ids, best first. Raises ValueError for a repeated query or a line without answers."""
    answers: dict[str, list[str]] = {}
    with Path(file).open(newline="", encoding="utf-8-sig") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            if len(row) < 2 or row[0] in answers:
                fault = "has no answers" if len(row) < 2 else f"repeats the query '{row[0]}'"
                raise ValueError(f"{file}, line {number} {fault}; each line is a query id, then gallery ids, best first")
            answers[row[0]] = row[1:]
    return answers


def check_submission(
    file: str | Path, k: int, gallery: Sequence[str] | None = None, queries: Sequence[str] | None = None
) -> list[str]:
    """The faults of a submission file, one sentence each; empty if it can be submitted.

    Every line must hold a query and `k` different gallery ids, and no query may be repeated. With `gallery`, all answers
    must be among its ids; with `queries`, exactly these must be answered, in this order.
    """
    faults, seen = [], list[str]()
    known, expected = (None if names is None else set(names) for names in (gallery, queries))
    with Path(file).open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            query, answers = (row[0], row[1:]) if row else ("", [])
            if len(answers) != k:
                faults.append(f"line {number} ('{query}') has {len(answers)} answers, not {k}")
            if twice := sorted({answer for answer in answers if answers.count(answer) > 1}):
                faults.append(f"line {number} ('{query}') contains {', '.join(twice)} more than once")
            if known is not None and (strange := [answer for answer in answers if answer not in known]):
                faults.append(f"line {number} ('{query}') has answers that are not in the gallery: {', '.join(strange)}")
            if expected is not None and query not in expected:
                faults.append(f"line {number}: '{query}' is not among the {len(expected)} queries; leave out any header")
            seen.append(query)
    if not seen:
        faults.append("the file is empty")
    faults += [f"the query '{query}' occurs {count} times" for query, count in Counter(seen).items() if count > 1]
    if queries is not None and expected is not None:
        if missing := [query for query in queries if query not in set(seen)]:
            faults.append(f"{len(missing)} queries are not answered, the first '{missing[0]}'")
        if not missing and [query for query in seen if query in expected] != list(queries):
            faults.append("the queries are not in the order of --queries")
    return faults


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m beauty_bafe.retrieval.submission check FILE"""
    parser = argparse.ArgumentParser(description=main.__doc__, prog="python -m beauty_bafe.retrieval.submission")
    check = parser.add_subparsers(required=True).add_parser("check", help="verify a submission file")
    check.add_argument("file")
    check.add_argument("--k", type=int, default=7, help="answers per query")
    check.add_argument("--gallery", help="folder, or csv of id,path: answers must be among its ids")
    check.add_argument("--queries", help="folder, or csv of id,path: all must be answered, in this order")
    given = parser.parse_args(arguments)
    try:
        ids = [None if source is None else open_catalog(source).ids for source in (given.gallery, given.queries)]
        faults = check_submission(given.file, given.k, *ids)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if faults:
        more = f"\n… and {len(faults) - 20} more" if len(faults) > 20 else ""
        sys.exit(f"{given.file}: {len(faults)} faults\n" + "\n".join(faults[:20]) + more)
    unchecked = [f"--{name}" for name, known in zip(("gallery", "queries"), ids, strict=True) if known is None]
    print(f"{given.file}: no faults" + (f" (ids not checked; add {' and '.join(unchecked)})" if unchecked else ""))


if __name__ == "__main__":
    main()
