"""A service of its own process, on a real port, and pictures for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import Retriever
from beauty_bafe.config import CONF

from ..conftest import ROOT, VIEWS

TOKEN = "a-token-of-tests"
PATIENT = "limits.seconds=600"  # on a busy machine
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Server:
    """A running `beauty-bafe serve`; `client` asks it."""

    def __init__(self, shop: Path, *overrides: str, token: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        ours = ("BEAUTY_BAFE_TOKEN", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")  # what serve itself is to set
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment |= {"PYTHONPATH": str(ROOT)} | ({} if token is None else {"BEAUTY_BAFE_TOKEN": token})
        command = [sys.executable, "-m", "beauty_bafe", "serve", f"index_dir={shop}", f"port={self.port}", *overrides]
        self.log = shop.parent / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=shop.parent, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=600, trust_env=False)
        self._wait()

    def _wait(self) -> None:
        while self.process.poll() is None:  # however long that takes beside other programs
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the service did not start: {self.log.read_text()}")

    def search(self, picture: bytes, **settings: object) -> httpx.Response:
        return self.client.post("/search", files={"image": picture}, params=settings)

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(600)


@pytest.fixture(scope="session")
def saved(toy: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "shop"
    Retriever.build(tiny_checkpoint, toy / "gallery", [VIEWS]).save(folder)
    return folder


@pytest.fixture(scope="session")
def shop(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(saved, tmp_path_factory.mktemp("served") / "shop"))


@pytest.fixture(scope="session")
def server(shop: Path) -> Iterator[Server]:
    running = Server(shop, "limits.upload_bytes=200000", "limits.pixels=1000000", PATIENT)
    yield running
    running.stop()


@pytest.fixture
def start(saved: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts services on a copy of the shop of their own."""
    folder, started = shutil.copytree(saved, tmp_path / "shop"), []

    def start(*overrides: str, token: str | None = None) -> Server:
        started.append(Server(folder, PATIENT, *overrides, token=token))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="session")
def pictures(toy: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((toy / "queries").iterdir())]


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces this size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def make_conf(**settings: Any) -> DictConfig:
    """conf/serve.yaml with other settings by their keys, in which __ stands for a dot."""
    values = OmegaConf.load(CONF / "serve.yaml")
    assert OmegaConf.is_dict(values)
    del values["hydra"], values["defaults"]
    values["index_dir"] = "SHOP"
    for key, value in settings.items():
        OmegaConf.update(values, key.replace("__", "."), value)
    return values


def read_conf(**settings: Any) -> Any:
    from beauty_bafe.serving.settings import read_settings

    return read_settings(OmegaConf.to_container(make_conf(**settings)))  # type: ignore[arg-type]
