"""The small JSON beside every artefact that says how it was made, and writing files whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check_manifest(file: Path, expected: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Read a manifest. Raises ValueError naming the first key of `expected` whose value differs, and what to do."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"'{file}' is no manifest ({error}); {remedy}") from error
    for key, value in expected.items():
        if key not in found or found[key] != json.loads(json.dumps(value)):
            raise ValueError(f"'{file.parent}' was made with {key}={found.get(key)}, now it is {key}={value}; {remedy}")
    return found


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `file`, then put it in place: at any moment the old or the new one is there, whole."""
    part = file.with_name(file.name + ".part")
    try:
        write(part)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())  # or a power cut could leave the new name with no content
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write '{file}': {error.strerror}; is the disk full?") from error


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits over the parts in their order."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]
