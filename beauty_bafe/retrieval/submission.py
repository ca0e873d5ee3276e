"""The challenge's answer file: no header; a query's id, then k gallery ids, most confident first."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .ranking import Ranking


def write_submission(ranking: Ranking, file: str | Path) -> None:
    """Write one line a query, whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([query, *ranking.answers(row)] for row, query in enumerate(ranking.query_ids))
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write '{file}': {error.strerror}; is the disk full?") from error


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
