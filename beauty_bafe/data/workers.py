"""The number of loading processes, and how they share the cores with the network."""

from __future__ import annotations

import os

import cv2

from ..process import TemporarySetting

# For use with our own threads: OpenCV's would compete for the same cores.
one_opencv_thread = TemporarySetting(cv2.getNumThreads, cv2.setNumThreads, 1)


def default_workers() -> int:
    """One per core that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def single_threaded_worker(_: int) -> None:
    """Limit a worker to one thread: OpenCV's own threads would compete for the same cores."""
    cv2.setNumThreads(0)


def low_priority_worker(number: int) -> None:
    """`single_threaded_worker` with a lower priority than the network, whose steps wait for the slowest thread.

    Only for separate processes, as the priority cannot be raised again.
    """
    single_threaded_worker(number)
    if hasattr(os, "nice"):
        os.nice(15)
