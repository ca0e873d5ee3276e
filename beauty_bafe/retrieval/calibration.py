"""The probability that an answer shows the query's product, calibrated on street views of the gallery's own photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from ..index.ranking import Evidence

SHORTLIST = 20  # answers to a query over which the probability is distributed
RIDGE = 0.01  # penalty on the squared scales of further evidence, standardised to unit variance


@dataclass(frozen=True)
class Calibration:
    """Evidence for the answers to a query -> the probability that each is right.

    P(i) = exp(scales . x_i) / (exp(unknown) + sum_j exp(scales . x_j)) over the first SHORTLIST answers j: the conditional
    logit (McFadden, 1974) with the option "none". `scales` are not negative. The numbers of x, in this order:

    * a similarity, minus its median over these answers, as another camera or a blurred picture lowers all of them alike;
    * further evidence for the answer;
    * its lead in similarity over the most similar other answer;
    * for each kind of pairwise evidence, its minimum over the other answers, 0 if there is none: a photo of an unknown product
      often matches several of its variants about equally well.

    If an answer stands behind a less probable one, because evidence that only orders answers put it there (see
    EvidenceReranker), it gets that one's probability. `strangers`: for queries whose product is not in the gallery, the
    probability of the first answer, in ascending order.
    """

    scales: tuple[float, ...]
    unknown: float
    strangers: tuple[float, ...]

    @classmethod
    def fit(cls, evidence: Evidence, right: np.ndarray) -> Self:
        """Fit to queries with known answers.

        `evidence`: of the answers in the order of their ranking; `right`: bool (Q, k), at most one per row. Each
        query counts twice: as it is, and with its right answer removed, as if half of all queries showed products that are not
        in the gallery. Evidence that is the same for all answers gets the scale 0. Raises ValueError if there are no queries,
        or fewer than two answers to each.
        """
        shape = evidence.single.shape
        if shape[:2] != right.shape or not len(right) or right.shape[1] < 2:
            raise ValueError(f"calibration needs queries with two answers or more, got evidence of shape {shape}")
        evidence, right = evidence.first(SHORTLIST), right[:, :SHORTLIST]
        # If the right answer is not among them, the last one is removed, so that all rows have the same length.
        gone = np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1] - 1)
        left = evidence.pick(np.nonzero(np.arange(right.shape[1]) != gone[:, None])[1].reshape(len(right), -1))
        whole, without = _features(evidence), _features(left)
        # Standardised; the scales and `unknown` are converted back below.
        middle, spread = whole.mean(axis=(0, 1)), whole.std(axis=(0, 1))
        varied = spread > 1e-9 * np.maximum(1, np.abs(middle))
        spread = np.where(varied, spread, np.inf)
        whole, without = (whole - middle) / spread, (without - middle) / spread
        found = right.any(axis=1)
        # Platt (1999): targets below 1 keep the fit finite on separable data.
        doubt = 1 / (len(right) + 2)
        # Answers, the one that counts as right (with the right one removed: the first), and its share of the target; the rest
        # of the target is on "none".
        halves = [
            (whole, whole[np.arange(len(right)), right.argmax(axis=1)], (1 - doubt) * found),
            (without, without[:, 0], doubt),
        ]
        ridge = np.array([0.0, *[RIDGE] * (len(spread) - 1)])

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            scales, unknown = values[:-1], values[-1]
            loss, slope = float(ridge @ scales**2), np.append(2 * ridge * scales, 0.0)
            for answers, own, target in halves:
                logits = answers @ scales
                total = np.logaddexp(unknown, logsumexp(logits, axis=1))
                loss += float(np.mean(total - target * (own @ scales) - (1 - target) * unknown))
                expected = (np.exp(logits - total[:, None])[..., None] * answers).sum(axis=1)
                slope[:-1] += (expected - np.reshape(target, (-1, 1)) * own).mean(axis=0)
                slope[-1] += np.mean(np.exp(unknown - total) - (1 - target))
            return loss, slope

        start = np.array([1.0, *[0.0] * (len(spread) - 1), float(np.median(whole[:, 0, 0]))])
        bounds = [(1e-6, None)] + [(0.0, None)] * (len(spread) - 1) + [(None, None)]
        options = {"maxiter": 10_000, "ftol": 1e-12, "gtol": 1e-8}
        solved = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        scales = solved[:-1] / spread
        fitted = cls(tuple(scales.tolist()), float(solved[-1] + scales @ middle), ())
        return replace(fitted, strangers=tuple(np.sort(fitted.probabilities(left)[:, 0]).tolist()))

    def probabilities(self, evidence: Evidence) -> np.ndarray:
        """The probability of each answer, float32 (Q, k), 0 to 1; answers in the order of their ranking.

        Raises ValueError if the evidence is of other kinds than `scales`.
        """
        features = _features(evidence)
        # A file of an earlier version has no scales for the lead and for pairwise evidence, which come last.
        if len(self.scales) not in (evidence.single.shape[2], features.shape[2]):
            raise ValueError(
                f"{len(self.scales)} scales do not fit {features.shape[2]} numbers for each answer; calibrate again"
            )
        logits = features[..., : len(self.scales)] @ np.array(self.scales)
        total = np.logaddexp(self.unknown, logsumexp(logits[:, :SHORTLIST], axis=1))
        return np.exp(np.minimum.accumulate(logits - total[:, None], axis=1)).astype(np.float32)

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
        return {"scales": list(self.scales), "unknown": self.unknown, "strangers": list(self.strangers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A Calibration from the output of `to_dict`, or of an earlier version, which had fewer scales, or one `scale`."""
        scales, strangers = (
            tuple(map(float, part)) for part in (values.get("scales", [values.get("scale")]), values["strangers"])
        )
        return cls(scales, float(values["unknown"]), strangers)


def check_rate(known_at: float) -> None:
    """Raise ValueError for a number that is not between 0 and 1."""
    if not 0 <= known_at <= 1:
        raise ValueError(f"known_at={known_at}: type the share of unknown products to accept as known, from 0 to 1")


def _features(evidence: Evidence) -> np.ndarray:
    """The numbers that probabilities are computed from, float64 (Q, k, E + 1 + P): see Calibration."""
    single = evidence.single.astype(np.float64)
    similarity, answers = single[..., 0], np.arange(single.shape[1])
    shortlist = similarity[:, :SHORTLIST]
    above = similarity - np.median(shortlist, axis=1, keepdims=True)
    ordered = np.sort(shortlist, axis=1)[:, ::-1]
    if len(answers) > 1:
        most_similar = answers == shortlist.argmax(axis=1)[:, None]
        lead = similarity - np.where(most_similar, ordered[:, 1:2], ordered[:, :1])
    else:
        lead = np.zeros_like(similarity)  # no other answer
    pairwise = evidence.pairwise[:, :, :SHORTLIST]
    own = answers[:, None] == answers[:SHORTLIST]
    lowest = np.where(np.isnan(pairwise) | own[..., None], np.inf, pairwise).min(axis=2, initial=np.inf)
    return np.concatenate([above[..., None], single[..., 1:], lead[..., None], np.where(np.isinf(lowest), 0, lowest)], axis=-1)
