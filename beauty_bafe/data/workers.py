"""How many processes load pictures, and how they share the cores with the network."""

from __future__ import annotations

import os

import cv2

from ..process import HeldSetting

# For threads of our own around it: OpenCV's would fight over the same cores.
one_opencv_thread = HeldSetting(cv2.getNumThreads, cv2.setNumThreads, 1)


def default_workers() -> int:
    """One per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


def single_threaded_worker(_: int) -> None:
    """One thread a worker: OpenCV's own threads would fight over the same cores."""
    cv2.setNumThreads(0)


def low_priority_worker(number: int) -> None:
    """`single_threaded_worker` that gives way to the network: a step waits for the slowest thread, so each core counts.

    For processes of their own alone; niceness cannot be taken back.
    """
    single_threaded_worker(number)
    if hasattr(os, "nice"):
        os.nice(15)
