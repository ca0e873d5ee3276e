"""Manifests, which say how an artefact was made, atomic writing of files, and locks on folders."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger("beauty_bafe")


def check_manifest(file: Path, expected: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Read a manifest. Raises ValueError with the first key of `expected` whose value differs, and `remedy`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"'{file}' is not a manifest ({error}); {remedy}") from error
    for key, value in expected.items():
        if key not in found or found[key] != json.loads(json.dumps(value)):
            raise ValueError(f"'{file.parent}' was made with {key}={found.get(key)}, now it is {key}={value}; {remedy}")
    return found


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Replace a file atomically: `write` gets the path of a temporary file to fill."""
    # A name for each writer, as two may replace the same file at once.
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        write(part)
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())  # or a power cut could leave the new name with no content
        os.replace(part, file)
    except OSError as error:
        full = "; is the disk full?" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise OSError(error.errno, f"could not write '{file}': {error.strerror}{full}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Lock these folders against other processes and threads, waiting for those in use; missing ones are created.

    The file `lock` in each folder is kept; the system releases the lock when the process ends, even if it is killed.
    """
    with ExitStack() as stack:
        for folder in sorted({folder.resolve() for folder in folders}):  # in a fixed order, to avoid deadlocks
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                continue  # a read-only copy can still be read
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info(f"'{folder}' is in use by another run; waiting for it")
                lock.acquire()
            stack.callback(lock.release)
            os.utime(folder / "lock")  # the time of the last use, for beauty-bafe cache
        yield


def digest(*parts: str | bytes) -> str:
    """A hash of the parts in this order: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]
