"""The service under load beside its engine, and for many minutes under good, broken, huge and slow uploads.

python benchmarks/serving.py load --checkpoint RUN/checkpoints/best.ckpt --gallery GALLERY --photos QUERIES
python benchmarks/serving.py soak --checkpoint RUN/checkpoints/best.ckpt --gallery GALLERY --photos QUERIES --minutes 20

Both start `beauty-bafe serve` as a process of its own and ask it from this one over connections that stay open. `load`: each
connection sends its next photo when the last is answered; the service and its engine take turns. `soak` ends with status 1
where an answer differs from Retriever's, a status is not the one that the upload deserves, or memory has grown by more than
5 % since the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import psutil

from beauty_bafe import Retriever
from beauty_bafe.data.catalog import open_catalog

BATCH, K = 32, 7  # as in conf/serve.yaml
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Answers = list[tuple[str, float]]
# What each kind of upload of `soak` deserves. 429: the queue is full. 504: it was too slow.
DESERVED = {"good": (200, 429), "broken": (415, 422, 429), "huge": (413, 429), "slow": (200, 429, 504)}


@contextmanager
def service(shop: Path) -> Iterator[tuple[int, psutil.Process]]:
    """A running service: its port and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "beauty_bafe", "serve", f"index_dir={shop}", f"port={port}"]
    with (shop.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(3000):
            if process.poll() is not None:
                raise RuntimeError(f"the service did not start: {(shop.parent / 'log').read_text()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                    break
            except OSError:
                time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ask(stream: Stream, content: bytes, pause: float = 0) -> tuple[int, dict]:
    """Send one picture; with a `pause`, in ten parts that far apart. Returns the status and the answer."""
    reader, writer = stream
    head = (
        f"POST /search?k={K} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode())
    step = len(content) // 10 + 1 if pause else len(content) + 1
    for start in range(0, len(content), step):
        writer.write(content[start : start + step])
        await writer.drain()
        await asyncio.sleep(pause)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), json.loads(await reader.readexactly(length))


def bomb(side: int) -> bytes:
    """A PNG that announces side x side pixels and holds none."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


async def close_the_loop(port: int, photos: list[bytes], connections: int, seconds: float) -> list[float]:
    """The seconds that every answer took."""
    took, turn, until = [], itertools.cycle(photos), time.perf_counter() + seconds

    async def client() -> None:
        async with connection(port) as stream:
            while (start := time.perf_counter()) < until:
                status, answer = await ask(stream, next(turn))
                if status != 200:
                    raise RuntimeError(f"status {status}: {answer}")
                took.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(connections)))
    return took


def engine_rate(retriever: Retriever, photos: list[bytes], seconds: float) -> float:
    """Photos per second of Retriever.search in batches, in one thread of this process."""
    batch = list(itertools.islice(itertools.cycle(photos), BATCH))
    retriever.search(batch, K)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        retriever.search(batch, K)
        count += BATCH
    return count / (time.perf_counter() - start)


def load(args: argparse.Namespace, shop: Path, photos: list[bytes]) -> None:
    retriever = Retriever.load(shop)
    print(
        "| connections | photos a second | engine, photos a second | ratio | ratio in single rounds | p50 ms | p99 ms |\n"
        + "| --- " * 7
        + "|"
    )
    with service(shop) as (port, _):
        asyncio.run(close_the_loop(port, photos, BATCH, args.seconds / 4))  # to warm up
        for connections in args.connections:
            took, rates, engines = [], [], [engine_rate(retriever, photos, args.seconds)]
            for _ in range(args.rounds):  # in turns, as other programs change both
                start = time.perf_counter()
                answers = asyncio.run(close_the_loop(port, photos, connections, args.seconds))
                rates.append(len(answers) / (time.perf_counter() - start))
                engines.append(engine_rate(retriever, photos, args.seconds))
                took += answers
            shares = [2 * rate / sum(pair) for rate, pair in zip(rates, itertools.pairwise(engines), strict=True)]
            middle, high = 1e3 * np.percentile(took, [50, 99])
            print(
                f"| {connections} | {np.mean(rates):.1f} | {np.mean(engines):.1f} | {np.mean(rates) / np.mean(engines):.2f} "
                f"| {min(shares):.2f} to {max(shares):.2f} | {middle:.0f} | {high:.0f} |",
                flush=True,
            )


def soak(args: argparse.Namespace, shop: Path, photos: list[bytes]) -> int:
    retriever = Retriever.load(shop)
    expected = [[(hit.id, hit.score) for hit in hits] for hits in retriever.search(photos, K)]
    huge = [b"\xff\xd8\xff" + bytes(20_000_000), bomb(30_000)]
    broken = [b"", b"<html>", *(photo[: len(photo) // 3] for photo in photos[:4]), bytes(1000), b"\xff\xd8\xff\xe0"]
    seen: Counter[tuple[str, int]] = Counter()
    faults: list[str] = []
    until = time.monotonic() + 60 * args.minutes

    async def send(kind: str, number: int, stream: Stream) -> None:
        row = number % len(photos)
        content = {"huge": huge[number % 2], "broken": broken[number % len(broken)]}.get(kind, photos[row])
        status, answer = await ask(stream, content, pause=3 if kind == "slow" and number % 2 else 0.3 if kind == "slow" else 0)
        seen[kind, status] += 1
        if status not in DESERVED[kind]:
            faults.append(f"{kind}: status {status}, {answer}")
        if status == 200 and not same([(hit["id"], hit["score"]) for hit in answer["answers"]], expected[row]):
            faults.append(f"{kind}: photo {row} was answered with {answer['answers']}, Retriever's are {expected[row]}")

    async def client(kind: str, first: int) -> None:
        number = first
        while time.monotonic() < until:
            try:
                async with connection(port) as stream:
                    while time.monotonic() < until:
                        await send(kind, number, stream)
                        number += 1
                        await asyncio.sleep(1 if kind == "huge" else 0)
            except (ConnectionError, asyncio.IncompleteReadError):  # the service closes on clients that it refused
                seen[kind, 0] += 1
                number += 1

    async def watch() -> None:
        for minute in range(1, int(args.minutes) + 1):
            await asyncio.sleep(60)
            memory.append(process.memory_info().rss / 2**20)
            counts = ", ".join(f"{kind} {status}: {count}" for (kind, status), count in sorted(seen.items()))
            print(f"minute {minute}: {memory[-1]:.0f} MiB; {counts}; faults: {len(faults)}", flush=True)

    async def everything() -> None:
        kinds = ["good"] * 8 + ["slow"] * 4 + ["broken"] * 2 + ["huge"]
        await asyncio.gather(watch(), *(client(kind, 7 * first) for first, kind in enumerate(kinds)))

    memory: list[float] = []
    with service(shop) as (port, process):
        asyncio.run(everything())
    growth = max(memory, default=0) / memory[0] - 1 if memory else 0
    print(f"status 0: the connection was closed. Memory rose by {100 * growth:.1f} % at most after the first minute.")
    for fault in faults[:10]:
        print(fault)
    return int(bool(faults) or growth > 0.05)


def same(found: Answers, expected: Answers) -> bool:
    """The same products in the same order, but for scores that agree to 1e-5: rounding differs between batches."""
    scores, last = dict(expected), expected[-1][1]
    pairs = zip(found, expected, strict=True)
    return all(abs(score - other) < 1e-5 and abs(score - scores.get(name, last)) < 1e-5 for (name, score), (_, other) in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "soak"])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--gallery", required=True, help="a folder of pictures, or a csv with the columns id,path")
    parser.add_argument("--photos", required=True, help="what is searched for")
    parser.add_argument("--count", type=int, default=64, help="photos")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=10, help="of each turn of the service and of the engine, in load")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each, in load")
    parser.add_argument("--minutes", type=float, default=20, help="of soak")
    parser.add_argument("--overrides", nargs="*", default=[], help="settings of the retriever, such as query=whole")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shop = Path(folder) / "shop"
        Retriever.build(args.checkpoint, args.gallery, args.overrides).save(shop)
        photos = [path.read_bytes() for path in open_catalog(args.photos).paths[: args.count]]
        return soak(args, shop, photos) if args.what == "soak" else load(args, shop, photos) or 0


if __name__ == "__main__":
    sys.exit(main())
