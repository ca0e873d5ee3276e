"""How sure an answer is: the chance that it shows the query's product, learned from street views of the gallery itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

SHORTLIST = 20  # answers of a query that share out its probability


@dataclass(frozen=True)
class Calibration:
    """Scores of a query's answers -> the probability that each is right; what is left over is that none is.

    P(i) = exp(scale s_i) / (exp(unknown) + sum_j exp(scale s_j)), j among the first SHORTLIST answers: the conditional logit
    (McFadden, 1974) with the option "none of them". Scores count from the median of those answers, as another camera or a
    blurred picture lowers all of them alike. `strangers`: of queries whose product the gallery lacked, the largest
    probability that an answer had, rising.
    """

    scale: float
    unknown: float
    strangers: tuple[float, ...]

    @classmethod
    def fit(cls, scores: np.ndarray, right: np.ndarray) -> Self:
        """Learn from queries with known answers.

        `scores`: float (Q, k), falling along a row; `right`: bool (Q, k), at most one a row. Each query counts once as it is,
        and once with its right answer taken out, as if half of all queries showed products that the gallery lacks. Raises
        ValueError where there is no query, or fewer than two answers each.
        """
        if scores.shape != right.shape or scores.ndim != 2 or not len(scores) or scores.shape[1] < 2:
            raise ValueError(f"calibration needs queries with two answers or more, and has scores of shape {scores.shape}")
        scores, right = scores[:, :SHORTLIST].astype(np.float64), right[:, :SHORTLIST]
        # The last answer goes where the right one is not among them, so that all rows have one length.
        gone = np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1] - 1)
        without = scores[np.arange(right.shape[1]) != gone[:, None]].reshape(len(scores), -1)
        raised, without = _above_median(scores), _above_median(without)
        found = right.any(axis=1)
        own = raised[right]
        # Platt (1999) keeps separable data from asking for infinite certainty: nobody is surer than this many queries allow.
        doubt = 1 / (len(scores) + 2)

        def loss(values: np.ndarray) -> float:
            scale, unknown = np.exp(values[0]), values[1]
            total = np.logaddexp(unknown, logsumexp(scale * raised, axis=1))
            hit = total - unknown  # of a right answer that is not among them
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
        """float (Q, k), falling along a row -> float32 (Q, k), 0 to 1."""
        logits = self.scale * _above_median(scores.astype(np.float64))
        total = np.logaddexp(self.unknown, logsumexp(logits[:, :SHORTLIST], axis=1))
        return np.exp(logits - total[:, None]).astype(np.float32)

    def threshold(self, rate: float) -> float:
        """The least probability that the best answers of at most the share `rate` of the strangers reach.

        Raises ValueError for a rate that is not between 0 and 1.
        """
        check_rate(rate)
        above = int(rate * len(self.strangers))
        if above >= len(self.strangers):
            return 0.0
        # What reaches it is known, so that it lies above the first stranger that must not.
        return float(np.nextafter(np.float32(self.strangers[-1 - above]), np.float32(np.inf)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `from_dict`."""
        return asdict(self) | {"strangers": list(self.strangers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(float(values["scale"]), float(values["unknown"]), tuple(float(value) for value in values["strangers"]))


def check_rate(known_at: float) -> None:
    """Raise ValueError for what is no share."""
    if not 0 <= known_at <= 1:
        raise ValueError(f"known_at={known_at}: type the share of unknown products that may pass for known, from 0 to 1")


def _above_median(scores: np.ndarray) -> np.ndarray:
    return scores - np.median(scores[:, :SHORTLIST], axis=1, keepdims=True)
