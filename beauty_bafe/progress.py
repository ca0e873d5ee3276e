"""Progress bars of long work."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sized
from typing import TypeVar

from rich.progress import track

log = logging.getLogger("beauty_bafe")

T = TypeVar("T")


def show_progress(items: Iterable[T], what: str, count: int, above: int) -> Iterable[T]:
    """The items, with a progress bar if `count` is more than `above` and the package's logger is at INFO, which an importing
    program controls. `count`: for items without a length, also their number.
    """
    if count <= above or not log.isEnabledFor(logging.INFO):
        return items
    return track(items, what, total=len(items) if isinstance(items, Sized) else count)
