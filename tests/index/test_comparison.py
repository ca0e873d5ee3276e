"""How the exact index multiplies int8 codes: on which processors, for how many queries, rows and blocks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from beauty_bafe.index import first_pass, leading, vectors
from beauty_bafe.index.axes import Axes
from beauty_bafe.index.comparison import Comparison, quantize
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.leading import Leading
from beauty_bafe.index.survivors import QUERIES, ROWS, _multiply, survivors

from .conftest import check, gathered, names, slow

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("queries", [3, 20, 130])
def test_more_rows_than_are_compared_at_a_time(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "CELLS", 1 << 20)
    check(gathered(5003, 32, 0), gathered(queries, 32, 1), "ip", 7)


@pytest.mark.parametrize("queries", [3, 130])
def test_every_row_that_reaches_the_threshold_is_found_once(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows do; their number is no multiple of any that are compared at a time."""
    monkeypatch.setattr(leading, "CELLS", 1 << 20)
    first, asked = Leading(torch.from_numpy(gathered(5003, 32, 0)), "ip"), torch.from_numpy(gathered(queries, 32, 1))
    found = [torch.stack(part.reaching(torch.full((queries,), -5.0))) for part in first.compare(asked, 7)]
    who, row = torch.cat(found, dim=1)
    assert torch.equal((who * 5003 + row).sort().values, torch.arange(queries * 5003))


def test_few_rows_are_scored_after_changes(tmp_path: Path) -> None:
    """The bound still rules rows out in an index that has grown, shrunk and been loaded."""
    gallery, asked = gathered(900, 40, 0), torch.from_numpy(gathered(20, 40, 1))
    index = ExactIndex("ip", "cpu", "int8").fit(gallery[:500], names(900)[:500])
    index.add(gallery[500:], names(900)[500:])
    index.remove(names(900)[:100])
    index.save(tmp_path, {})
    for kept in (index, ExactIndex("ip", "cpu", "int8").load(tmp_path, {})):
        kth = (asked @ torch.from_numpy(gallery[100:]).T).topk(7).values[:, -1]
        found = [estimates.reaching(kth)[0] for estimates in kept._first.compare(asked, 7)]
        assert 7 * 20 <= len(torch.cat(found)) < 20 * 20


def test_changes_of_an_index_with_several_blocks(tmp_path: Path) -> None:
    gallery = (np.random.default_rng(0).normal(size=(900, 40)) * np.exp(-0.2 * np.arange(40))).astype(np.float32)
    asked = gallery[::90] + 0.01
    index = ExactIndex("ip", "cpu", "int8").fit(gallery[:500], names(900)[:500])
    assert isinstance(index._first, Leading)
    assert index._first.axes.blocks > 1
    for change in (lambda: index.add(gallery[500:], names(900)[500:]), lambda: index.remove(names(900)[:100])):
        change()
        found = index.search(asked, names(10), 7).positions
        assert np.array_equal(found, slow(index.vectors, asked, "ip", 7)[0])
    index.save(tmp_path, {})
    assert Leading.load(tmp_path, index.vectors, "ip") is not None
    for wrong in ("lead", "codes"):
        kept = np.load(tmp_path / f"leading_{wrong}.npy")
        np.save(tmp_path / f"leading_{wrong}.npy", -kept)
        assert Leading.load(tmp_path, index.vectors, "ip") is None
        np.save(tmp_path / f"leading_{wrong}.npy", kept)


class Case(NamedTuple):
    """Queries and rows, rotated, and what is compared of them."""

    first: Leading
    compared: Comparison
    exact: np.ndarray  # float64 (B, N)
    codes: tuple[np.ndarray, np.ndarray]  # int64 (B, D) and (N, D)


def case(queries: int, edges: tuple[int, ...], pool: ThreadPoolExecutor) -> Case:
    width = edges[-1]
    rows, asked = (torch.from_numpy(gathered(number, width, seed)) for number, seed in ((1700, 0), (queries, 1)))
    first = Leading(rows, "ip", Axes(torch.eye(width, dtype=torch.float64), edges))
    compared = Comparison(asked.double(), first.rows, "ip", first.largest, pool)
    codes = quantize(asked.double(), edges).codes.numpy().astype(np.int64), first.rows.codes.astype(np.int64)
    return Case(first, compared, (asked.double() @ rows.double().T).numpy(), codes)


