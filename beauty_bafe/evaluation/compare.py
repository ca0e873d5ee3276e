"""Is one submission better than another? python -m beauty_bafe.evaluation.compare a.csv b.csv truth.csv"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ..retrieval.submission import read_submission
from .metrics import evaluate, interval, read_truth


class Comparison(NamedTuple):
    """One metric of two submissions a and b for the same queries. `interval`: 95 % interval of b - a, paired over queries."""

    metric: str
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    won: int
    lost: int


def compare(
    a: Mapping[str, Sequence[str]], b: Mapping[str, Sequence[str]], truth: Mapping[str, Collection[str]], k: int
) -> list[Comparison]:
    """Compare each metric of `evaluate` by a paired bootstrap (2,000 samples, seed 0), and count queries b won and lost."""
    first, second = evaluate(a, truth, k), evaluate(b, truth, k)
    results = []
    for metric in first.values:
        change = second.values[metric] - first.values[metric]
        won, lost = int((change > 0).sum()), int((change < 0).sum())
        means = float(first.values[metric].mean()), float(second.values[metric].mean())
        results.append(Comparison(metric, *means, float(change.mean()), interval(change), won, lost))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m beauty_bafe.evaluation.compare")
    parser.add_argument("a", help="a submission: query id, then gallery ids")
    parser.add_argument("b", help="the other one")
    parser.add_argument("truth", help="csv of query,product rows")
    parser.add_argument("--k", type=int, default=7, help="answers that count")
    given = parser.parse_args(arguments)
    try:
        results = compare(read_submission(given.a), read_submission(given.b), read_truth(given.truth), given.k)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{'metric':20s} {'a':>7s} {'b':>7s} {'b - a':>8s}   95 % interval        b wins  b loses")
    for row in results:
        low, high = row.interval
        verdict = "" if low <= 0 <= high else "  better" if low > 0 else "  worse"
        print(
            f"{row.metric:20s} {row.a:7.4f} {row.b:7.4f} {row.difference:+8.4f}   {low:+.4f} to {high:+.4f}   "
            f"{row.won:6d} {row.lost:8d}{verdict}"
        )


if __name__ == "__main__":
    main()
