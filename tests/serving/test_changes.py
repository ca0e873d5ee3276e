"""The catalogue changes while it is searched, and survives a kill."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from beauty_bafe import Retriever

from .conftest import PATIENT, Server, bomb

pytest.importorskip("fastapi", reason="the extra `serve`")


def test_searches_while_the_catalogue_changes(start: Callable[..., Server], pictures: list[bytes]) -> None:
    """50 changes beside at least 200 searches; each answer lists just the products of the version that it names."""
    server, done = start(), threading.Event()
    first = frozenset(hit["id"] for hit in server.search(pictures[0], k=1000).json()["answers"])
    seen: list[tuple[str, list[str]]] = []
    held = {"000001": first}

    def search() -> None:
        number = 0
        while not done.is_set() or len(seen) < 200:
            answer = server.search(pictures[number % 20], k=1000).json()
            seen.append((answer["version"], [hit["id"] for hit in answer["answers"]]))
            number += 1

    with ThreadPoolExecutor(3) as threads:
        searches = [threads.submit(search) for _ in range(3)]
        try:
            for number in range(25):
                name, picture = f"a/twin {number}", pictures[number % 20]
                added = server.client.post("/catalogue", params={"id": name}, files={"image": picture})
                assert (added.status_code, added.json()["pictures"]) == (201, 49)
                held[added.json()["version"]] = first | {name}
                assert server.search(picture, k=1).json()["answers"][0]["id"] == name
                address = quote(name, safe="")
                assert server.client.get(f"/pictures/{address}").status_code == 200
                removed = server.client.delete(f"/catalogue/{address}")
                assert (removed.status_code, removed.json()["pictures"]) == (200, 48)
                held[removed.json()["version"]] = first
        finally:
            done.set()
        for one in searches:
            one.result()
    assert len(held) == 51
    assert len(seen) >= 200
    assert len({version for version, _ in seen}) > 10
    for version, ids in seen:
        assert len(ids) == len(held[version])
        assert set(ids) == held[version]


def test_changes_that_are_refused(server: Server, pictures: list[bytes]) -> None:
    post, delete = server.client.post, server.client.delete
    assert post("/catalogue?id=p000003", files={"image": pictures[0]}).status_code == 409
    assert post("/catalogue?id=broken", files={"image": bomb(9, 9)}).status_code == 422
    for name in ("strange", "..%2f..%2fpictures", "%2e%2e/000001", "%00", "p000003%2f..%2fp000004", "%ff"):
        assert delete(f"/catalogue/{name}").status_code == 404, name
    assert server.client.get("/ready").status_code == 200


def test_no_id_chooses_a_file(start: Callable[..., Server], pictures: list[bytes], tmp_path: Path) -> None:
    server, shop = start(), tmp_path / "shop"

    def files() -> set[str]:
        found = (str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
        return {file for file in found if not re.match(r"shop/\d{6}/", file)}

    before = files()
    for name in ("../../outside", "/tmp/outside", "ё 商品 %41", "a\\b", "current", "%2e%2e", 'a,"b"?#'):
        added = server.client.post("/catalogue", params={"id": name}, files={"image": pictures[0]})
        assert added.status_code == 201, added.text
        (new,) = files() - before - {"shop/changes.lock"}
        assert re.fullmatch(r"shop/pictures/[0-9a-f]{64}\.jpeg", new)
        found = server.search(pictures[0], k=1).json()["answers"][0]
        assert found["id"] == name
        assert server.client.get(found["picture"]).headers["content-type"] == "image/jpeg"
        assert name in Retriever.load(shop).ids
        assert server.client.delete(f"/catalogue/{quote(name, safe='')}").status_code == 200
        assert files() - before <= {"shop/changes.lock"}
    for name in (".", "..", "a\n", "a\x00", "\u202ea"):
        assert server.client.post("/catalogue", params={"id": name}, files={"image": pictures[0]}).status_code == 422


def test_two_services_share_a_catalogue(start: Callable[..., Server], pictures: list[bytes], tmp_path: Path) -> None:
    """Neither loses what the other one added, whichever changes first, and each follows the other."""
    both = [start(), start()]

    def add(server: Server, row: int) -> None:
        for number in range(4):
            name = f"{row} {number}"
            added = server.client.post("/catalogue", params={"id": name}, files={"image": pictures[4 * row + number]})
            assert added.status_code == 201, added.text

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(add, both, range(2)))
    expected = {f"{row} {number}" for row in range(2) for number in range(4)}
    assert expected <= set(Retriever.load(tmp_path / "shop").ids)
    for server in both:
        until = time.monotonic() + 600
        while (answer := server.search(pictures[0], k=1000).json())["version"] != "000009" and time.monotonic() < until:
            time.sleep(0.1)
        assert expected <= {hit["id"] for hit in answer["answers"]}
        for name in expected:  # no picture was tidied away by the other one
            assert server.client.get(f"/pictures/{name}").status_code == 200


def test_a_folder_that_was_moved_keeps_its_pictures(
    start: Callable[..., Server], pictures: list[bytes], tmp_path: Path
) -> None:
    server = start()
    assert server.client.post("/catalogue?id=new", files={"image": pictures[0]}).status_code == 201
    server.stop()
    (tmp_path / "moved").mkdir()
    (tmp_path / "shop").rename(tmp_path / "moved" / "shop")
    moved = Server(tmp_path / "moved" / "shop", PATIENT)
    try:
        assert moved.client.get("/pictures/new").headers["content-type"] == "image/jpeg"
    finally:
        moved.stop()


def test_a_catalogue_is_made_and_one_that_cannot_be_loaded_is_not_served(
    toy: Path, tiny_checkpoint: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    words = [f"checkpoints=[{tiny_checkpoint}]", f"gallery={toy / 'gallery'}"]
    server = Server(tmp_path / "made", *words, PATIENT)
    try:
        assert len(server.search(pictures[0], k=1000).json()["answers"]) == 48
        (tmp_path / "made" / "000002").mkdir()
        (tmp_path / "made" / "current").write_text("000002")
        until = time.monotonic() + 600
        while "cannot be loaded" not in server.log.read_text() and time.monotonic() < until:
            time.sleep(0.1)
        assert "still serving the previous one" in server.log.read_text()
        assert server.search(pictures[0]).json()["version"] == "000001"
    finally:
        server.stop()


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
    server.process.wait(600)
    with pytest.raises(httpx.TransportError):
        server.client.get("/health")


def test_the_last_product_stays(saved: Path, tmp_path: Path) -> None:
    from beauty_bafe.serving.limits import Refused
    from beauty_bafe.serving.shop import Shop

    folder = shutil.copytree(saved, tmp_path / "shop")
    retriever = Retriever.load(folder)
    retriever.remove(retriever.ids[1:])
    retriever.save(folder)
    with pytest.raises(Refused, match="is the last product; add another first") as refused:
        Shop(folder).remove(retriever.ids[0])
    assert refused.value.status == 409
