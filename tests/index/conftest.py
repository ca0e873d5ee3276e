"""Rows to search, and the Milvus server that the PyPI package `milvus` carries."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beauty_bafe.index import axes, leading
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.milvus_index import MilvusIndex

NUMBERS = count()


def unit(rows: int, dims: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dims)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"n{number}" for number in range(count))


def slow(gallery: np.ndarray, queries: np.ndarray, metric: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and scores: float64 differences or products, rounded to float32, equal ones by position."""
    pairs = queries[:, None].astype(float), gallery[None].astype(float)
    if metric == "ip":
        scores = (pairs[0] * pairs[1]).sum(2)
    else:
        gap = pairs[0] - pairs[1]
        scores = -(gap**2 if metric == "l2" else np.abs(gap)).sum(2)
    scores = scores.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, 1)


def gathered(rows: int, dims: int, seed: int) -> np.ndarray:
    """Rows of length 1 that are mixtures of 40 directions, most of them of a few, as descriptors of a trained network are."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(77).normal(size=(40, dims)) * np.geomspace(8, 0.05, 40)[:, None]
    vectors = rng.normal(size=(rows, 40)) @ directions + 0.1 * rng.normal(size=(rows, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def check(gallery: np.ndarray, queries: np.ndarray, metric: str, k: int) -> None:
    """An int8 index finds what the slow search finds."""
    index = ExactIndex(metric, "cpu", "int8").fit(gallery, names(len(gallery)))
    ranking = index.search(queries, names(len(queries)), k)
    positions, scores = slow(gallery, queries, metric, k)
    assert np.array_equal(ranking.positions, positions)
    assert np.array_equal(ranking.scores, scores)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of dimensions and of rows that a small gallery has several of."""
    monkeypatch.setattr(axes, "EDGES", (8, 16, 24))
    monkeypatch.setattr(leading, "CELLS", 2048)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Standalone:
    """A server in a folder of its own; `kill` it and `start` it again, with what it had on disk or empty."""

    def __init__(self, folder: Path) -> None:
        milvus = pytest.importorskip("milvus", reason="the extra `milvus-server`")
        self.folder, self.process = folder, None
        server = milvus.MilvusServer()
        server.config.update(data_dir=str(folder))
        for name in ("checkInterval", "distPullInterval"):  # milliseconds: loading a collection takes several of each
            server.config.set(f"queryCoord.{name}", 100)
        server.config.resolve()
        milvus._initialize_data_files(str(folder))  # 25 MB unpacked to 246
        self.uri = f"http://127.0.0.1:{server.listen_port}"
        self.health, peer = free_port(), free_port()
        client = f"http://127.0.0.1:{server.config.get('etcd_port')}"
        # Its etcd would take the same two ports in every server on this machine.
        urls = {"client-urls": client, "peer-urls": f"http://127.0.0.1:{peer}"}
        lines = [f"listen-{name}: {url}\n" for name, url in urls.items()]
        lines += [f"advertise-client-urls: {client}\n", f"initial-advertise-peer-urls: {urls['peer-urls']}\n"]
        (folder / "etcd.yaml").write_text("".join([*lines, f"initial-cluster: default={urls['peer-urls']}\n"]))
        self.start()

    def start(self, empty: bool = False) -> None:
        if empty:
            shutil.rmtree(self.folder / "data")
        environment = os.environ | {
            "DEPLOY_MODE": "STANDALONE",
            "ETCD_CONFIG_PATH": str(self.folder / "etcd.yaml"),
            "METRICS_PORT": str(self.health),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
            "LD_LIBRARY_PATH": str(self.folder / "bin"),
        }
        with (self.folder / "log").open("a") as log:
            command = [self.folder / "bin" / "milvus", "run", "standalone"]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/healthz", timeout=5) as answer:
                    if b"OK" in answer.read():
                        return
            except OSError:
                time.sleep(0.1)
        pytest.fail(f"milvus did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    start = time.perf_counter()
    server = Standalone(tmp_path_factory.mktemp("milvus"))
    print(f"\nmilvus is up after {time.perf_counter() - start:.1f} s")
    yield server
    server.kill()
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture
def make(server: Standalone) -> Callable[..., MilvusIndex]:
    """Indexes of a collection of this test's own."""
    return partial(MilvusIndex, server.uri, f"test{next(NUMBERS)}")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ids of every message with rows that goes to the server."""
    import pymilvus

    messages: list[list[str]] = []
    upsert = pymilvus.MilvusClient.upsert

    def noted(self: Any, name: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
        result = upsert(self, name, rows, **settings)
        messages.append([row["id"] for row in rows])
        return result

    monkeypatch.setattr(pymilvus.MilvusClient, "upsert", noted)
    return messages
