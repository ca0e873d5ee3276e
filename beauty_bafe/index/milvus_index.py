"""A gallery whose vectors are on a Milvus server, for catalogues that outgrow one machine."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..manifest import digest
from .base import Index
from .labels import Labels, category_code, make_labels, read_categories
from .milvus_collection import KINDS, MAX_RESULTS, SEALED, Collection, Server

CONSISTENCIES = ("strong", "bounded", "session", "eventually")
NUMBERS = 1 << 26  # of candidate vectors in memory at a time


class MilvusIndex(Index):
    """Search by Milvus, with exact scores: each query's first `rescore` candidates (k if that is more) are scored again here,
    so that `kind` decides which rows are found, but not how they are scored.

    `kind`: "hnsw" (`m` links, `ef` candidates), "diskann" (`ef` candidates; needs NVMe disks), "ivf_sq8" (`lists`, of which
    `probes` are searched) or "flat". Each view of a gallery has a collection of its own, `collection`_viewN, which must
    belong to one index_dir only. `shards`, `replicas`: as in Milvus. `consistency`: what a search is guaranteed to see:
    "strong" everything written before it, "session" what this process wrote, "bounded" and "eventually" less.
    `categories`: csv of id,category, whose categories become partitions; `only`: the categories to search. `overwrite`:
    whether building a gallery may replace the rows of another one. `timeout`: seconds that one request may take.

    The label of a row is a hash of its id and vector. So rows never change, sending a row twice stores it once, and an index
    and its clones share a collection without seeing each other's changes: rows added by one are left out of the searches of
    the others, and a removed row is deleted on the server only at the second save after its removal, as an index saved before
    may still be in use. After an interruption, the same command completes the work.

    Raises ValueError for settings that Milvus does not support; ConnectionError, in all methods, if the server fails.
    """

    def __init__(
        self,
        uri: str,
        collection: str,
        kind: str = "hnsw",
        metric: str = "ip",
        token: str | None = None,
        shards: int = 1,
        replicas: int = 1,
        consistency: str = "session",
        categories: str | None = None,
        only: Sequence[str] | None = None,
        m: int = 16,
        ef: int = 128,
        lists: int = 1024,
        probes: int = 64,
        rescore: int = 100,
        overwrite: bool = False,
        timeout: float = 60,
    ) -> None:
        super().__init__(metric)
        if metric == "l1":
            raise ValueError("index.metric=l1: Milvus supports ip and l2; for l1 type index=flat")
        for name, value, allowed in (("kind", kind, tuple(KINDS)), ("consistency", consistency, CONSISTENCIES)):
            if value not in allowed:
                raise ValueError(f"index.{name}={value}: type {', '.join(allowed)}")
        if not collection.isidentifier() or not collection.isascii():
            raise ValueError(f"index.collection={collection}: type a name of letters, digits and _, not beginning with a digit")
        if not 0 <= rescore <= MAX_RESULTS:
            raise ValueError(f"index.rescore={rescore}: type a number from 0 to {MAX_RESULTS}")
        if only is not None and categories is None:
            raise ValueError(f"index.only={list(only)} needs index.categories=CSV, a csv with the columns id,category")
        self.rescore, self.overwrite = rescore, overwrite
        self._category = {} if categories is None else read_categories(categories)
        # Hashes, as Milvus's expressions misread some quotes and backslashes.
        self._only = "" if only is None else f"category in {json.dumps([category_code(name) for name in only])}"
        options, search, wide = {
            "hnsw": ({"M": m, "efConstruction": 200}, {"ef": ef}, {"ef": 32768}),
            "diskann": ({}, {"search_list": ef}, {"search_list": MAX_RESULTS}),
            "ivf_sq8": ({"nlist": lists}, {"nprobe": min(probes, lists)}, {"nprobe": lists}),
            "flat": ({}, {}, {}),
        }[kind]
        milvus_metric = {"ip": "IP", "l2": "L2"}[metric]
        server, partitioned = Server(uri, token, timeout), categories is not None
        self._collection = Collection(
            server,
            collection,
            kind,
            milvus_metric,
            shards,
            replicas,
            consistency,
            partitioned,
            options,
            search,
            wide,
            {},
        )
        self._labels = Labels(np.zeros(0, np.int64))
        self._checked = False

    @property
    def nbytes(self) -> int:
        return int(len(self) * self.dimensions * KINDS[self._collection.kind][1])

    def describe(self) -> dict[str, Any]:
        return {
            "index": "milvus",
            "metric": self.metric,
            "kind": self._collection.kind,
            "collection": self._collection.name,
            "partitioned": self._collection.partitioned,
        }

    def __str__(self) -> str:
        return f"milvus {self._collection.kind} {self.metric}, {self._collection}"

    def for_view(self, number: int, about: dict[str, Any]) -> Self:
        twin = copy.copy(self)
        twin._collection = copy.copy(self._collection)
        twin._collection.name, twin._collection.about = f"{self._collection.name}_view{number}", about
        return twin

    def sync(self, vectors: np.ndarray, ids: Sequence[str]) -> tuple[int, int, int]:
        """See `Index.sync`. Rows that the server has lost are sent again and count as added.

        Vectors are compared by their labels, so any difference counts, and none is read back.
        """
        self._collection.open(self.dimensions, create=True)
        self._collection.load()
        self._checked = True
        labels = make_labels(vectors, ids)
        before = dict(zip(self.ids, self._labels.rows.tolist(), strict=True))
        kept = np.array([before.get(name) == label for name, label in zip(ids, labels.tolist(), strict=True)], bool)
        rows = np.flatnonzero(kept)
        lost = rows[~self._collection.present(labels[rows])]
        self._send(labels[lost], [ids[row] for row in lost.tolist()], vectors[lost])
        same = {ids[row] for row in rows.tolist()}
        if gone := tuple(name for name in self.ids if name not in same):
            self.remove(gone)
        if not kept.all():
            self.add(vectors[~kept], tuple(name for name in ids if name not in same))
        return len(gone), int((~kept).sum()) + len(lost), len(rows) - len(lost)

    def _replace(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        labels = make_labels(vectors, ids)
        if len(self._labels):
            # This is a copy of an index in use, whose collection must not change.
            self._collection = copy.copy(self._collection)
            self._collection.name += f"_{digest(labels.tobytes())}"
            weakref.finalize(self._collection, copy.copy(self._collection).drop)
        collection, width = self._collection, vectors.shape[1]
        try:
            old = collection.open(width, create=True)
            there = self._known(labels) if old else np.zeros(len(labels), bool)
        except ValueError:
            if not self.overwrite:
                raise
            collection.drop()
            collection.open(width, create=True)
            there = np.zeros(len(labels), bool)
        new = np.flatnonzero(~there)
        self._send(labels[new], [ids[row] for row in new], vectors[new], exclusive=True)
        collection.load()
        self._labels, self._checked = Labels(labels), True

    def _known(self, labels: np.ndarray) -> np.ndarray:
        """Which rows of a gallery a killed run has already sent, bool (N,). Raises ValueError if there are other rows."""
        self._collection.load()
        there = self._collection.present(labels)
        if (strangers := self._collection.count() - int(there.sum())) > 0:
            raise ValueError(
                f"the {self._collection} holds {strangers} rows that are not in this gallery; type "
                "index.collection=ANOTHER_NAME, or index.overwrite=true to replace them"
            )
        return there

    def _append(self, vectors: np.ndarray, ids: tuple[str, ...]) -> None:
        self._check_complete()
        labels = make_labels(vectors, ids)
        self._send(labels, ids, vectors)
        self._labels = self._labels.with_added(labels)

    def _delete(self, keep: np.ndarray) -> None:
        self._labels = self._labels.without(keep)

    def _send(self, labels: np.ndarray, ids: Sequence[str], vectors: np.ndarray, exclusive: bool = False) -> None:
        if len(labels):
            self._collection.insert(labels, ids, vectors, [category_code(self._category.get(name, "")) for name in ids])
        if len(labels) >= SEALED:
            self._collection.flush(exclusive)

    def _get(self, ids: Sequence[str]) -> np.ndarray:
        self._check_complete()
        return self._fetch(self._labels.rows[[self.row_of[name] for name in ids]])

    def _fetch(self, labels: np.ndarray) -> np.ndarray:
        """Vectors of labels of this index, int64 (N,), which may repeat: float32 (N, D)."""
        unique, place = np.unique(labels, return_inverse=True)
        vectors, found = self._collection.fetch(unique, self.dimensions)
        if not found.all():
            raise ValueError(self._incomplete(f"lost at least {int((~found).sum())} of the {len(self)} rows"))
        return vectors[place]

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if k > MAX_RESULTS:
            raise ValueError(
                f"Milvus returns at most {MAX_RESULTS} results per query, not {k}; lower k, or the depth of re-ranking"
            )
        self._check_complete()
        depth = min(max(k, self.rescore), len(self))
        scores, positions = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
        step = max(1, NUMBERS // (depth * self.dimensions))
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            candidates = self._candidates(block, depth, k)
            rows, place = np.unique(np.concatenate(candidates), return_inverse=True)
            vectors = self._fetch(self._labels.rows[rows]).astype(np.float64)
            ends = np.cumsum([len(found) for found in candidates])
            for number, (query, end) in enumerate(zip(block, ends, strict=True)):
                mine = place[end - len(candidates[number]) : end]
                exact = self._score(query, vectors[mine])
                order = np.lexsort((rows[mine], -exact))[:k]
                scores[start + number], positions[start + number] = exact[order], rows[mine][order]
        return scores, positions

    def _score(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        scores = rows @ query if self.metric == "ip" else -np.square(rows - query).sum(axis=1)
        return np.asarray(scores, np.float32)

    def _candidates(self, queries: np.ndarray, depth: int, k: int) -> list[np.ndarray]:
        """Positions of at least k rows for each query. Once rows are known to be foreign, the server leaves them out."""
        candidates = [np.zeros(0, np.int64)] * len(queries)
        todo, wide = np.arange(len(queries)), False
        while len(todo):
            known = [self._only] if self._only else []
            if self._labels.foreign:
                known.append(f"label not in {sorted(self._labels.foreign)}")
            new: set[int] = set()
            for row, labels in zip(
                todo, self._collection.search_labels(queries[todo], depth, " and ".join(known), wide), strict=True
            ):
                found, ours = self._labels.find(labels)
                new.update(labels[~ours].tolist())
                candidates[row] = found[ours]
            todo = np.array([row for row in todo if len(candidates[row]) < k], np.int64)
            if new:
                self._labels = self._labels.with_foreign(new)
            elif len(todo) and wide:
                raise ValueError(
                    f"Milvus found {min(len(candidates[row]) for row in todo)} rows for a query, k={k}; "
                    f"lower k{', widen index.only' if self._only else ''}, or type index.kind=flat"
                )
            else:
                wide = True
        return candidates

    def _check_complete(self) -> None:
        """Check, once after loading, that the saved rows are still on the server."""
        if self._checked:
            return
        if not self._collection.open(self.dimensions, create=False):
            raise ValueError(self._incomplete(f"does not exist; it should hold {len(self)} rows"))
        self._collection.load()
        if (count := self._collection.count()) < len(self):
            raise ValueError(self._incomplete(f"holds {count} rows of {len(self)}"))
        self._checked = True

    def _incomplete(self, what: str) -> str:
        return f"the {self._collection} {what}; type gallery=DIR_OR_CSV with the same index_dir to send the missing rows"

    def _save(self, folder: Path) -> None:
        # Rows removed since the last save are deleted next time, as the index saved last may still be in use.
        self._check_complete()
        self._collection.delete(sorted(self._labels.obsolete))
        self._labels = self._labels.save(folder)

    def _load(self, folder: Path) -> int:
        self._labels, self._checked = Labels.load(folder), False
        return len(self._labels)
