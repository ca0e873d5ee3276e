"""The probability that an answer shows the query's product, calibrated on street views of the gallery's own photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

SHORTLIST = 20  # answers to a query over which the probability is distributed


@dataclass(frozen=True)
class Calibration:
    """Scores of the answers to a query -> the probability that each is right; the remainder up to 1: that none is.

    P(i) = exp(scale s_i) / (exp(unknown) + sum_j exp(scale s_j)) over the first SHORTLIST answers j: the conditional logit
    (McFadden, 1974) with the option "none". The median of these answers is subtracted from the scores first, as another
    camera or a blurred picture lowers all of them alike. `strangers`: for queries whose product is not in the gallery, the
    highest probability of an answer, in ascending order.
    """

    scale: float
    unknown: float
    strangers: tuple[float, ...]

    @classmethod
    def fit(cls, scores: np.ndarray, right: np.ndarray) -> Self:
        """Fit to queries with known answers.

        `scores`: float (Q, k), descending along each row; `right`: bool (Q, k), at most one per row. Each query counts twice:
        as it is, and with its right answer removed, as if half of all queries showed products that are not in the gallery.
        Raises ValueError if there are no queries, or fewer than two answers to each.
        """
        if scores.shape != right.shape or scores.ndim != 2 or not len(scores) or scores.shape[1] < 2:
            raise ValueError(f"calibration needs queries with two answers or more, got scores of shape {scores.shape}")
        scores, right = scores[:, :SHORTLIST].astype(np.float64), right[:, :SHORTLIST]
        # If the right answer is not among them, the last one is removed, so that all rows have the same length.
        gone = np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1] - 1)
        without = scores[np.arange(right.shape[1]) != gone[:, None]].reshape(len(scores), -1)
        raised, without = _above_median(scores), _above_median(without)
        found = right.any(axis=1)
        own = raised[right]
        # Platt (1999): targets below 1 keep the fit finite on separable data.
        doubt = 1 / (len(scores) + 2)

        def loss(values: np.ndarray) -> float:
            scale, unknown = np.exp(values[0]), values[1]
            total = np.logaddexp(unknown, logsumexp(scale * raised, axis=1))
            hit = total - unknown  # if the right answer is not among them
            hit[found] -= (1 - doubt) * (scale * own - unknown)
            absent = np.logaddexp(unknown, logsumexp(scale * without, axis=1))
            best = scale * without[:, 0]
            return float(np.mean(hit) + np.mean(absent - (1 - doubt) * unknown - doubt * best))

        spread = max(float(raised.std()), 1e-6)
        start = np.array([np.log(1 / spread), float(np.median(raised[:, 0])) / spread])
        solved = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 2000, "xatol": 1e-5, "fatol": 1e-9})
        fitted = cls(float(np.exp(solved.x[0])), float(solved.x[1]), ())
        return cls(fitted.scale, fitted.unknown, tuple(np.sort(fitted.probabilities(without)[:, 0]).tolist()))

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Scores, float (Q, k), descending along each row -> float32 (Q, k), 0 to 1."""
        logits = self.scale * _above_median(scores.astype(np.float64))
        total = np.logaddexp(self.unknown, logsumexp(logits[:, :SHORTLIST], axis=1))
        return np.exp(logits - total[:, None]).astype(np.float32)

    def threshold(self, rate: float) -> float:
        """The lowest threshold that at most a share `rate` of the queries for unknown products reach with their best answer.

        Raises ValueError for a rate that is not between 0 and 1.
        """
        check_rate(rate)
        above = int(rate * len(self.strangers))
        if above >= len(self.strangers):
            return 0.0
        # A probability equal to the threshold is accepted, so the threshold lies just above the first one to reject.
        return float(np.nextafter(np.float32(self.strangers[-1 - above]), np.float32(np.inf)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `from_dict`."""
        return asdict(self) | {"strangers": list(self.strangers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A Calibration from the output of `to_dict`."""
        return cls(float(values["scale"]), float(values["unknown"]), tuple(float(value) for value in values["strangers"]))


def check_rate(known_at: float) -> None:
    """Raise ValueError for a number that is not between 0 and 1."""
    if not 0 <= known_at <= 1:
        raise ValueError(f"known_at={known_at}: type the share of unknown products to accept as known, from 0 to 1")


def _above_median(scores: np.ndarray) -> np.ndarray:
    return scores - np.median(scores[:, :SHORTLIST], axis=1, keepdims=True)
