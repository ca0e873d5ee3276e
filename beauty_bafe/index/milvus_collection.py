"""One collection of a Milvus server: rows by label, and errors that say what to do. The only file that imports pymilvus."""

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
from rich.progress import track

MOST = 16384  # rows that Milvus returns at most, to a query or a request for rows
BYTES = 8 << 20  # of vectors in one message; the server refuses 64 MiB
SILENT = 5000  # rows below which no progress is shown
SEALED = 10_000  # new rows from which on the server is told to seal and index them; it takes fewer badly
KINDS: dict[str, tuple[str, float]] = {  # -> Milvus's name, bytes of memory a dimension
    "hnsw": ("HNSW", 4),
    "diskann": ("DISKANN", 1),
    "ivf_sq8": ("IVF_SQ8", 1),
    "flat": ("FLAT", 4),
}


class Server:
    """Where a Milvus server is. Connects when first asked; may be asked by several threads at once.

    Raises ValueError where `uri` is none, or pymilvus is not installed.
    """

    def __init__(self, uri: str, token: str | None, timeout: float) -> None:
        if not uri.startswith(("http://", "https://")):
            raise ValueError(f"index.uri={uri}: type http://HOST:19530 (milvus-lite's files cannot be used beside faiss-gpu)")
        if timeout <= 0:
            raise ValueError(f"index.timeout={timeout}: type a number of seconds above 0")
        if find_spec("pymilvus") is None:
            raise ValueError("index=milvus needs pymilvus, which is not installed; pip install 'beauty_bafe[milvus]'")
        self.uri, self.timeout, self._token = uri, timeout, token
        self._client: Any = None
        self._connecting = threading.Lock()

    @contextmanager
    def asked(self, what: str) -> Iterator[Any]:
        """The client. Raises ConnectionError where the server does not do `what`, which it names."""
        from pymilvus.exceptions import MilvusException

        try:
            with self._connecting:
                if self._client is None:
                    from pymilvus import MilvusClient

                    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # what it logs, it raises as well
                    self._client = MilvusClient(self.uri, token=self._token or "", timeout=self.timeout)
            yield self._client
        except Exception as error:
            # grpc's own errors come through as well.
            if not isinstance(error, MilvusException) and not type(error).__module__.startswith("grpc"):
                raise
            details = getattr(error, "details", None)
            reason = details() if callable(details) else getattr(error, "message", error)
            reason = " ".join(str(reason).split())[:200]
            raise ConnectionError(
                f"Milvus at {self.uri} failed to {what}: {reason}; what it already took stays there: see to the server "
                f"(or raise index.timeout={self.timeout:g} seconds where it is only slow) and give the same command again"
            ) from error


