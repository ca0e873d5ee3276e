"""How reliable the probabilities are, for products in the gallery and for unknown ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import mannwhitneyu

from ..index.ranking import Ranking
from ..retrieval.calibration import SHORTLIST, Calibration
from .metrics import BOOTSTRAP

BINS = 10
RECALL = 0.9


@dataclass(frozen=True)
class Certainty:
    """The best answer to each query, with its true products in the gallery (known) and without them (unknown).

    `known`: float (Q,), the probability of the best answer; `right`: bool (Q,), whether it is right. `unknown`: float (Q,), the
    probability of the best answer that is left when the true products are removed. `threshold`: the probability from which
    a product counts as known.
    """

    known: np.ndarray
    right: np.ndarray
    unknown: np.ndarray
    threshold: float

    @classmethod
    def from_ranking(
        cls, shortlist: Ranking, truth: Mapping[str, Collection[str]], calibration: Calibration, threshold: float
    ) -> Self | None:
        """`shortlist`: at least SHORTLIST answers per query, or all. Queries that are not in `truth`, or whose answers are all
        right, are ignored; None if no query is left.
        """
        names = np.array(shortlist.gallery_ids)[shortlist.positions[:, :SHORTLIST]]
        evidence = shortlist.get_evidence().first(SHORTLIST)
        known, right, unknown = [], [], []
        for row, (query, answers) in enumerate(zip(shortlist.query_ids, names, strict=True)):
            hit = np.isin(answers, list(truth.get(query, ())))
            # If no true product is among the answers, the last one is removed, so that all lists have the same length.
            gone = hit if hit.any() else np.arange(len(hit)) == len(hit) - 1
            if query in truth and not gone.all():
                own = evidence.take(np.array([row]))
                known.append(calibration.probabilities(own)[0, 0])
                unknown.append(calibration.probabilities(own.pick(np.flatnonzero(~gone)[None]))[0, 0])
                right.append(hit[0])
        return cls(np.array(known), np.array(right), np.array(unknown), threshold) if known else None

    def summary(self) -> dict[str, float | list[float] | None]:
        """Metrics over the queries with known and as many with unknown products, with 95 % intervals (bootstrap, seed 0).

        `auroc`: the chance that the best answer has a higher probability for a known product than for an unknown one.
        `calibration_error`: expected calibration error in BINS bins (Naeini et al., AAAI 2015). `precision_at_90`: the share of
        right answers at the threshold at which 90 % of the known products are found; None if there is none.
        `false_acceptance`, `recognised`: share of unknown and known products whose best answer reaches `threshold`.
        """
        measures = {
            "auroc": self._auroc,
            "calibration_error": self._calibration_error,
            "precision_at_90": self._precision,
            "false_acceptance": lambda rows: float((self.unknown[rows] >= self.threshold).mean()),
            "recognised": lambda rows: float((self.known[rows] >= self.threshold).mean()),
        }
        rows = np.arange(len(self.known))
        samples = np.random.default_rng(0).integers(len(rows), size=(BOOTSTRAP // 4, len(rows)))
        result: dict[str, float | list[float] | None] = {}
        for name, measure in measures.items():
            result[name] = measure(rows)
            drawn = [value for value in map(measure, samples) if value is not None]
            result[f"{name}_interval"] = np.percentile(drawn, [2.5, 97.5]).tolist() if result[name] is not None else None
        return result

    def bins(self) -> list[tuple[float, float, int]]:
        """Mean probability, share of right answers and number of answers of each non-empty bin, of BINS."""
        return self._bins(np.arange(len(self.known)))

    def _bins(self, rows: np.ndarray) -> list[tuple[float, float, int]]:
        sure = np.concatenate([self.known[rows], self.unknown[rows]])
        right = np.concatenate([self.right[rows], np.zeros(len(rows), bool)])
        places = np.minimum((sure * BINS).astype(int), BINS - 1)
        held = [places == place for place in range(BINS) if (places == place).any()]
        return [(float(sure[part].mean()), float(right[part].mean()), int(part.sum())) for part in held]

    def _auroc(self, rows: np.ndarray) -> float:
        larger = mannwhitneyu(self.known[rows], self.unknown[rows]).statistic
        return float(larger / len(rows) ** 2)

    def _calibration_error(self, rows: np.ndarray) -> float:
        return sum(abs(sure - right) * count for sure, right, count in self._bins(rows)) / (2 * len(rows))

    def _precision(self, rows: np.ndarray) -> float | None:
        known, right = self.known[rows], self.right[rows]
        needed = int(np.ceil(RECALL * len(rows)))
        if np.count_nonzero(right) < needed:
            return None
        threshold = np.sort(known[right])[::-1][needed - 1]
        accepted = np.count_nonzero(known >= threshold) + np.count_nonzero(self.unknown[rows] >= threshold)
        return float(np.count_nonzero(known[right] >= threshold) / accepted)
