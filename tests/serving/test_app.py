"""The endpoints around a stand-in for the gallery: who may ask, which settings count, what is measured."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beauty_bafe.retriever import Hit

from .conftest import BEARER, TOKEN, read_conf

pytest.importorskip("fastapi", reason="the extra `serve`")
from fastapi.testclient import TestClient

LOCAL = "http://localhost"


class StandIn:
    """A Shop of three products whose best answer has the probability 0.5, and its retriever."""

    version = "000007"

    def __init__(self) -> None:
        self.ids, self.asked, self.rates = ["a", "b", "c"], [], []
        self.served = self.retriever = self

    def __len__(self) -> int:
        return len(self.ids)

    def threshold(self, rate: float) -> float:
        self.rates.append(rate)
        return 0.5

    def answer(self, kind: Any, contents: Sequence[bytes]) -> list[Any]:
        from beauty_bafe.serving.shop import SearchResult

        self.asked.append(kind)
        hits = [Hit(name, 0.9, 0.5, None) for name in self.ids[: kind[1]]]
        return [SearchResult(hits, np.zeros((112, 112), np.uint8), self.version, self)] * len(contents)  # type: ignore[arg-type]

    def thumbnail(self, name: str, size: int) -> bytes:
        return b"\xff\xd8" + str(size).encode()

    def add(self, name: str, upload: Any) -> StandIn:
        self.ids.append(name)
        return self

    def remove(self, name: str) -> StandIn:
        self.ids.remove(name)
        return self

    def refresh(self) -> StandIn:
        return self


Start = Callable[..., TestClient]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the app with conf/serve.yaml and other `settings` by their dotted keys; `shop` is its stand-in."""
    from beauty_bafe.serving.access import Access
    from beauty_bafe.serving.app import create_app

    with ExitStack() as stack:

        def start(token: str | None = None, shop: StandIn | None = None, **settings: Any) -> TestClient:
            checked, stand_in = read_conf(**settings), shop or StandIn()

            def fail(error: BaseException) -> None:
                raise error

            app = create_app(lambda: stand_in, checked, Access(token, checked.private), fail)  # type: ignore[arg-type, return-value]
            client = stack.enter_context(TestClient(app, LOCAL, raise_server_exceptions=False))
            while client.get("/ready").status_code != 200:
                pass
            return client

        yield start


