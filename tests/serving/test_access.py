"""Who may ask, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import BEARER, TOKEN, Server

pytest.importorskip("fastapi", reason="the extra `serve`")


def test_a_service_without_a_token_answers_this_machine_only(server: Server, pictures: list[bytes]) -> None:
    assert "listening on 127.0.0.1 only" in server.log.read_text()
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
