"""Serve a saved Retriever over HTTP: beauty-bafe serve index_dir=SHOP port=8000"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from beauty_bafe import cli
from beauty_bafe.config import CONF

log = logging.getLogger("beauty_bafe")


def serve(cfg: DictConfig) -> None:
    """Serve as configured, until SIGTERM or Ctrl-C; requests in progress are answered first.

    If index_dir is empty, the retriever is built from `checkpoints` and `gallery`. Raises ValueError for a bad setting or a
    folder that holds no retriever.
    """
    if OmegaConf.is_missing(cfg, "index_dir"):
        raise ValueError("serve needs index_dir=SHOP, a folder that Retriever.save(SHOP) wrote")
    import uvicorn

    from beauty_bafe.retrieval.calibration import check_rate
    from beauty_bafe.serving.access import VARIABLE, Access, choose_host, read_token
    from beauty_bafe.serving.app import Settings, create_app
    from beauty_bafe.serving.limits import Limits
    from beauty_bafe.serving.shop import Shop, make
    from beauty_bafe.versions import Versions

    token = read_token(cfg.token_file)
    host = choose_host(cfg.host, token)
    limits = Limits(**{**cfg.limits, "kinds": tuple(cfg.limits.kinds)})
    check_rate(cfg.known_at)
    access, batch = Access(token, cfg.private), cfg.batch
    settings = Settings(access, limits, cfg.k, cfg.threshold, cfg.known_at, cfg.thumbnail, batch.size, batch.wait_ms)
    empty = Versions(Path(cfg.index_dir)).current() is None
    if empty and not (cfg.checkpoints and cfg.gallery):
        raise ValueError(
            f"'{cfg.index_dir}' holds no retriever; to build one, type checkpoints='[RUN/checkpoints/best.ckpt]' "
            f"gallery=GALLERY, or write one with Retriever.save('{cfg.index_dir}')"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    failures: list[BaseException] = []

    def load() -> Shop:
        if empty:
            make(cfg.index_dir, list(cfg.checkpoints), cfg.gallery, list(cfg.overrides))
        return Shop(cfg.index_dir, list(cfg.overrides))

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(load, settings, fail)
    server = uvicorn.Server(
        uvicorn.Config(app, host=host, port=cfg.port, log_config=None, access_log=False, server_header=False)
    )
    if token is None:
        log.info(
            f"no token, so anybody on this machine may change the catalogue; listening on {host} only. "
            f"Set {VARIABLE} or token_file=FILE to serve other machines.",
        )
    if cfg.gallery and not empty:
        log.info(f"'{cfg.index_dir}' already holds a catalogue, so {cfg.gallery} is not read")
    log.info(f"open http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{cfg.port}")
    with suppress(KeyboardInterrupt):  # raised after the requests in progress have been answered
        server.run()
    if failures:
        raise failures[0]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def _run(cfg: DictConfig) -> None:
    cli.run(serve, cfg)


def main() -> None:
    """Run with the overrides of the command line."""
    cli.check_overrides(CONF, "serve", sys.argv[1:])
    _run()


if __name__ == "__main__":
    main()
