"""Re-ranking by evidence beside the likeness of descriptors; how much each kind weighs is learned without labels."""

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

from ..extraction.features import unit
from .candidates import Candidates, check_depth, reorder, with_depth

log = logging.getLogger("beauty_bafe")

RIDGE = 0.01  # penalty on the squared weights of evidence, all brought to unit variance
DOUBT = 0.1  # the least weight that likeness can get; with less, evidence could outweigh it without bound


@dataclass(frozen=True)
class EvidenceReranker(ABC):
    """Likeness + the sum of `weights` x evidence among each query's first `depth` answers.

    `weights`: of each of `kinds`, what is left out weighs nothing; None: learned from street views of the gallery's own
    photos. `absolute`: evidence says how likely an answer is right at all; where it only tells answers apart, they change
    places and every rank keeps its likeness. Raises ValueError for a depth below 1 and for weights that are not numbers by
    kind.
    """

    depth: int
    weights: Mapping[str, float] | None
    kinds: ClassVar[tuple[str, ...]]
    absolute: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_depth(self.depth)
        if self.weights is None:
            return
        typed = f"{{{self.kinds[0]}: 0.05}}, or null to learn them"
        if not isinstance(self.weights, Mapping):
            raise ValueError(f"weights={self.weights}: type a number for each kind of evidence, {typed}")
        if unknown := sorted({*self.weights} - {*self.kinds}):
            raise ValueError(f"weights: {{{unknown[0]}: ...}} is no evidence here; type some of {', '.join(self.kinds)}")
        for kind, weight in self.weights.items():
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"weights: {{{kind}: {weight}}} is no number; type one, as in {typed}")

    @abstractmethod
    def evidence(self, found: Candidates) -> np.ndarray:
        """float (Q, depth, len(kinds)); the more of each, the likelier the answer is right."""

    def learned(self, practice: Candidates) -> Self:
        if self.weights is not None:
            return self
        practice = with_depth(practice, self.depth)
        ranking = practice.ranking
        names = np.array(ranking.gallery_ids)[ranking.positions[:, : self.depth]]
        hit = names == np.array(ranking.query_ids)[:, None]
        likeness, evidence = _likeness(practice, self.depth), self.evidence(practice)
        fitted = fit_weights(likeness, evidence, hit)
        weights = dict(zip(self.kinds, fitted.tolist(), strict=True))
        together, alone = (_mean_reciprocal_rank(scores, hit) for scores in (likeness + evidence @ fitted, likeness))
        log.info(
            f"weights beside likeness: {', '.join(f'{name} {weight:.3f}' for name, weight in weights.items())}; {len(hit)} "
            f"gallery pictures found from their own street views: mean reciprocal rank {together:.3f}, {alone:.3f} without"
        )
        return replace(self, weights=weights)

    def __call__(self, found: Candidates) -> Candidates:
        if self.weights is None:
            raise ValueError(
                "the weights of the evidence are learned from street views of the gallery's photos, and there are none, as no "
                "photo is a file with a plain backdrop, or rehearsal.views=0; type the weights "
                f"('rerank.NAME.weights={{{self.kinds[0]}: 0.05}}'), or rerank=none"
            )
        found = with_depth(found, self.depth)
        weights = np.array([self.weights.get(name, 0.0) for name in self.kinds])
        likeness = _likeness(found, self.depth)
        ordered = reorder(found, likeness + self.evidence(found) @ weights)
        if self.absolute:
            return ordered
        return replace(ordered, ranking=replace(ordered.ranking, scores=likeness))


def fit_weights(likeness: np.ndarray, evidence: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Weights of evidence beside a likeness that weighs 1, none below 0, float (E,): the conditional logit (McFadden, 1974).

    They maximise the probability exp(s_i) / sum_j exp(s_j) of each query's right answer among its answers. `likeness`: float
    (Q, k); `evidence`: float (Q, k, E); `hit`: bool (Q, k), at most one a row. Queries without a right answer
    teach nothing.
    """
    taught = hit.any(axis=1)
    if not taught.any():
        return np.zeros(evidence.shape[-1])
    values = np.concatenate([likeness[..., None], evidence], axis=-1)[taught].astype(np.float64)
    right = hit[taught].argmax(axis=1)
    spread = values.reshape(-1, values.shape[-1]).std(axis=0) + 1e-6
    values = values / spread
    own = np.take_along_axis(values, right[:, None, None], axis=1)[:, 0]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = values @ weights
        total = logsumexp(scores, axis=1)
        expected = (np.exp(scores - total[:, None])[..., None] * values).sum(axis=1)
        ridge = RIDGE * np.array([0.0, *weights[1:]])
        return float((total - own @ weights).mean() + ridge @ weights), (expected - own).mean(axis=0) + 2 * ridge

    bounds = [(DOUBT, None)] + [(0.0, None)] * evidence.shape[-1]
    solved = minimize(loss, np.ones(len(spread)), jac=True, method="L-BFGS-B", bounds=bounds).x / spread
    return solved[1:] / solved[0]


def _likeness(found: Candidates, depth: int) -> np.ndarray:
    """Scores of each query's first answers, float (Q, depth), falling along a row.

    Where the index gave distances, or products of vectors of any length, there are no scores that weights could be typed
    for: then the answers' cosines, the largest for the first of them, whatever order the index has put them in.
    """
    if found.rescored or (found.index.metric == "ip" and not found.queries.any_length):
        return found.ranking.scores[:, :depth]
    rows = enumerate(unit(found.queries.vectors))
    cosines = np.stack([unit(found.vectors(depth, slice(row, row + 1))[0]) @ query for row, query in rows])
    return -np.sort(-cosines, axis=1)


def _mean_reciprocal_rank(scores: np.ndarray, hit: np.ndarray) -> float:
    """Queries without a right answer count 0."""
    ranked = np.take_along_axis(hit, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    return float(np.where(ranked.any(axis=1), 1 / (1 + ranked.argmax(axis=1)), 0).mean())
