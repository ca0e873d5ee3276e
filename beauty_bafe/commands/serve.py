"""Serve a saved Retriever over HTTP: beauty-bafe serve index_dir=SHOP port=8000"""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli
from beauty_bafe.config import CONF
from beauty_bafe.process import share_heap

log = logging.getLogger("beauty_bafe")


def serve(cfg: DictConfig) -> None:
    """Serve as configured, until SIGTERM or Ctrl-C; requests in progress are answered first.

    If index_dir is empty, the retriever is built from `checkpoints` and `gallery`. Raises ValueError for a bad setting or a
    folder that holds no retriever.
    """
    if OmegaConf.is_missing(cfg, "index_dir"):
        raise ValueError("serve needs index_dir=SHOP, a folder that Retriever.save(SHOP) wrote")
    import uvicorn

    from beauty_bafe.serving.access import VARIABLE, Access, choose_host, read_token
    from beauty_bafe.serving.app import create_app
    from beauty_bafe.serving.settings import read_settings
    from beauty_bafe.serving.shop import Shop, build_if_missing
    from beauty_bafe.versions import Versions

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = read_settings(values)
    token = read_token(settings.token_file)
    host, access = choose_host(settings.host, token), Access(token, settings.private)
    folder = settings.index_dir
    empty = Versions(Path(folder)).current() is None
    if empty and not (settings.checkpoints and settings.gallery):
        raise ValueError(
            f"'{folder}' holds no retriever; to build one, type checkpoints='[RUN/checkpoints/best.ckpt]' "
            f"gallery=GALLERY, or write one with Retriever.save('{folder}')"
        )
    listening = _listen(host, settings.port)
    share_heap()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    failures: list[BaseException] = []

    def load() -> Shop:
        if empty:
            build_if_missing(folder, settings.checkpoints, str(settings.gallery), settings.overrides)
        return Shop(folder, settings.overrides)

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(load, settings, access, fail)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False))
    if token is None:
        log.info(
            f"no token, so anybody on this machine may change the catalogue; listening on {host} only. "
            f"Set {VARIABLE} or token_file=FILE to serve other machines.",
        )
    if settings.gallery and not empty:
        log.info(f"'{folder}' already holds a catalogue, so {settings.gallery} is not read")
    log.info(f"open http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{settings.port}")
    with listening, suppress(KeyboardInterrupt):  # raised after the requests in progress have been answered
        server.run([listening])
    if failures:
        raise failures[0]


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; opened before the model is loaded, which takes longer. Raises ValueError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol left open, asyncio does not set TCP_NODELAY, and a response may wait 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere, it would share a port in use
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
        return listening
    except OSError as error:
        listening.close()
        raise ValueError(f"cannot listen on host={host} port={port} ({error}); type another, such as port=8001") from error


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def _run(cfg: DictConfig) -> None:
    cli.run(serve, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "serve", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
