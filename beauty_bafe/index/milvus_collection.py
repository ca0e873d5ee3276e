"""One collection on a Milvus server: rows by label, and errors that say what to do. The only file that imports pymilvus."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..progress import show_progress

MAX_RESULTS = 16384  # rows that Milvus returns at most, per query and per request
BYTES = 8 << 20  # of vectors per message; the server rejects 64 MiB
PROGRESS_ABOVE = 5000  # rows up to which no progress bar is shown
SEALED = 10_000  # new rows from which the server is told to seal and index them; many small segments slow it down
KINDS: dict[str, tuple[str, float]] = {  # -> Milvus's name, bytes of memory per dimension
    "hnsw": ("HNSW", 4),
    "diskann": ("DISKANN", 1),
    "ivf_sq8": ("IVF_SQ8", 1),
    "flat": ("FLAT", 4),
}


class Server:
    """A connection to a Milvus server, made at the first request. Thread-safe.

    Raises ValueError for a bad `uri` or `timeout`, or if pymilvus is not installed.
    """

    def __init__(self, uri: str, token: str | None, timeout: float) -> None:
        if not uri.startswith(("http://", "https://")):
            raise ValueError(
                f"index.uri={uri}: type http://HOST:19530 (milvus-lite is not supported: it cannot run beside faiss-gpu)"
            )
        if timeout <= 0:
            raise ValueError(f"index.timeout={timeout}: type a number of seconds above 0")
        if find_spec("pymilvus") is None:
            raise ValueError("index=milvus needs pymilvus, which is not installed; pip install 'beauty_bafe[milvus]'")
        self.uri, self.timeout, self._token = uri, timeout, token
        self._client: Any = None
        self._connecting = threading.Lock()

    @contextmanager
    def client(self, what: str) -> Iterator[Any]:
        """Yield the client. Raises ConnectionError, with `what` in its message, if the server fails."""
        from pymilvus.exceptions import MilvusException

        try:
            with self._connecting:
                if self._client is None:
                    from pymilvus import MilvusClient

                    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it also raises what it logs
                    self._client = MilvusClient(self.uri, token=self._token or "", timeout=self.timeout)
            yield self._client
        except Exception as error:
            # grpc's own errors come through unchanged.
            if not isinstance(error, MilvusException) and not type(error).__module__.startswith("grpc"):
                raise
            details = getattr(error, "details", None)
            reason = details() if callable(details) else getattr(error, "message", error)
            reason = " ".join(str(reason).split())[:200]
            raise ConnectionError(
                f"Milvus at {self.uri} failed to {what}: {reason}; rows it has already stored are kept. Check the server "
                f"(or raise index.timeout={self.timeout:g} seconds if it is only slow) and run the same command again"
            ) from error


class Collection:
    """A collection whose rows have a label (int64, never changed), an id, a hash of the category, and a vector.

    `metric`: IP or L2. `options`: of the index. `search`: parameters of a search; `wide`: those with the highest recall, used
    if `search` found too few rows. `about`: plain values, stored in the collection's description, that say what its vectors
    are.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        kind: str,
        metric: str,
        shards: int,
        replicas: int,
        consistency: str,
        partitioned: bool,
        options: dict[str, Any],
        search: dict[str, Any],
        wide: dict[str, Any],
        about: dict[str, Any],
    ) -> None:
        self.server, self.name, self.kind, self.metric = server, name, kind, metric
        self.shards, self.replicas, self.consistency, self.partitioned = shards, replicas, consistency, partitioned
        self.options, self.search, self.wide, self.about = options, search, wide, about

    def __str__(self) -> str:
        return f"collection '{self.name}' at {self.server.uri}"

    def open(self, dimensions: int, create: bool) -> bool:
        """Whether the collection exists; if not, `create` creates it. Raises ValueError if it holds vectors of another kind."""
        with self.server.client(f"open the collection '{self.name}'") as client:
            there = client.has_collection(self.name, timeout=self.server.timeout)
            if there:
                self._check(client, dimensions)
            elif create:
                self._create(client, dimensions)
            else:
                return False
            if not client.list_indexes(self.name):  # a run may have been killed before this
                parameters = client.prepare_index_params()
                milvus_kind = KINDS[self.kind][0]
                parameters.add_index("vector", index_type=milvus_kind, metric_type=self.metric, params=self.options)
                client.create_index(self.name, parameters, timeout=self.server.timeout)
        return bool(there)

    def load(self) -> None:
        """Load the collection for searching."""
        from pymilvus.exceptions import MilvusException

        until = time.monotonic() + self.server.timeout
        with self.server.client(f"load the collection '{self.name}'") as client:
            while True:
                try:
                    client.load_collection(self.name, replica_number=self.replicas, _async=True, timeout=self.server.timeout)
                    while str(client.get_load_state(self.name, timeout=self.server.timeout)["state"]) != "Loaded":
                        if time.monotonic() > until + 10 * self.server.timeout:
                            raise ConnectionError(
                                f"the {self} was not loaded after {11 * self.server.timeout:g} seconds; check that its query "
                                "nodes have enough memory (docs/scale.md), or raise index.timeout"
                            )
                        time.sleep(0.1)
                    return
                except MilvusException:
                    # After a restart, the server keeps asking for a while for a node that no longer exists.
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)

    def flush(self, exclusive: bool) -> None:
        """Write all rows to storage and wait until they are indexed.

        `exclusive`: nothing else uses the collection, so release it for a reload: otherwise Milvus keeps using the interim
        index of new rows for a while (16 of 128 lists), which found half of the true neighbours of random vectors.
        """
        with self.server.client("write and index its rows") as client:
            client.flush(self.name, timeout=10 * self.server.timeout)
            if self.kind != "flat":
                until = time.monotonic() + 10 * self.server.timeout
                pending = before = None
                while pending != 0 and time.monotonic() < until:
                    pending = client.describe_index(self.name, "vector", timeout=self.server.timeout)["pending_index_rows"]
                    if pending != before:  # there is progress
                        before, until = pending, time.monotonic() + 10 * self.server.timeout
                    time.sleep(0.2)
                if pending:
                    raise ValueError(
                        f"the {self} has left {pending} rows unindexed for {10 * self.server.timeout:g} seconds; "
                        "check the server, or raise index.timeout"
                    )
            if exclusive:
                client.release_collection(self.name, timeout=self.server.timeout)

    def _create(self, client: Any, dimensions: int) -> None:
        from pymilvus import DataType

        schema = client.create_schema(auto_id=False, description=json.dumps(self._described(dimensions)))
        schema.add_field("label", DataType.INT64, is_primary=True)
        schema.add_field("id", DataType.VARCHAR, max_length=65535)
        if self.partitioned:
            schema.add_field("category", DataType.VARCHAR, max_length=16, is_partition_key=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
        level = self.consistency.capitalize()
        client.create_collection(self.name, schema=schema, num_shards=self.shards, consistency_level=level)

    def _described(self, dimensions: int) -> dict[str, Any]:
        own = {"dimensions": dimensions, "metric": self.metric, "kind": self.kind, "partitioned": self.partitioned}
        return json.loads(json.dumps(own | self.about))

    def _check(self, client: Any, dimensions: int) -> None:
        text = client.describe_collection(self.name, timeout=self.server.timeout)["description"]
        try:
            found = dict(json.loads(text))
        except ValueError:
            raise ValueError(f"the {self} was made by another program; type index.collection=ANOTHER_NAME") from None
        expected = self._described(dimensions)
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                raise ValueError(
                    f"the {self} holds vectors made with {key}={found.get(key)}, now it is {key}={expected.get(key)}; "
                    "type index.collection=ANOTHER_NAME, or build the gallery with index.overwrite=true"
                )

    def drop(self) -> None:
        """Remove the collection from the server, if it exists."""
        with self.server.client(f"drop the collection '{self.name}'") as client:
            client.drop_collection(self.name, timeout=self.server.timeout)

    def count(self) -> int:
        """The current number of rows."""
        with self.server.client("count rows") as client:
            return int(self._query(client, "", ["count(*)"], "Strong")[0]["count(*)"])

    def insert(self, labels: np.ndarray, ids: Sequence[str], vectors: np.ndarray, categories: Sequence[str]) -> None:
        """Add rows, replacing those with the same label. Labels int64 (N,), vectors float32 (N, D)."""
        step = min(MAX_RESULTS, max(1, BYTES // (4 * vectors.shape[1])))
        count, starts = len(labels), range(0, len(labels), step)
        for start in show_progress(starts, f"sending {count} vectors to Milvus", count, PROGRESS_ABOVE):
            part = slice(start, start + step)
            rows = [
                # The id is only for people to read, so invalid Unicode is escaped: rows are found by their label.
                {"label": label, "id": name.encode("utf-8", "backslashreplace").decode(), "vector": vector}
                for label, name, vector in zip(labels[part].tolist(), ids[part], vectors[part], strict=True)
            ]
            if self.partitioned:
                for row, category in zip(rows, categories[part], strict=True):
                    row["category"] = category
            with self.server.client(f"store vectors {start} to {start + len(rows)} of {len(labels)}") as client:
                if self.partitioned:
                    # Milvus 2.3.5 upserts rows into the wrong partition, in which a search by category does not find them.
                    client.delete(self.name, ids=labels[part].tolist(), timeout=self.server.timeout)
                    client.insert(self.name, rows, timeout=self.server.timeout)
                else:
                    client.upsert(self.name, rows, timeout=self.server.timeout)

    def delete(self, labels: Sequence[int]) -> None:
        """Remove rows; unknown labels are ignored."""
        for start in range(0, len(labels), MAX_RESULTS):
            with self.server.client("delete rows") as client:
                client.delete(self.name, ids=list(labels[start : start + MAX_RESULTS]), timeout=self.server.timeout)

    def present(self, labels: np.ndarray) -> np.ndarray:
        """Which of these labels, int64 (N,), the collection holds now: bool (N,)."""
        found = np.zeros(len(labels), bool)
        count, starts = len(labels), range(0, len(labels), MAX_RESULTS)
        for start in show_progress(starts, f"looking for {count} vectors in Milvus", count, 20 * MAX_RESULTS):
            part = labels[start : start + MAX_RESULTS]
            with self.server.client("list its rows") as client:
                rows = self._query(client, f"label in {part.tolist()}", ["label"], "Strong")
            found[start : start + MAX_RESULTS] = np.isin(part, np.array([row["label"] for row in rows], np.int64))
        return found

    def fetch(self, labels: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of N different labels: float32 (N, D), and bool (N,), whether each was found."""
        vectors, found = np.zeros((len(labels), dimensions), np.float32), np.zeros(len(labels), bool)
        order = np.argsort(labels)
        step = min(MAX_RESULTS, max(1, BYTES // (4 * dimensions)))
        # Rows that a search returned can be read at once; what a lagging replica lacks is requested again.
        for level in ("Eventually", "Strong"):
            missing = np.flatnonzero(~found)
            for start in range(0, len(missing), step):
                part = labels[missing[start : start + step]].tolist()
                with self.server.client("read vectors") as client:
                    rows = self._query(client, f"label in {part}", ["label", "vector"], level)
                if rows:
                    got = np.array([row["label"] for row in rows], np.int64)
                    place = order[np.searchsorted(labels, got, sorter=order)]
                    vectors[place], found[place] = np.array([row["vector"] for row in rows], np.float32), True
        return vectors, found

    def search_labels(self, queries: np.ndarray, count: int, filter: str, wide: bool) -> list[np.ndarray]:
        """Labels of up to `count` rows near each query, float32 (Q, D), best first: Q arrays of int64."""
        found: list[np.ndarray] = []
        step = max(1, min(1024, (1 << 20) // count))
        for start in range(0, len(queries), step):
            with self.server.client("answer queries") as client:
                answers = client.search(
                    self.name,
                    data=list(queries[start : start + step]),
                    filter=filter,
                    limit=count,
                    search_params={"metric_type": self.metric, "params": self._at_least(count, wide)},
                    consistency_level=self.consistency.capitalize(),
                    timeout=self.server.timeout,
                )
            found += [np.array([hit.id for hit in hits], np.int64) for hits in answers]
        return found

    def _at_least(self, count: int, wide: bool) -> dict[str, Any]:
        """The search parameters; the list of candidates must hold at least `count`."""
        parameters = dict(self.wide if wide else self.search)
        return {name: max(value, count) if name in ("ef", "search_list") else value for name, value in parameters.items()}

    def _query(self, client: Any, filter: str, fields: list[str], level: str) -> Any:
        return client.query(
            self.name, filter=filter, output_fields=fields, consistency_level=level, timeout=self.server.timeout
        )
