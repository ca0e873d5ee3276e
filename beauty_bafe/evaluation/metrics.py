"""Metrics of rankings."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DIVISIONS = ("hits", "matches", "min")
BOOTSTRAP = 2000


def average_precision(answers: Sequence[str], matches: Collection[str], k: int, division: str = "min") -> float:
    """AP@k: the sum of P(i) over the ranks i <= k of matches, divided by one of three numbers; 0 without a match.

    P(i) is the share of matches among the first i answers. `division`: "hits", the number of matches found within k (used
    by the teams of the challenge; most lenient, as missing matches cost nothing); "matches", the number of all true matches
    R (cannot reach 1 if k < R); "min", min(R, k), the usual definition today.

    >>> answers, matches = ["a", "x", "b", "y"], {"a", "b", "c"}  # P(1) = 1, P(3) = 2/3
    >>> [round(average_precision(answers, matches, k=4, division=d), 4) for d in ("hits", "matches", "min")]
    [0.8333, 0.5556, 0.5556]
    >>> round(average_precision(answers, matches, k=1, division="min"), 4)
    1.0
    """
    found, total = 0, 0.0
    for rank, answer in enumerate(answers[:k], start=1):
        if answer in matches:
            found += 1
            total += found / rank
    divisor = {"hits": found, "matches": len(matches), "min": min(len(matches), k)}[division]
    return total / divisor if found else 0.0


@dataclass(frozen=True)
class Evaluation:
    """Per-query values and their means. `values`: metric name -> float (Q,), in the order of `query_ids`.

    `ranks`: float (Q,), the rank of each query's first match, counted from 1; infinite if there is none.
    """

    query_ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    ranks: np.ndarray
    unanswered: tuple[str, ...]

    def summary(self) -> dict[str, float | list[float] | None]:
        """The mean of each metric, and as `NAME_interval` its 95 % interval (2,000 bootstrap samples over queries, seed 0).

        `median_rank`: of the first match; None if at least half of the queries have no match among their answers.
        """
        median = float(np.median(self.ranks))
        result: dict[str, float | list[float] | None] = {
            "queries": len(self.query_ids),
            "unanswered": len(self.unanswered),
            "median_rank": median if np.isfinite(median) else None,
        }
        for name, values in self.values.items():
            result[name] = float(values.mean())
            result[f"{name}_interval"] = list(interval(values))
        return result

    def write_per_query(self, file: str | Path) -> None:
        """Write a csv with one row per query: id, rank of the first match (empty if there is none), and all metrics."""
        with Path(file).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["query", "rank", *self.values])
            for row, query in enumerate(self.query_ids):
                rank = int(self.ranks[row]) if np.isfinite(self.ranks[row]) else ""
                writer.writerow([query, rank, *(f"{values[row]:.6f}" for values in self.values.values())])


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of float (Q,): 2,000 bootstrap samples over queries, seed 0.

    The samples depend only on Q, so that for differences of two systems this is the paired bootstrap.
    """
    rows = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP, len(values)))
    low, high = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def evaluate(answers: Mapping[str, Sequence[str]], truth: Mapping[str, Collection[str]], k: int) -> Evaluation:
    """mAP@k in the three divisions of `average_precision`, and recall@1 and recall@k (share of queries with a match by then).

    All queries in `truth` count; those without answers (unreadable pictures) score 0 and are listed. Answers to other
    queries are ignored. Raises ValueError if the two have no query in common.
    """
    if not any(query in answers for query in truth):
        some = ", ".join(list(truth)[:2]), ", ".join(list(answers)[:2])
        raise ValueError(f"truth and answers have no query in common: truth has {some[0]} …, the answers {some[1]} …")
    queries = tuple(truth)
    given = [answers.get(query, ()) for query in queries]
    values = {
        f"mAP@{k}_by_{division}": np.array(
            [average_precision(row, truth[query], k, division) for query, row in zip(queries, given, strict=True)]
        )
        for division in DIVISIONS
    }
    for depth in dict.fromkeys((1, k)):
        hits = [bool(set(row[:depth]) & set(truth[query])) for query, row in zip(queries, given, strict=True)]
        values[f"recall@{depth}"] = np.array(hits, float)
    ranks = [
        next((rank for rank, answer in enumerate(row[:k], start=1) if answer in truth[query]), np.inf)
        for query, row in zip(queries, given, strict=True)
    ]
    return Evaluation(queries, values, np.array(ranks, float), tuple(query for query in queries if query not in answers))


def read_truth(file: str | Path) -> dict[str, set[str]]:
    """Query id -> ids of all its matches, from `query,product` rows or the challenge's file (rows with 1 to 6 products).

    A query may have several rows; picture suffixes (`.jpg`) are removed. Raises ValueError for a row without a product or
    a file without rows.
    """
    truth: dict[str, set[str]] = {}
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"truth='{file}' does not exist; give a csv of query,product rows, or leave truth out")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = [[_stem(cell) for cell in row if cell.strip()] for row in csv.reader(stream)]
    for number, row in enumerate(rows[1:], start=2):  # both forms have a header
        if len(row) == 1:
            raise ValueError(f"{file}, line {number}: the query '{row[0]}' has no answer; rows are query,product[,product …]")
        if row:
            truth.setdefault(row[0], set()).update(row[1:])
    if not truth:
        raise ValueError(f"'{file}' holds no rows below its header; it needs query,product rows")
    return truth


def _stem(cell: str) -> str:
    cell = cell.strip()
    base, dot, suffix = cell.rpartition(".")
    return base if dot and suffix.lower() in ("jpg", "jpeg", "png", "webp") else cell