class Collection:
    """Rows of a collection: label (int64, the row's name for good), id, a hash of the category, and vector.

    `metric`: IP or L2. `options`: of the index; `wide`: search parameters that find the most, used where the usual `search`
    found too little. `about`, plain values, is kept in the collection's description: it says what its vectors are.
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
        """Make it ready to take rows; whether it was there. Raises ValueError where it holds other vectors than ours."""
        with self.server.asked(f"open the collection '{self.name}'") as client:
            there = client.has_collection(self.name, timeout=self.server.timeout)
            if there:
                self._check(client, dimensions)
            elif create:
                self._create(client, dimensions)
            else:
                return False
            if not client.list_indexes(self.name):  # a kill may have come before it
                parameters = client.prepare_index_params()
                milvus_kind = KINDS[self.kind][0]
                parameters.add_index("vector", index_type=milvus_kind, metric_type=self.metric, params=self.options)
                client.create_index(self.name, parameters, timeout=self.server.timeout)
        return bool(there)

    def load(self) -> None:
        """Make it ready to be asked."""
        from pymilvus.exceptions import MilvusException

        until = time.monotonic() + self.server.timeout
        with self.server.asked(f"load the collection '{self.name}'") as client:
            while True:
                try:
                    client.load_collection(self.name, replica_number=self.replicas, _async=True, timeout=self.server.timeout)
                    while str(client.get_load_state(self.name, timeout=self.server.timeout)["state"]) != "Loaded":
                        if time.monotonic() > until + 10 * self.server.timeout:
                            raise ConnectionError(
                                f"the {self} is not loaded after {11 * self.server.timeout:g} seconds; have its query nodes "
                                "the memory for it (docs/scale.md)? else raise index.timeout"
                            )
                        time.sleep(0.1)
                    return
                except MilvusException:
                    # A server that was killed and started again asks for a while the node that is gone.
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)

    def settle(self, alone: bool) -> None:
        """Have all rows written to storage and indexed, which takes a while.

        `alone`: nobody else is asking, so it is loaded anew: Milvus goes on for a while with the interim index of what was
        new, 16 of 128 lists, which found half of the true neighbours of random vectors.
        """
        with self.server.asked("write and index its rows") as client:
            client.flush(self.name, timeout=10 * self.server.timeout)
            if self.kind != "flat":
                until = time.monotonic() + 10 * self.server.timeout
                pending = before = None
                while pending != 0 and time.monotonic() < until:
                    pending = client.describe_index(self.name, "vector", timeout=self.server.timeout)["pending_index_rows"]
                    if pending != before:  # as long as it goes on
                        before, until = pending, time.monotonic() + 10 * self.server.timeout
                    time.sleep(0.2)
                if pending:
                    raise ValueError(f"the {self} has left {pending} rows unindexed for {10 * self.server.timeout:g} seconds")
            if alone:
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
        """Remove it from the server, if it is there."""
        with self.server.asked(f"drop the collection '{self.name}'") as client:
            client.drop_collection(self.name, timeout=self.server.timeout)

    def count(self) -> int:
        """Rows that it holds at this moment."""
        with self.server.asked("count rows") as client:
            return int(self._query(client, "", ["count(*)"], "Strong")[0]["count(*)"])

    def insert(self, labels: np.ndarray, ids: Sequence[str], vectors: np.ndarray, categories: Sequence[str]) -> None:
        """Add rows; those whose label is there already are replaced. Labels int64 (N,), vectors float32 (N, D)."""
        step = min(MOST, max(1, BYTES // (4 * vectors.shape[1])))
        starts: Any = range(0, len(labels), step)
        for start in track(starts, f"sending {len(labels)} vectors to Milvus") if len(labels) > SILENT else starts:
            part = slice(start, start + step)
            rows = [
                # An id that is no Unicode, as file names may be, is only told: rows are found by their label.
                {"label": label, "id": name.encode("utf-8", "backslashreplace").decode(), "vector": vector}
                for label, name, vector in zip(labels[part].tolist(), ids[part], vectors[part], strict=True)
            ]
            if self.partitioned:
                for row, category in zip(rows, categories[part], strict=True):
                    row["category"] = category
            with self.server.asked(f"take vectors {start} to {start + len(rows)} of {len(labels)}") as client:
                if self.partitioned:
                    # Milvus 2.3.5 upserts rows into wrong partitions, where a search by category does not find them.
                    client.delete(self.name, ids=labels[part].tolist(), timeout=self.server.timeout)
                    client.insert(self.name, rows, timeout=self.server.timeout)
                else:
                    client.upsert(self.name, rows, timeout=self.server.timeout)

    def delete(self, labels: Sequence[int]) -> None:
        """Remove rows; labels that it does not hold are no error."""
        for start in range(0, len(labels), MOST):
            with self.server.asked("delete rows") as client:
                client.delete(self.name, ids=list(labels[start : start + MOST]), timeout=self.server.timeout)

    def present(self, labels: np.ndarray) -> np.ndarray:
        """Which of these labels, int64 (N,), it holds at this moment: bool (N,)."""
        found = np.zeros(len(labels), bool)
        starts: Any = range(0, len(labels), MOST)
        for start in track(starts, f"looking for {len(labels)} vectors in Milvus") if len(labels) > 20 * MOST else starts:
            part = labels[start : start + MOST]
            with self.server.asked("say which rows it holds") as client:
                rows = self._query(client, f"label in {part.tolist()}", ["label"], "Strong")
            found[start : start + MOST] = np.isin(part, np.array([row["label"] for row in rows], np.int64))
        return found

    def fetch(self, labels: np.ndarray, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of different labels, int64 (N,): float32 (N, D), and bool (N,): whether each is there."""
        vectors, found = np.zeros((len(labels), dimensions), np.float32), np.zeros(len(labels), bool)
        order = np.argsort(labels)
        step = min(MOST, max(1, BYTES // (4 * dimensions)))
        # What a search returned can be read at once; what a lagging replica lacks is asked for again.
        for level in ("Eventually", "Strong"):
            missing = np.flatnonzero(~found)
            for start in range(0, len(missing), step):
                part = labels[missing[start : start + step]].tolist()
                with self.server.asked("read vectors") as client:
                    rows = self._query(client, f"label in {part}", ["label", "vector"], level)
                if rows:
                    got = np.array([row["label"] for row in rows], np.int64)
                    place = order[np.searchsorted(labels, got, sorter=order)]
                    vectors[place], found[place] = np.array([row["vector"] for row in rows], np.float32), True
        return vectors, found

    def near(self, queries: np.ndarray, count: int, filter: str, wide: bool) -> list[np.ndarray]:
        """Labels near each query, float32 (Q, D), best first: Q of int64, `count` each or as many as it finds."""
        found: list[np.ndarray] = []
        step = max(1, min(1024, (1 << 20) // count))
        for start in range(0, len(queries), step):
            with self.server.asked("answer queries") as client:
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
        """The search parameters; a list of candidates cannot be shorter than what is asked for."""
        parameters = dict(self.wide if wide else self.search)
        return {name: max(value, count) if name in ("ef", "search_list") else value for name, value in parameters.items()}

    def _query(self, client: Any, filter: str, fields: list[str], level: str) -> Any:
        return client.query(
            self.name, filter=filter, output_fields=fields, consistency_level=level, timeout=self.server.timeout
        )
