"""The settings of the service, its token, and the port that it listens on."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, get_args

import pytest

from .conftest import TOKEN, make_conf, read_conf

pytest.importorskip("fastapi", reason="the extra `serve`")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"port": "abc"}, "port=abc: input should be a valid integer.*; the default is port=8000$"),
        ({"port": 99999}, "port=99999: input should be less than or equal to 65535"),
        ({"k": 0}, "k=0: input should be greater than or equal to 1"),
        ({"threshold": "high"}, "threshold=high: input should be a valid number.*; the default is threshold=null$"),
        ({"known_at": 1.5}, "known_at=1.5: input should be less than or equal to 1"),
        ({"private": "maybe"}, "private=maybe: input should be a valid boolean"),
        ({"thumbnail": 0}, "thumbnail=0: input should be greater than or equal to 1"),
        ({"batch__size": 0}, "batch.size=0: input should be greater than 0"),
        ({"batch__wait_ms": -1}, "batch.wait_ms=-1: input should be greater than or equal to 0"),
        ({"limits__kinds": ["heic"]}, "limits.kinds=heic: input should be 'jpeg', 'png'"),
        (
            {"limits__kinds": "jpeg"},
            r"limits.kinds=jpeg: .* list; the default is limits.kinds=\[jpeg,png,webp\]$",
        ),
        ({"limits__upload_bytes": "10MB"}, "limits.upload_bytes=10MB: input should be a valid integer"),
        ({"limits__pixels": 300_000_000}, "limits.pixels=300000000: input should be less than or equal to 178000000"),
        ({"overrides": "device=cpu"}, "overrides=device=cpu: input should be a valid list"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="(?s)^" + reason):
        read_conf(**settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gallery": "GALLERY"}, "'x' holds no retriever; to build one, type checkpoints="),
        ({"host": "0.0.0.0"}, r"host=0\.0\.0\.0 lets other machines change the catalogue"),
        ({"private": True}, "private=true needs a token"),
        ({"token_file": "nowhere"}, "token_file=nowhere cannot be read"),
    ],
)
def test_serve_starts_with_good_settings_only(
    settings: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beauty_bafe.commands.serve import serve
    from beauty_bafe.serving.access import VARIABLE

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        serve(make_conf(index_dir="x", **settings))
    assert list(tmp_path.iterdir()) == []


def test_every_kind_has_a_signature() -> None:
    from beauty_bafe.serving.limits import SIGNATURES
    from beauty_bafe.serving.settings import Kind

    assert set(SIGNATURES) == set(get_args(Kind))


def test_a_folder_may_be_named_by_a_number() -> None:
    assert read_conf(index_dir=2024).index_dir == "2024"


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beauty_bafe.serving.access import VARIABLE, choose_host, read_token

    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(VARIABLE, "eight-in-variable")
    assert read_token(None) == "eight-in-variable"
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token(str(file)) == TOKEN, "the file comes first"
    for bad in ("", "seven77", "höchstgeheim"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="at least 8 ASCII characters"):
            read_token(str(file))
    assert [choose_host(None, None), choose_host(None, TOKEN), choose_host("::1", None)] == ["127.0.0.1", "0.0.0.0", "::1"]
    assert choose_host("0.0.0.0", TOKEN) == "0.0.0.0"
    with pytest.raises(ValueError, match=r"host=10\.0\.0\.1 lets other machines change the catalogue"):
        choose_host("10.0.0.1", None)


def test_a_port_in_use() -> None:
    from beauty_bafe.commands.serve import _listen

    with _listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match=r"cannot listen on host=127\.0\.0\.1 port=.*in use"):
        _listen("127.0.0.1", taken.getsockname()[1])


def test_responses_are_sent_at_once() -> None:
    """Without TCP_NODELAY, a response in two parts waits for the client's delayed acknowledgement."""
    from beauty_bafe.commands.serve import _listen

    async def accepted() -> int:
        waiting: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            waiting.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = _listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            result = await waiting
            writer.close()
            return result

    assert asyncio.run(accepted()) == 1
