"""The service as its users meet it: a process of its own, on a real port."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe import Retriever

from .conftest import ROOT

pytest.importorskip("fastapi", reason="the extra `serve`")
httpx = pytest.importorskip("httpx")

TOKEN = "a-token-of-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Server:
    """A running `beauty-bafe serve`; `client` asks it."""

    def __init__(self, shop: Path, *overrides: str, token: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name != "BEAUTY_BAFE_TOKEN"}
        environment |= {"PYTHONPATH": str(ROOT)} | ({} if token is None else {"BEAUTY_BAFE_TOKEN": token})
        command = [sys.executable, "-m", "beauty_bafe", "serve", f"index_dir={shop}", f"port={self.port}", *overrides]
        self.log = shop.parent / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=shop.parent, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
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
        self.process.wait(60)


@pytest.fixture(scope="module")
def saved(toy: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "shop"
    Retriever.build(tiny_checkpoint, toy / "gallery").save(folder)
    return folder


@pytest.fixture(scope="module")
def shop(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(saved, tmp_path_factory.mktemp("served") / "shop"))


@pytest.fixture(scope="module")
def server(shop: Path) -> Iterator[Server]:
    limits = ["limits.upload_bytes=200000", "limits.pixels=1000000", "limits.queue=4", "limits.seconds=2"]
    running = Server(shop, *limits)
    yield running
    running.stop()


@pytest.fixture
def start(saved: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts services on a copy of the shop of their own."""
    folder, started = shutil.copytree(saved, tmp_path / "shop"), []

    def start(*overrides: str, token: str | None = None) -> Server:
        started.append(Server(folder, *overrides, token=token))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def pictures(toy: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((toy / "queries").iterdir())]


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces this size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_answers_are_the_retrievers(server: Server, saved: Path, pictures: list[bytes]) -> None:
    retriever = Retriever.load(saved)
    with ThreadPoolExecutor(4) as threads:  # gathered into batches, of different k
        answers = list(threads.map(lambda row: server.search(pictures[row], k=3 + row % 2).json(), range(12)))
    for row, answer in enumerate(answers):
        expected = retriever.search([pictures[row]], k=3 + row % 2)[0]
        assert [(hit["id"], hit["score"]) for hit in answer["answers"]] == [
            (hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in expected
        ]
        assert (answer["known"], answer["mask"], answer["version"]) == (None, None, "000001")
    assert server.search(pictures[0], threshold=-1).json()["known"] is True
    assert server.search(pictures[0], threshold=2).json()["known"] is False
    assert len(server.search(pictures[0], k=1000).json()["answers"]) == 48


def test_describe_and_masks(server: Server, saved: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (200, 100), "red").save(stream, "png")
    answer = server.client.post("/describe", content=stream.getvalue(), headers={"Content-Type": "image/png"}).json()
    vectors, masks = Retriever.load(saved).describe([stream.getvalue()])
    np.testing.assert_allclose(answer["descriptor"], vectors[0], atol=1e-6)
    mask = Image.open(io.BytesIO(base64.b64decode(answer["mask"])))
    assert mask.size == (112, 56)  # as wide and high as the picture, without the letterbox
    assert masks is not None
    np.testing.assert_allclose(np.asarray(mask, int), masks[0][28:84], atol=1)


def test_what_the_others_answer(server: Server, pictures: list[bytes]) -> None:
    get = server.client.get
    assert (get("/health").json(), get("/ready").json()) == ({"status": "ok"}, {"status": "ok"})
    server.search(pictures[0])
    metrics = get("/metrics").text
    assert re.search(r'requests_total{endpoint="/search",status="200"} \d', metrics)
    for name in ('seconds_count{stage="queue"}', 'seconds_count{stage="batch"}', "batch_size_count", "queue 0"):
        assert f"beauty_bafe_{name}" in metrics
    assert "beauty_bafe_index_pictures 48.0" in metrics
    assert {"/search", "/describe", "/catalogue"} <= set(get("/openapi.json").json()["paths"])
    assert get("/docs").status_code == 200
    page = get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|//\w+\.\w+/", page.text), "the page has an address outside itself"


def test_pictures_by_id_and_never_by_path(server: Server, toy: Path, shop: Path) -> None:
    found = server.client.get("/pictures/p000003")
    assert (found.status_code, found.headers["content-type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(found.content)).size == (320, 320)
    some = next((toy / "gallery").iterdir())
    inside = os.path.relpath(some, shop)
    for name in ("..%2f..%2fetc%2fpasswd", f"%2f{str(some)[1:]}", inside, inside.replace("/", "%2f"), "%2e%2e/p000003", "%00"):
        answer = server.client.get(f"/pictures/{name}")
        assert answer.status_code == 404, name
        assert "image" not in answer.headers["content-type"]


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"\xff\xd8\xff" + bytes(300_000), 413, "over 200,000 bytes"),
        (bomb(60_000, 60_000), 413, "over 1,000,000 pixels|more than 1,000,000 pixels"),
        (bomb(2000, 600), 413, "2000 x 600, over 1,000,000 pixels"),
        (b"GIF89a" + bytes(50), 415, "this is gif; allowed are jpeg, png, webp"),
        (b"<html>", 415, "no picture"),
        (b"", 422, "empty"),
        (b"\xff\xd8\xff\xe0", 422, "the jpeg file is broken"),
        (bomb(10, 10), 422, "the picture is broken: "),
    ],
    ids=["bytes", "bomb", "pixels", "kind", "no picture", "empty", "head", "body"],
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
        (post("/search", files={"image": pictures[0]}, params={"k": 0}), 422, "greater than or equal to 1"),
        (post("/catalogue", files={"image": pictures[0]}), 422, "'id'"),
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


def test_time_and_queue_are_limited(server: Server, pictures: list[bytes]) -> None:
    waiting = [slow(server) for _ in range(4)]
    time.sleep(0.5)
    busy = server.search(pictures[0])
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "1")
    assert b" 504 " in waiting[0].recv(100)
    for connection in waiting:
        connection.close()
    time.sleep(1.5)
    assert server.search(pictures[0]).status_code == 200