VNNI = vectors.has_vnni()
CASES = [(1, (0, 41)), (3, (0, 64, 200)), (9, (0, 5, 6)), (70, (0, 41)), (130, (0, 64, 128, 333)), (64, (0, 256, 512))]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Rows are divided among as many tasks."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize(("queries", "edges"), CASES)
def test_products_of_codes(queries: int, edges: tuple[int, ...], processor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first block of all queries and rows, and then of some queries in each of the others; with VNNI and without."""
    monkeypatch.setattr(vectors, "has_vnni", lambda: VNNI and processor)
    with ThreadPoolExecutor(2) as pool:
        first, compared, _, (asked, rows) = case(queries, edges, pool)
        assert np.array_equal(compared.products(slice(7, 1693)), asked[:, : edges[1]] @ rows[7:1693, : edges[1]].T)
    sums, ready = np.empty((QUERIES, ROWS), np.int32), np.zeros(len(edges), np.uint8)
    picked = np.arange(queries)[:QUERIES][:: -(-queries // 40)]
    places = np.concatenate([picked, np.full(8, -1)])
    for tile in ((0, 500, 1011), (0, 7, 8), (max(0, queries - QUERIES), 90, 107)):
        ready[:] = 0
        for block, end in enumerate(edges[1:]):
            _multiply(compared.queries, first.rows, block, tile, places, len(picked), sums, compared.room(), ready)
            expected = asked[tile[0] + picked, :end] @ rows[tile[1] : tile[2], :end].T
            assert np.array_equal(sums[picked, : tile[2] - tile[1]], expected)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("queries", "edges"), CASES)
def test_pairs_that_reach_the_threshold(
    queries: int, edges: tuple[int, ...], known: bool, processor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that do, in order, and no other whose bound from all dimensions and the finer codes of queries is below it."""
    monkeypatch.setattr(vectors, "has_vnni", lambda: VNNI and processor)
    with ThreadPoolExecutor(2) as pool:
        _, compared, exact, (_, rows) = case(queries, edges, pool)
        part, own, their = slice(7, 1693), compared.queries, compared.rows
        exact, rows = exact[:, part], their.scales[part, None].astype(float) * rows[part]
        fine = own.fine_steps[:, None].astype(float) * own.fine
        room = own.reach[:, -1:] * their.errors[-1] * their.scales[part] + own.missed[:, None] * their.tails[0, part]
        for share in (0.01, 0.3, 0.9):
            kth = np.quantile(exact, 1 - share, axis=1).astype(np.float32)
            products = compared.products(part) if known else np.empty((0, 0), np.int32)
            who, row = (array.numpy() for array in compared.reaching(part, torch.from_numpy(kth), products))
            found = np.zeros(exact.shape, bool)
            found[who, row - part.start] = True
            assert np.array_equal(np.stack([who, row - part.start]), np.nonzero(found)), "ordered, and none twice"
            assert found[exact >= kth[:, None]].all()
            assert not found[fine @ rows.T + room < kth[:, None] - 1e-3].any()


def test_room_for_pairs() -> None:
    """As many as there are fit; with one place less, nothing is written beyond it."""
    floor, memory, none = np.full(3, -5, np.float32), np.empty(2 * 211, np.int64), np.empty((0, 0), np.int32)
    with ThreadPoolExecutor(2) as pool:
        first, compared, *_ = case(3, (0, 8, 32), pool)
    for room, number in ((210, 210), (209, -1)):
        memory[:] = -7
        found = memory[: 2 * room].reshape(2, room)
        some = (0, 70, 0)
        assert survivors(compared.queries, first.rows, floor, some, none, compared.room(), False, found) == number
        assert (memory[2 * room :] == -7).all()


def test_more_pairs_than_there_is_room_for_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are known already are not changed by the first try."""
    monkeypatch.setattr(first_pass, "FOUND", 100)
    with ThreadPoolExecutor(2) as pool:
        _, compared, exact, _ = case(20, (0, 8, 16, 32), pool)
        kth, part = torch.from_numpy(np.quantile(exact, 0.3, axis=1)), slice(0, 1700)
        who, row = compared.reaching(part, kth, compared.products(part))
        monkeypatch.undo()
        again = compared.reaching(part, kth, np.empty((0, 0), np.int32))
    assert torch.equal(torch.stack(again), torch.stack([who, row]))


def test_processors_without_vnni() -> None:
    """Numba compiles for an older one, with nothing of the newer one's instructions."""
    lines = """
import numpy as np
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.vectors import has_vnni
rows = np.random.default_rng(0).normal(size=(2000, 200)).astype(np.float32)
index = ExactIndex("ip", "cpu", "int8").fit(rows, tuple(map(str, range(2000))))
found = index.search(rows[:200], tuple(map(str, range(200))), 1).positions[:, 0]
assert (found == (rows[:200].astype(float) @ rows.T).argmax(1)).all()
print(has_vnni())
"""
    old = {"arm64": "generic", "aarch64": "generic"}.get(platform.machine(), "haswell")
    environment = os.environ | {"NUMBA_CPU_NAME": old, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr[-2000:]


def test_where_numba_can_keep_nothing() -> None:
    lines = """
import numba.core.caching as caching
caching.FunctionCache._impl_class._locator_classes = []
from beauty_bafe.index.kernels import pair_scores
import numpy as np
scores = np.empty(1, np.float32)
pair_scores(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32), np.zeros((2, 1), np.int64), False, scores)
assert scores[0] == 3
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
