"""What GET /openapi.json promises, against what schemathesis makes of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Server

pytest.importorskip("fastapi", reason="the extra `serve`")
pytest.importorskip("schemathesis")


def test_the_service_keeps_what_openapi_promises(start: Callable[..., Server], tmp_path: Path) -> None:
    """No 5xx, no status, header or content that is not promised, whatever is sent."""
    server = start()  # which it may change
    address = f"http://127.0.0.1:{server.port}"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"),
        *("--max-examples", "25", "--seed", "1", "--generation-database", "none", "--request-timeout", "60"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert server.client.get("/ready").status_code == 200