def test_a_service_without_a_token_answers_this_machine_only(server: Server, pictures: list[bytes]) -> None:
    assert "listening at 127.0.0.1 only" in server.log.read_text()
    for headers in ({"Host": "shop.example"}, {"Origin": "http://shop.example"}):
        for answer in (
            server.client.post("/catalogue?id=x", files={"image": pictures[0]}, headers=headers),
            server.client.delete("/catalogue/p000001", headers=headers),
        ):
            assert answer.status_code == 403
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert server.client.post("/search", files={"image": pictures[0]}, headers=own).status_code == 200


def test_logs_hold_sizes_and_outcomes_alone(server: Server, pictures: list[bytes], shop: Path) -> None:
    files = sorted(shop.parent.rglob("*"))
    form = {"image": ("secretname.jpg", pictures[0])}
    server.client.post("/search", files=form, headers={"User-Agent": "secretagent"})
    server.client.get("/pictures/secretid")
    server.client.get("/secretaddress")
    log = server.log.read_text()
    assert f"POST /search 200, {len(pictures[0])} bytes" in log
    assert "secret" not in log
    assert sorted(shop.parent.rglob("*")) == files


def test_the_token(start: Callable[..., Server], pictures: list[bytes]) -> None:
    private = start("private=true", "host=127.0.0.1", token=TOKEN)
    form = {"image": pictures[0]}
    for headers, search, add in [({}, 401, 401), ({"Authorization": "Bearer wrong"}, 401, 401), (BEARER, 200, 201)]:
        post = private.client.post
        assert post("/search", files=form, headers=headers).status_code == search
        assert post("/describe", files=form, headers=headers).status_code == search
        assert private.client.get("/pictures/p000003", headers=headers).status_code == search
        assert post("/catalogue?id=new", files=form, headers=headers).status_code == add
    assert private.client.delete("/catalogue/new").status_code == 401
    assert private.client.get("/health").status_code == 200
    assert TOKEN not in private.log.read_text()


