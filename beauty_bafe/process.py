"""Settings of the whole process, changed for a while and put back, whichever threads are at work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Turns of a waiting loop. libgomp's own 300,000 are about 3 ms by its estimate; these are 10 microseconds, about what
# putting a thread to sleep and waking it costs. benchmarks/side_by_side.py compares others.
SPINS = 1000


class HeldSetting(Generic[T]):
    """Inside `with`, the setting has `value`; the last thread to leave restores what the first one found."""

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
    """Let threads that wait for each other give up their core soon, for whatever else runs on this machine.

    OpenMP's threads otherwise spin for milliseconds at the end of every layer, on cores that a second run needs to get
    there itself: two runs then take many times as long as one after the other. To be called before torch is imported, as
    OpenMP reads its settings once; what the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
