"""Settings of the whole process: changed temporarily, safely with several threads; OpenMP's spinning; freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Iterations of a waiting loop. libgomp's default of 300,000 is about 3 ms by its estimate; these are 10 microseconds, about
# the cost of putting a thread to sleep and waking it. benchmarks/side_by_side.py compares other values.
SPINS = 1000


class TemporarySetting(Generic[T]):
    """Inside `with`, the setting has `value`; the last thread to leave restores the value that the first one found."""

    def __init__(self, read: Callable[[], T], write: Callable[[T], object], value: T) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._read()
                self._write(self._value)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._write(self._before)


def release_cores() -> None:
    """Let OpenMP threads that wait for each other release their core soon, for other programs on this machine.

    Otherwise they spin for milliseconds at the end of every layer, on cores that a second run needs: two concurrent runs then
    take many times as long as consecutive ones. Call it before torch is imported, as OpenMP reads its settings once. The
    user's own settings are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def keep_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system: new pages take time (benchmarks/train.md)."""
    _set_malloc({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})  # large tensors in the heap, which is never trimmed


def share_heap() -> None:
    """Let all threads use glibc's main heap and keep it, in processes that run for days (benchmarks/serving.md).

    Otherwise each thread has a heap of its own, as large as the largest pictures that it has decoded, and the memory of one
    batch is returned to the system before the next one needs it. Buffers of more than 32 MiB are still returned.
    """
    _set_malloc({_ARENA_MAX: 1, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 2**31 - 1})


# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8


def _set_malloc(parameters: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
