"""Dockerfile, entry point, compose.yaml and prometheus.yml, as far as they run without an engine."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from .conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().splitlines()
ENTRY = ["sh", str(ROOT / "docker-entrypoint.sh")]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """What the entry point would run, from a stand-in for python that prints its arguments."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(*words: str) -> list[str]:
        return subprocess.run([*ENTRY, *words], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_dockerfile_copies_what_exists_and_runs_as_an_ordinary_user() -> None:
    lines = DOCKERFILE
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users, "no USER line"
    assert users[-1] != "root"
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert (ROOT / Path(re.findall(r'"(/app/[^"]+)"', entry)[0]).name).is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"beauty_bafe", "conf", "train.py", "retrieve.py", "constraints.txt"} & set(ignored)


def test_the_entry_point_answers(run: Callable[..., list[str]], configure: Callable[..., DictConfig]) -> None:
    script, *overrides = run("/my queries", "/answers/a,b.csv", "k=3")
    assert (ROOT / script).is_file()
    cfg = configure("retrieve", *overrides)
    assert (cfg.queries, cfg.submission, cfg.k, cfg.report) == ("/my queries", "/answers/a,b.csv", 3, False)


def test_the_entry_point_serves(run: Callable[..., list[str]], configure: Callable[..., DictConfig]) -> None:
    *program, command, first, second, third, fourth, last = run("serve", "threshold=0.6")
    assert (program, command) == (["-m", "beauty_bafe"], "serve")
    cfg = configure("serve", first, second, third, fourth, last)
    assert (cfg.index_dir, cfg.gallery, cfg.checkpoints) == ("/shop", "/gallery", ["/checkpoints/best.ckpt"])
    assert (cfg.host, cfg.port, cfg.threshold) == ("0.0.0.0", 8000, 0.6)


@pytest.mark.parametrize("words", [[], ["/queries"]])
def test_the_entry_point_says_how_it_is_used(words: list[str]) -> None:
    short = subprocess.run([*ENTRY, *words], capture_output=True, text=True, check=False)
    assert short.returncode == 2
    assert "usage: QUERIES OUTPUT.csv" in short.stderr
    assert "serve [override ...]" in short.stderr


def test_compose_fits_the_image(services: dict[str, Any]) -> None:
    shop = services["services"]["shop"]
    assert set(services["volumes"]) == {"shop", "metrics"}
    assert shop["command"] == ["serve"]
    assert "EXPOSE 8000" in DOCKERFILE
    assert shop["ports"] == ["8000:8000"]
    owned = next(line for line in DOCKERFILE if "chown" in line).split("chown")[1]
    targets = [volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in shop["volumes"]]
    entry = (ROOT / "docker-entrypoint.sh").read_text()
    for target in targets:
        assert target in entry
    assert "/shop" in owned, "the service could not write there"
    assert "BEAUTY_BAFE_TOKEN" in shop["environment"]
    compile(shop["healthcheck"]["test"][-1], "healthcheck", "exec")


def test_prometheus_asks_the_service(services: dict[str, Any]) -> None:
    mounted = services["services"]["prometheus"]["volumes"][0].split(":")[0]
    job = yaml.safe_load((ROOT / mounted).read_text())["scrape_configs"][0]
    (address,) = job["static_configs"][0]["targets"]
    name, _, port = address.partition(":")
    assert services["services"][name]["ports"] == [f"{port}:{port}"]
    assert job["metrics_path"] == "/metrics"
