"""Files of answers. The challenge's has no header; a query's id, then k gallery ids, most confident first."""

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
    """Write one line a query, whole or not at all."""
    _write_rows(file, ([query, *ranking.answers(row)] for row, query in enumerate(ranking.query_ids)))


def write_answers(ranking: Ranking, file: str | Path, threshold: float | None) -> None:
    """Write one line an answer, with a header: query, rank from 1, id, score, probability, known.

    `known`: yes where the query's best answer has a probability of `threshold` or more, no where the product is not in the
    gallery. Both are empty where nothing was learned to tell.
    """
    rows: list[list[object]] = [["query", "rank", "id", "score", "probability", "known"]]
    for row, query in enumerate(ranking.query_ids):
        known = "" if ranking.probabilities is None or threshold is None else ("no", "yes")[is_known(ranking, row, threshold)]
        answers = zip(ranking.answers(row), ranking.scores[row].tolist(), ranking.certainty(row), strict=True)
        for rank, (name, score, sure) in enumerate(answers, start=1):
            rows.append([query, rank, name, f"{score:.6g}", "" if sure is None else f"{sure:.4f}", known])
    _write_rows(file, rows)


def is_known(ranking: Ranking, row: int, threshold: float) -> bool:
    """Whether the query in this row shows a product of the gallery. Raises ValueError for a ranking without probabilities."""
    if ranking.probabilities is None:
        raise ValueError("there are no probabilities to tell known products by; type rehearsal.views=384")
    return bool(ranking.probabilities[row].max() >= threshold)


def _write_rows(file: str | Path, rows: Iterable[Sequence[object]]) -> None:
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)

    replace_file(file, write)


def read_submission(file: str | Path) -> dict[str, list[str]]:
    """Query id -> gallery ids, best first. Raises ValueError for a query that stands twice or a line without answers."""
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
    """What is wrong with a file, one sentence a fault; nothing where it can be handed in.

    Every line holds a query and `k` different gallery ids; no query stands twice. With `gallery` all ids must be among
    its ids; with `queries` all are answered, no others, in their order.
    """
    faults, seen = [], list[str]()
    known, asked = (None if names is None else set(names) for names in (gallery, queries))
    with Path(file).open(newline="", encoding="utf-8") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            query, answers = (row[0], row[1:]) if row else ("", [])
            if len(answers) != k:
                faults.append(f"line {number} ('{query}') has {len(answers)} answers, not {k}")
            if twice := sorted({answer for answer in answers if answers.count(answer) > 1}):
                faults.append(f"line {number} ('{query}') holds {', '.join(twice)} more than once")
            if known is not None and (strange := [answer for answer in answers if answer not in known]):
                faults.append(f"line {number} ('{query}') answers with {', '.join(strange)}, not in the gallery")
            if asked is not None and query not in asked:
                faults.append(f"line {number}: '{query}' is none of the {len(asked)} queries; a header does not belong here")
            seen.append(query)
    if not seen:
        faults.append("the file is empty")
    faults += [f"the query '{query}' stands {count} times" for query, count in Counter(seen).items() if count > 1]
    if queries is not None and asked is not None:
        if missing := [query for query in queries if query not in set(seen)]:
            faults.append(f"{len(missing)} queries are not answered, the first '{missing[0]}'")
        if not missing and [query for query in seen if query in asked] != list(queries):
            faults.append("the queries are not in their order")
    return faults


def main(arguments: Sequence[str] | None = None) -> None:
    """python -m beauty_bafe.retrieval.submission check FILE"""
    parser = argparse.ArgumentParser(description=main.__doc__, prog="python -m beauty_bafe.retrieval.submission")
    check = parser.add_subparsers(required=True).add_parser("check", help="verify a submission file")
    check.add_argument("file")
    check.add_argument("--k", type=int, default=7, help="answers a query")
    check.add_argument("--gallery", help="folder, or csv of id,path: its ids are the known ones")
    check.add_argument("--queries", help="likewise: all of them must be answered, in their order")
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
    print(f"{given.file}: good" + (f" (ids unchecked without {' and '.join(unchecked)})" if unchecked else ""))


if __name__ == "__main__":
    main()
