"""A better ranking from a first one. Every step has the signature of `expand_queries`; conf/rerank names and orders them."""

from __future__ import annotations

import numpy as np

from .features import Features
from .index import FlatIndex
from .ranking import Ranking


def expand_queries(ranking: Ranking, queries: Features, gallery: Features, index: FlatIndex, n: int, alpha: float) -> Ranking:
    """Alpha query expansion (Radenovic et al., TPAMI 2019): search again with each query plus its n best answers.

    An answer weighs similarity^alpha (nothing where negative), the query itself 1. `n` beyond the ranking's length is
    searched anew; beyond the gallery it is the whole gallery.
    """
    k = ranking.positions.shape[1]
    n = min(n, len(gallery.ids))
    found = ranking if n <= k else index.search(queries.vectors, queries.ids, n)
    weights = np.maximum(found.scores[:, :n], 0) ** alpha
    expanded = queries.vectors + np.einsum("qn,qnd->qd", weights, gallery.vectors[found.positions[:, :n]])
    expanded /= np.maximum(np.linalg.norm(expanded, axis=1, keepdims=True), 1e-12)
    return index.search(expanded.astype(np.float32), queries.ids, k)
