"""Which requests are allowed: the token, and protection against requests from other web sites."""

from __future__ import annotations

import hmac
import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request

from .limits import Refused

VARIABLE = "BEAUTY_BAFE_TOKEN"


def read_token(file: str | None) -> str | None:
    """The token in `file`, otherwise in the environment; None if there is neither.

    Raises ValueError for one that is empty, too short or not ASCII, or a file that cannot be read.
    """
    try:
        token = Path(file).read_text(encoding="utf-8") if file is not None else os.environ.get(VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"token_file={file} cannot be read ({error}); type the path of a text file with the token") from error
    if token is None:
        return None
    token = token.strip()
    where = file if file is not None else VARIABLE
    if len(token) < 8 or not token.isascii():
        raise ValueError(f"the token in {where} must be at least 8 ASCII characters; openssl rand -hex 24 makes a good one")
    return token


def choose_host(host: str | None, token: str | None) -> str:
    """The address to listen on. Raises ValueError if other machines could reach a service without a token."""
    if host is None:
        return "127.0.0.1" if token is None else "0.0.0.0"
    if token is None and not _is_local(host):
        raise ValueError(
            f"host={host} lets other machines change the catalogue; set {VARIABLE} or token_file=FILE first, "
            "or leave host out to listen on 127.0.0.1 only"
        )
    return host


class Access:
    """Raises Refused for requests that are not allowed. `private`: searching needs the token as well."""

    def __init__(self, token: str | None, private: bool) -> None:
        if private and token is None:
            raise ValueError(f"private=true needs a token; set {VARIABLE} or token_file=FILE")
        self._token, self.private = token, private

    def check_reading(self, request: Request) -> None:
        """Check a request that only needs the token with private=true."""
        self._check_origin(request)
        if self.private:
            self._check_token(request)

    def check_writing(self, request: Request) -> None:
        """Check a request that changes the catalogue."""
        self._check_origin(request)
        if self._token is not None:
            self._check_token(request)

    def _check_token(self, request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = (self._token or "").encode()
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), right):
            raise Refused(
                401, "this needs a token; send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    def _check_origin(self, request: Request) -> None:
        """Without a token, any program on this machine may send requests, but no web page of another site."""
        if self._token is not None:
            return
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if not _is_local(_hostname(host)):
            raise Refused(403, "without a token the service only answers on localhost; open http://localhost:PORT")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "the request comes from a page of another web site")


def _hostname(host: str) -> str:
    """The name in a Host header; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
