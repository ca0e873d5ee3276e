"""Re-ranking by evidence in addition to descriptor similarity, with weights learned without labels."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import ClassVar, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from ..index.ranking import Evidence
from .candidates import Candidates, check_depth, reorder, similarity_of, with_depth

log = logging.getLogger("beauty_bafe")

RIDGE = 0.01  # penalty on the squared weights of the evidence, standardised to unit variance
MIN_SIMILARITY_WEIGHT = 0.1  # bounds the weights of the evidence relative to that of the similarity


@dataclass(frozen=True)
class EvidenceReranker(ABC):
    """Score each query's first `depth` candidates by similarity + the sum of `weights` x evidence.

    `weights`: by kind of evidence (see `kinds`), 0 for missing ones; None: learned from street views of the gallery's own
    photos. `absolute`: the kinds that say how likely a candidate is to be right, not only which one is likelier:
    probabilities are computed from these, the similarity and pairwise evidence (see Calibration), with weights of their own.
    `most`: the highest evidence of a kind, 0 being the lowest; if it is finite, only queries whose first candidate another one
    could overtake are examined, and all others keep their order; there must then be no `absolute` and no pairwise evidence.

    Raises ValueError for a depth below 1, or weights that are not numbers by kind.
    """

    depth: int
    weights: Mapping[str, float] | None
    most: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if self.weights is None:
            return
        typed = f"{{{self.kinds[0]}: 0.05}}, or null to learn them"
        if not isinstance(self.weights, Mapping):
            raise ValueError(f"weights={self.weights}: type a number for each kind of evidence, as in {typed}")
        if unknown := sorted({*self.weights} - {*self.kinds}):
            raise ValueError(f"weights: {unknown[0]} is not a kind of evidence here; type some of {', '.join(self.kinds)}")
        for kind, weight in self.weights.items():
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"weights: {{{kind}: {weight}}} is not a finite number; type one, as in {typed}")

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """The names of the evidence."""

    @property
    @abstractmethod
    def absolute(self) -> tuple[str, ...]:
        """Some of `kinds`."""

    @property
    def pairwise(self) -> tuple[str, ...]:
        """The names of the pairwise evidence."""
        return ()

    @abstractmethod
    def evidence(self, candidates: Candidates) -> Evidence:
        """Evidence for the first `depth` candidates, one number for each of `kinds` and of `pairwise`; higher values make a
        candidate more likely to be right.
        """

    def fit(self, examples: Candidates) -> Self:
        if self.weights is not None:
            return self
        examples = with_depth(examples, self.depth)
        ranking = examples.ranking
        names = np.array(ranking.gallery_ids)[ranking.positions[:, : self.depth]]
        hit = names == np.array(ranking.query_ids)[:, None]
        similarity, evidence = similarity_of(examples, self.depth), self.evidence(examples).single
        fitted = fit_weights(similarity, evidence, hit)
        weights = dict(zip(self.kinds, fitted.tolist(), strict=True))
        after, before = (_mean_reciprocal_rank(scores, hit) for scores in (similarity + evidence @ fitted, similarity))
        log.info(
            f"weights learned from {len(hit)} street views: "
            f"{', '.join(f'{name} {weight:.3f}' for name, weight in weights.items())}; "
            f"mean reciprocal rank {after:.3f}, {before:.3f} without re-ranking"
        )
        return replace(self, weights=weights)

    def __call__(self, candidates: Candidates) -> Candidates:
        if self.weights is None:
            raise ValueError(
                "the weights of the evidence are learned from street views of the gallery's photos, but there are none: no "
                "photo is a file with a plain backdrop, or rehearsal.views=0; type the weights "
                f"('rerank.NAME.weights={{{self.kinds[0]}: 0.05}}'), or rerank=none"
            )
        candidates = with_depth(candidates, self.depth)
        weights = np.array([self.weights.get(name, 0.0) for name in self.kinds])
        similarity = similarity_of(candidates, self.depth)
        evidence = self._needed(candidates, similarity, weights)
        known = candidates.ranking.evidence
        before = Evidence.of(similarity[..., None]) if known is None else known.first(self.depth)
        absolute = Evidence(evidence.single[..., [kind in self.absolute for kind in self.kinds]], evidence.pairwise)
        return reorder(candidates, similarity + evidence.single @ weights, before.join(absolute))

    def _needed(self, candidates: Candidates, similarity: np.ndarray, weights: np.ndarray) -> Evidence:
        """The evidence; 0 for queries whose first candidate no other one could overtake."""
        if math.isinf(self.most):
            return self.evidence(candidates)
        needed = np.zeros((*similarity.shape, len(self.kinds)))
        lead = similarity[:, 0] - similarity[:, 1:].max(axis=1, initial=-np.inf)
        rows = np.flatnonzero(lead < self.most * np.abs(weights).sum())
        if len(rows):
            needed[rows] = self.evidence(candidates.take(rows)).single
        return Evidence.of(needed)


def fit_weights(similarity: np.ndarray, evidence: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Fit a conditional logit (McFadden, 1974): non-negative weights of the evidence, float (E,), relative to a similarity of
    weight 1.

    They maximise the probability exp(s_i) / sum_j exp(s_j) of the right candidate of each query. `similarity`: float (Q, k);
    `evidence`: float (Q, k, E); `hit`: bool (Q, k), at most one per row. Queries without a right candidate are ignored.
    """
    informative = hit.any(axis=1)
    if not informative.any():
        return np.zeros(evidence.shape[-1])
    values = np.concatenate([similarity[..., None], evidence], axis=-1)[informative].astype(np.float64)
    right = hit[informative].argmax(axis=1)
    spread = values.reshape(-1, values.shape[-1]).std(axis=0) + 1e-6
    values = values / spread
    own = np.take_along_axis(values, right[:, None, None], axis=1)[:, 0]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = values @ weights
        total = logsumexp(scores, axis=1)
        expected = (np.exp(scores - total[:, None])[..., None] * values).sum(axis=1)
        ridge = RIDGE * np.array([0.0, *weights[1:]])
        return float((total - own @ weights).mean() + ridge @ weights), (expected - own).mean(axis=0) + 2 * ridge

    bounds = [(MIN_SIMILARITY_WEIGHT, None)] + [(0.0, None)] * evidence.shape[-1]
    solved = minimize(loss, np.ones(len(spread)), jac=True, method="L-BFGS-B", bounds=bounds).x / spread
    return solved[1:] / solved[0]


def _mean_reciprocal_rank(scores: np.ndarray, hit: np.ndarray) -> float:
    """Queries without a right candidate count as 0."""
    ranked = np.take_along_axis(hit, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return float(np.where(ranked.any(axis=1), 1 / (1 + ranked.argmax(axis=1)), 0).mean())
