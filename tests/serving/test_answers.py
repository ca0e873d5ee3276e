"""What the service answers."""

from __future__ import annotations

import base64
import io
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beauty_bafe import Retriever

from .conftest import Server

pytest.importorskip("fastapi", reason="the extra `serve`")


def test_answers_are_the_retrievers(server: Server, saved: Path, pictures: list[bytes]) -> None:
    retriever = Retriever.load(saved)
    with ThreadPoolExecutor(4) as threads:  # gathered into batches, of different k
        answers = list(threads.map(lambda row: server.search(pictures[row], k=3 + row % 2).json(), range(12)))
    for row, answer in enumerate(answers):
        expected = retriever.search([pictures[row]], k=3 + row % 2)[0]
        assert [(hit["id"], hit["score"]) for hit in answer["answers"]] == [
            (hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in expected
        ]
        assert isinstance(answer["known"], bool)
        assert (answer["mask"], answer["version"]) == (None, "000001")
    assert server.search(pictures[0], threshold=-1).json()["known"] is True
    assert server.search(pictures[0], threshold=2).json()["known"] is False
    assert len(server.search(pictures[0], k=1000).json()["answers"]) == 48


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heaps")
def test_threads_share_one_heap(server: Server, pictures: list[bytes]) -> None:
    """glibc reserves 64 MiB for another heap, of which only the beginning can be written."""
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda picture: server.search(picture).status_code == 200, pictures[:12]))
    others, before, start = 0, "", 0
    for line in Path(f"/proc/{server.process.pid}/maps").read_text().splitlines():
        span, access = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        others += (before, access, last - start) == ("rw-p", "---p", 64 << 20)
        before, start = access, first
    assert others == 0


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
    for address in ("/", "/docs"):
        page = get(address)
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert not re.search(r"https?://|//\w+\.\w+/", page.text), f"{address} has an address outside itself"
    for path, methods in get("/openapi.json").json()["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b>{path}</h3>" in get("/docs").text


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