def picture(kind: str = "png", size: tuple[int, int] = (8, 4), orientation: int = 1, late: bool = False) -> bytes:
    """An encoded picture; `late`: the orientation of a PNG comes after its pixels."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", size, "red").save(stream, kind, exif=exif)
    content = stream.getvalue()
    if late:
        at = content.index(b"eXIf") - 4
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        content = content[:at] + content[end:-12] + content[at:end] + content[-12:]
    return content


def search(client: TestClient, words: str = "", headers: Any = None) -> Any:
    return client.post(f"/search{words}", content=picture(), headers={"Content-Type": "image/png"} | dict(headers or {}))


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer {TOKEN}", True),
        (f"Bearer  {TOKEN} ", True),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        ("Bearer ", False),
        ("Bearer", False),
        (f"Bearer {TOKEN[:-1]}", False),
        (f"Bearer {TOKEN}x", False),
        ("Bearer tökén", False),
    ],
)
def test_only_the_whole_token_counts(given: str, right: bool, start: Start) -> None:
    client = start(TOKEN, private=True)
    answer = search(client, headers={"Authorization": given.encode("latin-1")})
    assert answer.status_code == (200 if right else 401)
    if not right:
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_public_catalogue_is_searched_without_the_token(start: Start) -> None:
    client = start(TOKEN)
    assert search(client, headers={"Host": "shop.example"}).status_code == 200
    assert client.get("/pictures/a").status_code == 200
    assert client.delete("/catalogue/a").status_code == 401
    assert client.delete("/catalogue/a", headers=BEARER).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Host": "shop.example"}, {"Host": "[::1"}, {"Host": ""}, {"Origin": "http://["}, {"Origin": "null"}],
    ids=["host", "malformed host", "no host", "malformed origin", "no origin"],
)
def test_without_a_token_no_other_site_may_ask(headers: dict[str, str], start: Start) -> None:
    client = start()
    assert search(client, headers=headers).status_code == 403
    assert client.get("/pictures/a", headers=headers).status_code == 403
    assert search(client, headers={"Origin": LOCAL, "Host": "localhost"}).status_code == 200


def test_settings_are_defaults_of_requests(start: Start) -> None:
    shop = StandIn()
    client = start(shop=shop, k=2, threshold=0.6, thumbnail=99)
    answer = search(client).json()
    assert ([hit["id"] for hit in answer["answers"]], answer["threshold"], answer["known"]) == (["a", "b"], 0.6, False)
    answer = search(client, "?k=1&threshold=0.5").json()
    assert (len(answer["answers"]), answer["known"]) == (1, True), "what reaches the threshold is known"
    assert client.get("/pictures/a").content == b"\xff\xd899"
    assert client.get("/pictures/a").headers["cache-control"].startswith("private")
    assert shop.rates == []
    assert search(start(shop=shop, known_at=0.25)).json()["known"] is True
    assert shop.rates == [0.25]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("?treshold=0.9", "'treshold' is not a parameter in this URL; allowed are k, threshold, mask"),
        ("?threshold=nan", "^threshold: Input should be a finite number"),
        ("?k=1001", "^k: Input should be less than or equal to 1000"),
    ],
)
def test_bad_parameters(words: str, reason: str, start: Start) -> None:
    import re

    answer = search(start(), words)
    assert answer.status_code == 422
    assert re.search(reason, answer.json()["detail"])


def test_limits_are_exact(start: Start) -> None:
    content = picture()
    for settings in ({"limits__upload_bytes": len(content)}, {"limits__pixels": 32}):
        assert search(start(**settings)).status_code == 200
        smaller = {key: value - 1 for key, value in settings.items()}
        client = start(**smaller)
        assert search(client).status_code == 413
        assert client.post("/search", files={"image": content}).status_code == 413
        sent = client.post("/search", content=iter([content[:9], content[9:]]), headers={"Content-Type": "image/png"})
        assert sent.status_code == 413, "without a length in the header"


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png", "late png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_masks_are_turned_like_their_picture(kind: str, orientation: int, start: Start) -> None:
    content = picture(kind.split()[-1], (200, 100), orientation, late=kind.startswith("late"))
    answer = start().post("/search?mask=true", content=content, headers={"Content-Type": "image/png"}).json()
    mask = Image.open(io.BytesIO(base64.b64decode(answer["mask"])))
    assert mask.size == ((56, 112) if orientation in (6, 8) else (112, 56))


def test_what_is_measured(start: Start) -> None:
    client = start()
    search(client)
    client.post("/catalogue?id=new", content=picture(), headers={"Content-Type": "image/png"})
    client.get("/nowhere")
    metrics = client.get("/metrics").text
    for line in (
        'requests_total{endpoint="/search",status="200"} 1.0',
        'requests_total{endpoint="other",status="404"} 1.0',
        'seconds_count{stage="request"} 1.0',
        'seconds_count{stage="change"} 1.0',
        "index_pictures 4.0",
        "index_version 7.0",
    ):
        assert f"beauty_bafe_{line}" in metrics, line


def test_every_response_has_its_headers(start: Start) -> None:
    client = start()
    for path in ("/", "/docs", "/health", "/ready", "/pictures/a"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    for path in ("/", "/health", "/ready", "/pictures/a"):  # as load balancers ask
        assert client.head(path).status_code == 200
        assert client.get(path + "?now=1").status_code == 200, "as monitors and caches append"


def test_a_service_that_loads_says_when_to_come_back() -> None:
    import threading

    from beauty_bafe.serving.access import Access
    from beauty_bafe.serving.app import create_app

    loading = threading.Event()

    def load() -> Any:
        loading.wait(60)
        return StandIn()

    with TestClient(create_app(load, read_conf(), Access(None, False), lambda _: None), LOCAL) as client:
        answer = search(client)
        loading.set()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
