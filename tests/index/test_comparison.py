"""How the exact index multiplies int8 codes: on which processors, for how many queries, rows and blocks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from beauty_bafe.index import comparison, leading
from beauty_bafe.index.comparison import Comparison, Products, quantize
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.kernels import survivors
from beauty_bafe.index.leading import Leading
from beauty_bafe.models.precision import has_integer_products

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


def test_room_for_pairs() -> None:
    """As many as there are fit; with one place less, nothing is written beyond it."""
    first, asked = Leading(torch.from_numpy(gathered(70, 32, 0)), "ip"), torch.from_numpy(gathered(3, 32, 1))
    floor, memory = np.full(3, -5, np.float32), np.empty(2 * 211, np.int64)
    with ThreadPoolExecutor(2) as pool:
        compared = Comparison(first.axes.rotate(asked), first.rows, "ip", first.largest, pool)
        known = Products(compared, slice(0, 70))
    for room, number in ((210, 210), (209, -1)):
        memory[:] = -7
        found = memory[: 2 * room].reshape(2, room)
        assert survivors(known.known.numpy(), 1, compared.queries, first.rows, floor, 0, (0, 3, 0, 70), found) == number
        assert (memory[2 * room :] == -7).all()


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_instructions_that_overflow_are_not_used(instructions: str) -> None:
    """oneDNN, limited to older instructions, adds up int8 products in 16 bits."""
    lines = """
import numpy as np
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.kernels import survivors
from beauty_bafe.models.precision import has_integer_products
rows = np.random.default_rng(0).normal(size=(2000, 200)).astype(np.float32)
index = ExactIndex("ip", "cpu", "int8").fit(rows, tuple(map(str, range(2000))))
found = index.search(rows[:200], tuple(map(str, range(200))), 1).positions[:, 0]
assert (found == (rows[:200].astype(float) @ rows.T).argmax(1)).all()
print(has_integer_products())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr[-2000:]


@pytest.mark.parametrize("queries", [1, 20, 130])
def test_processors_without_int8_products(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They find the same whole numbers by float32 products."""
    gallery, asked = gathered(900, 40, 0), gathered(queries, 40, 1)
    first = Leading(torch.from_numpy(gallery), "ip")
    rotated = first.axes.rotate(torch.from_numpy(asked))
    edges = first.axes.edges
    codes = quantize(rotated, edges).codes.long()
    for integers, tiles in itertools.product((has_integer_products(), False), (True, False)):
        monkeypatch.setattr(comparison, "has_integer_products", lambda integers=integers: integers)
        monkeypatch.setattr(comparison, "has_tile_products", lambda tiles=tiles: tiles)
        with ThreadPoolExecutor(2) as pool:
            products = Products(Comparison(rotated, first.rows, "ip", first.largest, pool), slice(100, 900))
            assert products.done == (1 if queries == 1 else first.axes.blocks if tiles and queries == 130 else 2)
            while True:
                end = edges[products.done]
                expected = codes[:, :end] @ torch.from_numpy(first.rows.codes[100:, :end]).long().T
                assert torch.equal(products.known.long(), expected)
                if products.done == first.axes.blocks:
                    break
                products._next()
        check(gallery, asked, "ip", 7)


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
