"""The exact index with a first pass over leading dimensions in int8: the same answers, whatever the rows look like."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beauty_bafe.index import leading
from beauty_bafe.index.axes import Axes, learn_axes
from beauty_bafe.index.comparison import FINER
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.index.leading import Leading

from .conftest import check, gathered, names, slow, unit

METRICS = ["ip", "l2"]
pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("draw", [gathered, unit])
@pytest.mark.parametrize(
    ("rows", "queries", "k"), [(1, 1, 1), (50, 3, 50), (777, 40, 7), (3000, 1, 100), (900, 15, 7), (400, 130, 7)]
)
@pytest.mark.parametrize("width", [1, 5, 32, 41])
def test_it_is_exact(metric: str, draw, rows: int, queries: int, k: int, width: int) -> None:  # type: ignore[no-untyped-def]
    check(draw(rows, width, 0), draw(queries, width, 1), metric, k)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [3, 30])
@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1e-3, 1e4, 1e15])
def test_near_ties_duplicates_zeros_and_lengths_of_any_size(metric: str, queries: int, scale: float) -> None:
    rng = np.random.default_rng(0)
    centre = unit(1, 32, 3)
    gallery = centre + 1e-4 * rng.normal(size=(900, 32))
    gallery[::7] *= rng.uniform(1e-3, 1, (len(gallery[::7]), 1))
    gallery[1::9] = gallery[1]
    gallery[5] = 0
    asked = centre + 1e-3 * unit(queries, 32, 4)
    asked[1] = 0
    asked[2] = gallery[1]
    up = np.float32(min(1 / scale, 1e15)) if scale < 1 else np.float32(1)  # so that scores are not all 0
    check((scale * gallery).astype(np.float32), (up * asked).astype(np.float32), metric, 7)


def on_axes(gallery: np.ndarray, metric: str, given: Axes) -> ExactIndex:
    """An index whose first pass has these axes, whatever the gallery's own are."""
    index = ExactIndex(metric, "cpu", "int8").fit(gallery, names(len(gallery)))
    index._first = Leading(torch.from_numpy(gallery), metric, given)
    return index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [3, 30])
def test_rows_at_the_bound(metric: str, queries: int) -> None:
    """The best row has nothing in the leading dimensions, and all it has after them points where the query does."""
    gallery, asked = gathered(2000, 32, 0), gathered(queries, 32, 1)
    learned = learn_axes(torch.from_numpy(gallery))
    assert learned.rotation is not None
    rotation, best = learned.rotation.numpy(), (asked.astype(float) @ gallery.T).max(1)
    for number in range(queries):
        tail = np.where(np.arange(32) >= (8, 16, 24)[number % 3], asked[number] @ rotation, 0)
        row = rotation @ (tail * (1 + 1e-6) * best[number] / (tail @ tail))
        gallery[100 + number] = row if metric == "ip" else asked[number] + 1e-3 * row / np.linalg.norm(row)
    index = on_axes(gallery, metric, learned)
    for k in (1, 7):
        ranking = index.search(asked, names(queries), k)
        positions, scores = slow(gallery, asked, metric, k)
        assert np.array_equal(ranking.positions, positions)
        assert np.array_equal(ranking.scores, scores)


def check_bound(index: ExactIndex, asked: np.ndarray) -> float:
    """The proof itself: were a row's exact score the k-th best, the row would be looked at. Returns how many others would."""
    queries, rows, vectors = len(asked), len(index), torch.from_numpy(asked)
    who = torch.arange(queries).repeat_interleave(rows)
    true = index._score(vectors, who, torch.arange(rows).repeat(queries)).view(queries, rows)
    comparison = index._first.compare(vectors, 7)
    estimates, kept = next(comparison), 0
    for row in range(rows):
        query, found = estimates.reaching(true[:, row])
        assert set(range(queries)) <= set(query[found == row].tolist())
        kept += len(found)
    return kept / (queries * rows**2)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [3, 20])
