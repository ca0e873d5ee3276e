"""The exact index: what its first pass rounds, its bound finds again."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from beauty_bafe.index import exact, first_pass, kernels
from beauty_bafe.index.exact import ExactIndex

from .conftest import names, slow, unit

METRICS = ["ip", "l2", "l1"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "queries", "k"), [(1, 1, 1), (50, 3, 50), (777, 40, 7), (3000, 1, 100)])
def test_exact_is_exact(metric: str, kind: str, rows: int, queries: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(first_pass.CELLS, "cpu", 4096)  # several blocks
    monkeypatch.setattr(exact, "QUERIES", 16)  # several batches
    gallery, asked = unit(rows, 24, 0), unit(queries, 24, 1)
    ranking = ExactIndex(metric, "cpu", kind).fit(gallery, names(rows)).search(asked, names(queries), k)
    positions, scores = slow(gallery, asked, metric, k)
    assert np.array_equal(ranking.positions, positions)
    assert np.array_equal(ranking.scores, scores)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rows_that_bfloat16_cannot_tell_apart(metric: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows round to nearly the same numbers, lengths differ a thousandfold: only the bound finds the right ones."""
    monkeypatch.setitem(first_pass.CELLS, "cpu", 2048)
    rng = np.random.default_rng(0)
    centre = unit(1, 32, 3)
    gallery = centre + 1e-4 * rng.normal(size=(900, 32))
    gallery[::7] *= rng.uniform(1e-3, 1, (len(gallery[::7]), 1))
    gallery, queries = (scale * gallery).astype(np.float32), (scale * (centre + 1e-3 * unit(5, 32, 4))).astype(np.float32)
    ranking = ExactIndex(metric, "cpu", "bfloat16").fit(gallery, names(900)).search(queries, names(5), 7)
    positions, scores = slow(gallery, queries, metric, 7)
    assert np.array_equal(ranking.positions, positions)
    assert np.array_equal(ranking.scores, scores)


@pytest.mark.parametrize("metric", METRICS)
def test_the_floor_is_below_every_rounded_score_of_its_row(metric: str) -> None:
    """The proof itself: were a row's exact score the k-th best, its rounded score would still be looked at."""
    for seed, width in ((0, 8), (1, 300), (2, 2048)):
        gallery, queries = 3 * unit(200, width, seed), unit(20, width, seed + 9)
        index = ExactIndex(metric, "cpu", "bfloat16").fit(gallery, names(200))
        bound = first_pass.Bound(torch.from_numpy(queries), index._first)
        rounded = bound.scores(slice(0, 200)).float()
        who = torch.arange(20).repeat_interleave(200)
        true = index._score(torch.from_numpy(queries), who, torch.arange(200).repeat(20)).view(20, 200)
        floors = torch.stack([bound.floor(true[:, row]) for row in range(200)], dim=1)
        assert (rounded >= floors).all()
        if metric != "l1":
            assert (rounded - floors).median() < 0.05 * true.abs().max(), "a floor that lets everything pass proves nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "threads"), [(1, 3), (5, 2), (9, 2), (3, 64)])
def test_pairs_that_reach_the_floor(queries: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several chunks, with NaN and infinities, ordered, and with more pairs than there is room for at first."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(first_pass, "FOUND", 4)
    rows = 2 * kernels.CHUNK + 13
    scores = torch.randn(queries, rows, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[:, ::501], scores[:, 1::501], scores[:, 2::501] = torch.nan, torch.inf, -torch.inf
    floor = scores.float().nan_to_num(0).quantile(0.99, dim=1)
    floor[0] = -torch.inf if queries > 1 else floor[0]
    with ThreadPoolExecutor(2) as pool:
        estimates = first_pass._RoundedScores.__new__(first_pass._RoundedScores)
        estimates._scores, estimates._pool = scores, pool
        found = torch.stack(estimates._at_least_compiled(floor.numpy()))
    assert torch.equal(found, (scores >= floor[:, None]).nonzero().T)
    twin = first_pass._at_least(scores.where(~scores.isnan(), -torch.inf), floor.clamp(min=-1e30))
    assert torch.equal(found[:, found[0] > 0], torch.stack(twin)[:, twin[0] > 0])


@pytest.mark.parametrize("settings", ["torch.backends.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('medium')"])
def test_exact_search_beside_any_setting_of_float32_products(settings: str) -> None:
    """In a process of its own, as torch does not forget that the newer settings were used; they are found as they were."""
    lines = f"""
import numpy as np, torch
from beauty_bafe.index.exact import ExactIndex
{settings}
rows = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
index = ExactIndex(device="cpu", first_pass="float32").fit(rows, tuple(map(str, range(300))))
read = lambda: (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
before = read()
ranking = index.search(rows[:20], tuple(map(str, range(20))), 9)
assert np.array_equal(ranking.positions, np.argsort(-(rows[:20].astype(float) @ rows.T.astype(float)), axis=1)[:, :9])
assert read() == before
"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
