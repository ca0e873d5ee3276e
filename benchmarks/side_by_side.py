"""Seconds to describe pictures alone and beside a second run of the same, for each way of waiting at OpenMP's barriers.

python benchmarks/side_by_side.py --rounds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10_000, 100_000)},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def describe(pictures: str, model: str) -> None:
    """One run: says when it is ready, waits for a line, describes the pictures and prints how long it took."""
    import time

    from omegaconf import OmegaConf

    from beauty_bafe.config import compose
    from beauty_bafe.data.catalog import Skipped, open_catalog
    from beauty_bafe.extraction.local import FeatureExtraction
    from beauty_bafe.extraction.members import load_members
    from beauty_bafe.models.descriptor import Pooling
    from beauty_bafe.models.pooling import gem

    settings = OmegaConf.to_container(compose("retrieve", [f"model={model}", "queries=Q"]).model)
    members = load_members([], {"gem": Pooling(gem, saliency=False)}, {model: settings})
    catalog = open_catalog(pictures)
    for count in (20, len(catalog)):  # the first time for what is built once
        with tempfile.TemporaryDirectory() as folder:
            if count == len(catalog):
                print("ready", flush=True)
                sys.stdin.readline()
            start = time.perf_counter()
            extraction = FeatureExtraction(folder, device="cpu")
            extraction(members, catalog.subset(range(count)), pictures, "pictures", Skipped())
            seconds = time.perf_counter() - start
    print(f"took {seconds}", flush=True)


def measure(arguments: list[str], settings: dict[str, str], runs: int, limit: float) -> float:
    """Seconds of the slowest of so many runs that start together; `limit` where it takes longer, as then all are ended."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS} | settings
    command = [sys.executable, __file__, *arguments]
    pipe = subprocess.PIPE
    children = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) for _ in range(runs)]
    for child in children:
        _read(child, "ready")
    alarm = threading.Timer(limit, lambda: [child.kill() for child in children])
    alarm.start()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    try:
        return max(float(_read(child, "took")) for child in children)
    except RuntimeError:
        if alarm.is_alive():
            raise
        return limit
    finally:
        alarm.cancel()
        for child in children:
            child.communicate()


def _read(child: subprocess.Popen[str], word: str) -> str:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError(f"a run ended before it said '{word}'; its error is above")


def main() -> None:
    """Measure every setting in turn, `rounds` times, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="folder or csv of pictures; without it, toy photos are drawn")
    parser.add_argument("--count", type=int, default=150, help="toy photos")
    parser.add_argument("--model", default="efficientnet_lite0", help="a file of conf/model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run is ended and counts as that long")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings to measure")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        describe(given.pictures, given.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        pictures = given.pictures
        if pictures is None:
            from beauty_bafe.data.toy import draw_toy

            pictures = str(draw_toy(Path(folder), products=given.count, queries=1, seed=1, size=256) / "gallery")
        arguments = ["--run", "--pictures", pictures, "--model", given.model]
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in given.only}
        for _ in range(given.rounds):
            for name in given.only:
                found[name].append(tuple(measure(arguments, SETTINGS[name], runs, given.limit) for runs in (1, 2)))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"{'':26}{'alone':>8}{'side by side':>14}   medians of {given.rounds}, seconds; {os.cpu_count()} cores")
    for name, pairs in found.items():
        alone, both = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{name:26}{alone:8.2f}{both:14.2f}")


if __name__ == "__main__":
    main()