def test_no_row_is_ruled_out_that_reaches_the_threshold(metric: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "CELLS", 1 << 20)
    for width in (24, 200):
        index = ExactIndex(metric, "cpu", "int8").fit(3 * gathered(150, width, 0), names(150))
        share = check_bound(index, gathered(queries, width, 9))
        assert share < 0.6, "half of all rows are above a threshold, the other half must be ruled out nearly always"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize("length", [1, 1_000_000])
def test_rounding_of_the_sums_rules_out_no_row(metric: str, queries: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole numbers, which int8 holds exactly: only the rounding of float32 sums, which cancel, is left."""
    monkeypatch.setattr(leading, "CELLS", 1 << 20)
    rng = np.random.default_rng(0)
    gallery = rng.integers(-127, 128, size=(120, 1000)).astype(np.float32)
    gallery[:, 0] = 127
    asked = rng.normal(size=(queries, 1000))
    asked -= asked @ np.linalg.pinv(gallery[:60]) @ gallery[:60]  # half of the scores are nearly 0
    asked = (length * asked).astype(np.float32)
    check_bound(on_axes(gallery, metric, Axes(torch.eye(1000, dtype=torch.float64), (0, 900, 1000))), asked)


@pytest.mark.parametrize("queries", [3, 20, 130])
@pytest.mark.parametrize("edges", [(0, 256), (0, 100, 256), (0, 64, 128, 256)])
def test_rounded_queries_whose_errors_all_point_one_way(queries: int, edges: tuple[int, ...]) -> None:
    """Every number of the query is rounded by nearly half a step, and the signs of a row make all of it count."""
    signs = np.array([[1.0]])
    while len(signs) < 256:
        signs = np.block([[signs, signs], [signs, -signs]])
    plain = Axes(torch.eye(256, dtype=torch.float64), edges)
    for half in (0.499, 0.501):
        asked = np.tile(1 + half * signs[1], (queries, 1)).astype(np.float32)
        asked[:, edges[:-1]] = 127
        for metric in METRICS:
            ranking = on_axes(signs.astype(np.float32), metric, plain).search(asked, names(queries), 256)
            positions, scores = slow(signs, asked, metric, 256)
            assert np.array_equal(ranking.positions, positions)
            assert np.array_equal(ranking.scores, scores)


@pytest.mark.parametrize("edges", [(0, 201), (0, 100, 201)])
def test_codes_much_longer_than_their_row(edges: tuple[int, ...]) -> None:
    """All coordinates but the one that sets the scale are rounded up by half a step, to twice their size."""
    row, query = np.full((1, 201), 0.501, np.float32), np.full((3, 201), -0.501, np.float32)
    row[0, ::100], query[:, ::100] = 127, 0
    plain = Axes(torch.eye(201, dtype=torch.float64), edges)
    assert (on_axes(row, "ip", plain).search(query, names(3), 1).positions == 0).all()


@pytest.mark.parametrize("queries", [20, 130])
def test_rounding_errors_of_later_blocks_count(queries: int) -> None:
    """Rows whose rounding errors all lie after the first block, and queries that are 0 in it."""
    rng = np.random.default_rng(0)
    gallery = 0.49 * rng.choice([-1, 1], size=(50, 32)).astype(np.float32)
    asked = np.sign(gallery[np.arange(queries) % 50])
    gallery[:, :8], asked[:, :8], gallery[:, 8] = 0, 0, 127
    index = on_axes(gallery, "ip", Axes(torch.eye(32, dtype=torch.float64), (0, 8, 32)))
    assert np.array_equal(index.search(asked, names(queries), 1).positions, slow(gallery, asked, "ip", 1)[0])


@pytest.mark.parametrize("queries", [3, 20])
def test_rounding_errors_of_a_query_add_up_over_blocks(queries: int) -> None:
    """The best row points where the query is rounded, in two blocks, which for 20 queries are multiplied for all rows.

    Where the others have something `aside`, all but one are ruled out after these; the third block is multiplied row by row.
    """
    asked, gallery = np.zeros((queries, 192), np.float32), np.zeros((200, 192), np.float32)
    asked[:, ::64], asked[:, 1:64], asked[:, 65:128] = 127, 0.49, 0.49
    gallery[0, 1:64] = gallery[0, 65:128] = 1
    for others, (least, aside) in itertools.product((0.2, 0.35, 0.4, 0.45), ((0.98, 0), (0.7, 0.2))):
        gallery[1:, 0], gallery[1:, 64] = others * np.array([1, *[least] * 198]) + aside, -aside
        index = on_axes(gallery, "ip", Axes(torch.eye(192, dtype=torch.float64), (0, 64, 128, 192)))
        assert np.array_equal(index.search(asked, names(queries), 1).positions, slow(gallery, asked, "ip", 1)[0])


@pytest.mark.parametrize("queries", [3, 20])
def test_finer_codes_of_a_query_are_rounded_too(queries: int) -> None:
    """By nearly half of their step, and the best row points that way."""
    asked, gallery = np.zeros((queries, 192), np.float32), np.zeros((200, 192), np.float32)
    asked[:, 0], asked[:, 1:64], gallery[0, 1:64] = 127, 0.49 / FINER, 1
    for others in (0.6, 0.9, 0.99):
        gallery[1:, 0] = others * gallery[0] @ asked[0] / 127
        index = on_axes(gallery, "ip", Axes(None, (0, 64, 192)))
        assert np.array_equal(index.search(asked, names(queries), 1).positions, slow(gallery, asked, "ip", 1)[0])


@pytest.mark.parametrize("queries", [3, 20])
def test_the_largest_products_fit(queries: int) -> None:
    """All codes of queries and rows are the largest ones."""
    gallery = np.full((30, 2200), 0.5, np.float32)
    gallery[7] = 1
    assert (
        ExactIndex("ip", "cpu", "int8")
        .fit(gallery, names(30))
        .search(gallery[:1].repeat(queries, 0), names(queries), 1)
        .positions
        == 7
    ).all()


def test_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match=r"int8 takes up to 133144 dimensions, vectors have 133145; type index.first_pass=fl"):
        Leading(torch.zeros(1, 133_145), "ip")


def test_rounding_errors_of_a_query_count_for_rows_that_lie_in_its_first_block() -> None:
    asked, gallery = np.zeros((3, 192), np.float32), np.zeros((200, 192), np.float32)
    asked[:, 0], asked[:, 1:64] = 127, 0.49
    gallery[1:, 0], gallery[0, 1:64] = 0.2 * np.linspace(0.5, 1, 199), 1
    index = on_axes(gallery, "ip", Axes(None, (0, 64, 192)))
    assert np.array_equal(index.search(asked, names(3), 1).positions, slow(gallery, asked, "ip", 1)[0])


@pytest.mark.parametrize("rounded", [slice(0, 40), slice(40, 80)])
def test_rounding_errors_count_when_the_gallery_grows(rounded: slice) -> None:
    """Only the rows before, or only the new ones, are rounded."""
    gallery = np.random.default_rng(0).choice([-1, 1], size=(80, 32)).astype(np.float32)
    asked = gallery[rounded][:20].copy()
    gallery[rounded] *= 0.49
    gallery[:, 0], asked[:, 0] = 127, 0
    exact = np.ones(80, bool)
    exact[rounded] = False
    gallery[exact, 1:] = 0
    gallery[exact, 1] = 5
    index = on_axes(gallery[:40], "ip", Axes(None, (0, 32)))
    index.add(gallery[40:], names(80)[40:])
    assert np.array_equal(index.search(asked, names(20), 1).positions, slow(gallery, asked, "ip", 1)[0])


def test_lengths_beyond_float32() -> None:
    """The length of four rows overflows, but their rounding errors do not."""
    signs = np.array([[1, 1, -1, -1], [-1, -1, -1, -1], [-1, 1, -1, 1], [-1, 1, 1, -1], [0, 0, 0, 0]])
    gallery = (2.0**127 * signs).astype(np.float32)
    gallery[4, 0] = 0.5
    query = 2.0**-20 * np.array([1 + 2.0**-8, 1 + 2.0**-7 + 2.0**-8 - 2.0**-20, *[1 + 2.0**-8 + 2.0**-20] * 2])
    rng = np.random.default_rng(0)
    for _ in range(20):
        queries = (query * rng.uniform(1, 1 + 2.0**-9) * rng.uniform(0.5, 2, (16, 1))).astype(np.float32)
        for k in range(1, 6):
            check(gallery, queries, "ip", k)


@pytest.mark.parametrize("queries", [3, 20, 130])
def test_a_finite_length_near_the_end_of_float32(queries: int) -> None:
    """Its length and rounding errors together are beyond it, and so is its product with the first block of a query."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(20, 32))
    gallery = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    asked = np.tile(gallery[5], (queries, 1))
    for part, factor in ((slice(0, 8), -1.3), (slice(8, 32), 0.8)):
        asked[:, part] *= factor / (gallery[5, part] @ gallery[5, part])
    asked += 0.001 * rng.normal(size=asked.shape)
    gallery[5] *= 0.9995 * float(np.finfo(np.float32).max)
    gallery, asked = gallery.astype(np.float32), asked.astype(np.float32)
    index = on_axes(gallery, "ip", Axes(torch.eye(32, dtype=torch.float64), (0, 8, 32)))
    assert np.array_equal(index.search(asked, names(queries), 20).positions, slow(gallery, asked, "ip", 20)[0])


@pytest.mark.parametrize("queries", [3, 20])
@pytest.mark.parametrize(("rows", "length"), [(3e37, 1e-44), (1e30, 1e-38), (1e-44, 3e37), (1e37, 1e-5)])
def test_lengths_at_the_ends_of_float32(queries: int, rows: float, length: float) -> None:
    gallery, asked = rows * gathered(50, 40, 0).astype(float), length * gathered(queries, 40, 1).astype(float)
    check(-np.abs(gallery).astype(np.float32), np.abs(asked).astype(np.float32), "ip", 7)


@pytest.mark.parametrize("width", [6, 300])
def test_rows_that_are_not_finite_disturb_no_others(width: int) -> None:
    gallery, asked = gathered(60, width, 0), gathered(20, width, 1)
    broken = gallery.copy()
    broken[7, 0], broken[9, 1] = np.nan, -np.inf
    index = ExactIndex("ip", "cpu", "int8").fit(broken, names(60))
    index.remove(("n7", "n9"))
    kept = np.delete(gallery, [7, 9], axis=0)
    assert np.array_equal(index.search(asked, names(20), 7).positions, slow(kept, asked, "ip", 7)[0])


@pytest.mark.parametrize("queries", [3, 20])
def test_a_row_whose_score_is_infinite_is_not_ruled_out(queries: int) -> None:
    gallery, asked = gathered(60, 30, 0), np.abs(gathered(queries, 30, 1))
    gallery[9, 1] = np.inf
    index = ExactIndex("ip", "cpu", "int8").fit(gallery, names(60))
    with pytest.raises(ValueError, match=r"not finite: \[inf"):
        index.search(asked, names(queries), 7)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 60), st.integers(1, 20), st.floats(0, 3), st.booleans(),
    st.sampled_from(METRICS),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_rows(seed: int, width: int, rows: int, queries: int, decay: float, repeat: bool, metric: str) -> None:
    rng = np.random.default_rng(seed)
    shape = np.exp(-decay * np.arange(width))
    gallery = (rng.normal(size=(rows, width)) * shape).astype(np.float32)
    if repeat:
        gallery = np.round(gallery, 1)[rng.integers(rows, size=rows)]
    asked = (rng.normal(size=(queries, width)) * shape).astype(np.float32)
    check(gallery, asked, metric, min(rows, 5))