def test_searches_while_the_catalogue_changes(start: Callable[..., Server], pictures: list[bytes]) -> None:
    """A twin of the query is added and removed; a search finds it in just the versions that hold it."""
    server, done = start(), threading.Event()
    query, seen, held = pictures[0], [], {"000001": False}

    def search() -> None:
        while not done.is_set():
            answer = server.search(query, k=1).json()
            seen.append((answer["version"], answer["answers"][0]["id"] == "a/twin"))

    with ThreadPoolExecutor(3) as threads:
        searches = [threads.submit(search) for _ in range(3)]
        try:
            for _ in range(6):
                added = server.client.post("/catalogue", params={"id": "a/twin"}, files={"image": query})
                assert (added.status_code, added.json()["pictures"]) == (201, 49)
                held[added.json()["version"]] = True
                assert server.search(query, k=1).json()["answers"][0]["id"] == "a/twin"
                assert server.client.get("/pictures/a%2Ftwin").status_code == 200
                removed = server.client.delete("/catalogue/a%2Ftwin")
                assert (removed.status_code, removed.json()["pictures"]) == (200, 48)
                held[removed.json()["version"]] = False
        finally:
            done.set()
        for one in searches:
            one.result()
    assert len({version for version, _ in seen}) > 2
    assert all(held[version] == twin for version, twin in seen)
    assert server.client.post("/catalogue?id=p000003", files={"image": query}).status_code == 409
    assert server.client.post("/catalogue?id=broken", files={"image": bomb(9, 9)}).status_code == 422
    assert server.client.delete("/catalogue/strange").status_code == 404
    assert server.client.delete("/catalogue/..%2f..%2fpictures").status_code == 404


def test_a_kill_leaves_the_last_good_version(start: Callable[..., Server], pictures: list[bytes], tmp_path: Path) -> None:
    server = start()
    server.client.post("/catalogue?id=first", files={"image": pictures[0]})
    answered = []

    def change() -> None:
        try:
            for number in range(1000):
                server.client.post(f"/catalogue?id=new{number}", files={"image": pictures[number % 20]})
                answered.append(number)
        except httpx.TransportError:
            pass

    with ThreadPoolExecutor(1) as threads:
        changing = threads.submit(change)
        while len(answered) < 3:
            time.sleep(0.01)
        server.process.kill()
        changing.result()
    again = start()
    ids = set(Retriever.load(tmp_path / "shop").ids)
    assert {"first", *(f"new{number}" for number in answered)} <= ids  # every answered change, and at most one more
    assert len(ids) - 49 - len(answered) in (0, 1)
    assert again.search(pictures[0], k=1).json()["answers"][0]["score"] == pytest.approx(1, abs=1e-4)
    held = {path for name in ids if (path := Retriever.load(tmp_path / "shop").path(name)) is not None}
    assert set((tmp_path / "shop" / "pictures").iterdir()) <= held


def test_sigterm_finishes_what_is_running(start: Callable[..., Server], pictures: list[bytes]) -> None:
    server = start()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(pictures[0])}\r\n\r\n"
    connection.sendall(head.encode() + pictures[0][:100])
    time.sleep(0.5)
    server.process.terminate()
    time.sleep(0.5)
    connection.sendall(pictures[0][100:])
    assert b" 200 " in connection.recv(100)
    server.process.wait(30)
    with pytest.raises(httpx.TransportError):
        server.client.get("/health")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["index_dir=nowhere"], "'nowhere' holds no retriever; Retriever.save"),
        ([], "serve needs index_dir=SHOP"),
        (["index_dir=x", "host=0.0.0.0"], "host=0.0.0.0 lets other machines change the catalogue"),
        (["index_dir=x", "private=true"], "private=true needs a token"),
        (["index_dir=x", "limits.kinds=[heic]"], "limits.kinds has heic; allowed are jpeg"),
        (["index_dir=x", "limits.queue=0"], "limits.queue=0 must be above 0"),
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
