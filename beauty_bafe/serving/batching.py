"""Collect the requests of many connections into batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .metrics import Metrics

# Processes a batch of pictures with the same kind of request: one result or exception each.
Work = Callable[[Hashable, Sequence[bytes]], Sequence[Any]]


@dataclass(frozen=True)
class _Job:
    kind: Hashable
    content: bytes
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Calls `work` with up to `size` pictures, waiting at most `wait_ms` for more of them.

    It waits only while `in_progress`, the number of requests whose pictures are being received, queued or processed, is larger
    than the number of pictures it holds: a lone request starts at once.

    Two batches are processed at once, so that one is decoded while the other is in the network. Create it inside the event
    loop.
    """

    def __init__(self, work: Work, size: int, wait_ms: float, metrics: Metrics, in_progress: Callable[[], int]) -> None:
        self._work, self._size, self._wait, self._metrics = work, size, wait_ms / 1e3, metrics
        self._in_progress, self._held = in_progress, 0
        self._queue: asyncio.Queue[_Job] = asyncio.Queue()
        self._gathering = asyncio.Lock()
        self._threads = ThreadPoolExecutor(2, "batch")
        self._tasks = [asyncio.create_task(self._run()) for _ in range(2)]

    async def submit(self, kind: Hashable, content: bytes) -> Any:
        """The result for one picture; raises the exception that `work` returned for it. Cancelled calls are left out."""
        job = _Job(kind, content, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(job)
        self._metrics.waiting.set(self._queue.qsize())
        self._held += 1
        try:
            return await job.answer
        finally:
            self._held -= 1

    async def close(self) -> None:
        """Stop; waiting requests are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown()

    async def _run(self) -> None:
        while True:
            async with self._gathering:  # one at a time, or both would gather halves
                jobs = [job for job in await self._gather() if not job.answer.done()]
            self._metrics.waiting.set(self._queue.qsize())
            for kind in dict.fromkeys(job.kind for job in jobs):
                await self._answer(kind, [job for job in jobs if job.kind == kind])

    async def _gather(self) -> list[_Job]:
        jobs = [await self._queue.get()]
        try:
            async with asyncio.timeout(self._wait):
                while len(jobs) < self._size and (self._queue.qsize() or self._in_progress() > self._held):
                    jobs.append(await self._queue.get())
        except TimeoutError:
            pass
        return jobs

    async def _answer(self, kind: Hashable, jobs: Sequence[_Job]) -> None:
        start = time.perf_counter()
        contents = [job.content for job in jobs]
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._threads, self._work, kind, contents)
        except Exception as error:
            results = [error] * len(jobs)
        self._metrics.batch_size.observe(len(jobs))
        self._metrics.stage("batch", time.perf_counter() - start)
        for job, result in zip(jobs, results, strict=True):
            self._metrics.stage("queue", start - job.since)
            if job.answer.done():
                continue
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)
