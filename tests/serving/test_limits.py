"""What the service refuses, and why."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import ROOT
from .conftest import Server, bomb

pytest.importorskip("fastapi", reason="the extra `serve`")


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"\xff\xd8\xff" + bytes(300_000), 413, "over 200,000 bytes"),
        (bomb(60_000, 60_000), 413, "over 1,000,000 pixels|more than 1,000,000 pixels"),
        (bomb(2000, 600), 413, "2000 x 600, over 1,000,000 pixels"),
        (b"GIF89a" + bytes(50), 415, "this is gif; allowed are jpeg, png, webp"),
        (b"<html>", 415, "not a picture of a known type"),
        (b"", 422, "empty"),
        (b"\xff\xd8\xff\xe0", 422, "the jpeg file is broken"),
        (bomb(10, 10), 422, "the picture is broken: "),
    ],
    ids=["bytes", "bomb", "pixels", "kind", "not a picture", "empty", "head", "body"],
)
@pytest.mark.parametrize("form", [True, False], ids=["form", "body"])
def test_what_is_refused(content: bytes, status: int, reason: str, form: bool, server: Server) -> None:
    sent = {"files": {"image": content}} if form else {"content": content, "headers": {"Content-Type": "image/png"}}
    answer = server.client.post("/search", **sent)
    assert (answer.status_code, bool(re.search(reason, answer.json()["detail"]))) == (status, True), answer.text


def test_bad_requests_say_what_to_type(server: Server, pictures: list[bytes]) -> None:
    post = server.client.post
    for answer, status, reason in [
        (post("/search", json={}), 415, "curl -F image=@photo.jpg"),
        (post("/search", files={"photo": pictures[0]}), 422, "no file 'image'"),
        (post("/search", files={"image": pictures[0]}, data={"k": "3"}), 422, r"/search\?k=5"),
        (post("/search", content=b"x", headers={"Content-Type": "multipart/form-data"}), 422, "bad form"),
        (
            post("/search", files={"image": pictures[0]}, params={"k": 0}),
            422,
            "^k: Input should be greater than or equal to 1$",
        ),
        (post("/catalogue", files={"image": pictures[0]}), 422, "^id: Field required$"),
    ]:
        assert answer.status_code == status, answer.text
        assert re.search(reason, str(answer.json()["detail"])), answer.text


def slow(server: Server) -> socket.socket:
    """A connection that announces a picture and sends only its first bytes."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\n\x89PNG"
    )
    return connection


def test_time_and_queue_are_limited(saved: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    server = Server(Path(shutil.copytree(saved, tmp_path / "shop")), "limits.queue=4", "limits.seconds=15")
    try:
        waiting = [slow(server) for _ in range(4)]
        until = time.monotonic() + 14
        while (busy := server.search(pictures[0])).status_code != 429 and time.monotonic() < until:
            waiting.append(slow(server))  # a search that came first may have taken the place of one of them
        assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
        assert any(b" 504 " in connection.recv(100) for connection in waiting)  # the others got 429
        for connection in waiting:
            connection.close()
        while server.search(pictures[0]).status_code == 429:
            time.sleep(0.1)
        assert server.client.post("/search", content=b"", headers={"Content-Type": "image/png"}).status_code == 422
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["index_dir=nowhere"], "'nowhere' holds no retriever; to build one, type checkpoints="),
        ([], "serve needs index_dir=SHOP"),
        (["index_dir=x", "limits.queue=0"], "limits.queue=0: input should be greater than 0"),
        (["prot=8000"], "Did you mean 'port'"),
    ],
)
def test_bad_settings_are_one_line(words: list[str], reason: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "beauty_bafe", "serve", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
