"""How requests become batches."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence

import pytest

pytest.importorskip("fastapi", reason="the extra `serve`")

LONG_MS = 60_000  # much longer than a test may take
SECONDS = 20.0


def test_a_lone_request_does_not_wait_for_others() -> None:
    assert ask(in_progress=1, wait_ms=LONG_MS) == [[b"1"]]


def test_a_request_waits_no_longer_than_it_may() -> None:
    assert ask(in_progress=2, wait_ms=50) == [[b"1"]]


def test_a_request_waits_for_those_that_are_still_being_received() -> None:
    assert ask(in_progress=3, wait_ms=LONG_MS, later=(b"2", b"3")) == [[b"1", b"2", b"3"]]


def test_a_full_batch_does_not_wait() -> None:
    assert ask(in_progress=9, wait_ms=LONG_MS, later=(b"2", b"3", b"4"), size=2) == [[b"1", b"2"], [b"3", b"4"]]


def ask(in_progress: int, wait_ms: float, later: Sequence[bytes] = (), size: int = 32) -> list[list[bytes]]:
    """The batches in which the first picture and the `later` ones are processed; each must get its own result."""
    from beauty_bafe.serving.batching import Batcher
    from beauty_bafe.serving.metrics import Metrics

    batches: list[list[bytes]] = []

    def work(kind: Hashable, contents: Sequence[bytes]) -> list[bytes]:
        batches.append(list(contents))
        return list(contents)

    async def run() -> None:
        batcher = Batcher(work, size, wait_ms, Metrics(), lambda: in_progress)
        try:
            first = asyncio.create_task(batcher.submit("search", b"1"))
            await asyncio.sleep(0.05)
            others = [asyncio.create_task(batcher.submit("search", content)) for content in later]
            async with asyncio.timeout(SECONDS):
                assert await asyncio.gather(first, *others) == [b"1", *later]
        finally:
            await batcher.close()

    asyncio.run(run())
    return sorted(batches)
