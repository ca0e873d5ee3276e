"""Pairs of aligned pictures, training on them, comparing them, and the command."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from beauty_bafe.commands import verifier as command
from beauty_bafe.commands.retrieve import retrieve
from beauty_bafe.data.catalog import Catalog
from beauty_bafe.extraction.features import Features, unit
from beauty_bafe.index.exact import ExactIndex
from beauty_bafe.rerank import dense, dense_training
from beauty_bafe.rerank.altered import alter
from beauty_bafe.rerank.appearance import APPEARANCE
from beauty_bafe.rerank.candidates import Candidates, SearchContext
from beauty_bafe.rerank.dense import (
    HIGHEST,
    LOWEST,
    Canvas,
    CanvasExtractor,
    Pair,
    compare_pictures,
    pair_up,
    score_pairs,
    stack_pairs,
)
from beauty_bafe.rerank.dense_training import View, collect_views, draw_pairs, train_pair_network
from beauty_bafe.rerank.keypoints import Keypoints, Sift
from beauty_bafe.rerank.matching import Geometry, NearestNeighbours, fit_geometries
from beauty_bafe.rerank.pair_network import SIDE, PairNetwork
from beauty_bafe.rerank.verification import Verification
from tests.textured import HOMOGRAPHY, SIZE, pair, product, textured, warped

DETECTOR, MATCHER = Sift(SIZE, 300), NearestNeighbours(0.9)


@pytest.fixture(scope="module")
def network() -> PairNetwork:
    torch.manual_seed(0)
    return PairNetwork().eval()


@pytest.fixture
def saved(network: PairNetwork, tmp_path: Path) -> str:
    save_file({name: part.contiguous() for name, part in network.state_dict().items()}, tmp_path / "verifier.safetensors")
    return str(tmp_path / "verifier.safetensors")


def test_pairs_are_aligned_by_keypoints_if_there_are_enough() -> None:
    extractor = CanvasExtractor(DETECTOR)
    candidate, query = (extractor.extract(part, None) for part in (textured(4), warped(textured(4))))
    blank = extractor.extract(np.full((SIZE, SIZE, 3), 255, np.uint8), None)
    shift = (SIDE / SIZE - 1) / 2
    scale = np.array([[SIDE / SIZE, 0, shift], [0, SIDE / SIZE, shift], [0, 0, 1]])
    geometries = fit_geometries(query.keypoints, [candidate.keypoints, blank.keypoints], MATCHER, SIZE)
    same, none = pair_up(query, [candidate, blank], geometries, SIZE)
    corners = np.array([[[50.0, 50], [110, 50], [110, 110], [50, 110]]])
    known = scale @ np.linalg.inv(HOMOGRAPHY) @ np.linalg.inv(scale)
    np.testing.assert_allclose(*(cv2.perspectiveTransform(corners, matrix) for matrix in (same.matrix, known)), atol=2.0)
    assert np.expm1(same.inliers) > 20
    assert none.inliers == 0
    queries, candidates, _, by_keypoints = stack_pairs([same, none])
    assert by_keypoints.tolist() == [True, False]
    inside = candidates[0, 3] > 127
    before = np.abs(same.query[..., :3].astype(float) - same.candidate[..., :3]).mean()
    after = (queries[0, :3].float() - candidates[0, :3].float()).abs()[:, inside].mean()
    assert after < before / 2


def test_a_kept_canvas_is_the_same(tmp_path: Path) -> None:
    extractor = CanvasExtractor(DETECTOR)
    first = extractor.extract(textured(0), np.full((56, 56), 255, np.uint8))
    again = extractor.unpack(extractor.pack(first))
    np.testing.assert_array_equal(again.pixels, first.pixels)
    np.testing.assert_array_equal(again.keypoints.descriptors, first.keypoints.descriptors)


def make_views(count: int) -> list[View]:
    """Products seen darker and blurred, beside other products."""
    views = []
    for seed in range(count):
        seen = product(seed)
        seen[..., :3] = cv2.GaussianBlur(cv2.convertScaleAbs(seen[..., :3], alpha=0.8), (0, 0), 0.8)
        views.append(View(pair(seen, product(seed)), [pair(seen, product(count + seed + step)) for step in range(4)]))
    return views


def test_pairs_of_a_step() -> None:
    views = make_views(3)
    for seed in range(8):
        pairs, right = draw_pairs(views[0], views, np.random.default_rng(seed))
        assert right == [True] + [False] * (len(right) - 1)
        others = [any(np.array_equal(one.candidate, other.candidate) for other in views[0].others) for one in pairs]
        assert sum(others) == 3, "some of the others, each once"
        copies = [one for one, known in zip(pairs[1:], others[1:], strict=True) if not known]
        assert len(copies) <= 1
        assert np.array_equal(pairs[0].candidate, views[0].right.candidate)
        assert all(not np.array_equal(copy.candidate, views[0].right.candidate) for copy in copies)
        assert len({one.candidate.tobytes() for one in pairs}) == len(pairs)


def test_training_tells_products_and_altered_copies_apart() -> None:
    kept: list[dict[str, Any]] = []
    views = make_views(24)
    trained = train_pair_network(views, 8, 0, save=lambda state: kept.append(deepcopy(state)))
    rng = np.random.default_rng(9)
    fresh = make_views(40)[24:]
    right = score_pairs(trained, [view.right for view in fresh])
    wrong = score_pairs(trained, [view.others[0] for view in fresh])
    copies = [alter(view.right.candidate, product(99), rng) for view in fresh]
    altered = score_pairs(
        trained, [view.right._replace(candidate=copy) for view, copy in zip(fresh, copies, strict=True) if copy is not None]
    )
    assert (right[:, None] > wrong).mean() > 0.95
    assert (right[:, None] > altered).mean() > 0.7
    assert [state["epoch"] for state in kept] == list(range(1, 9))

    resumed = train_pair_network(views, 8, 0, state=kept[5])
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-5, rtol=1e-4)
    frozen = PairNetwork().stem.state_dict()
    assert all(torch.equal(trained.stem.state_dict()[name], value) for name, value in frozen.items())
    with pytest.raises(
        ValueError, match=r"for 1 street views, the answers include the right photo and another one.*candidates=NUMBER"
    ):
        train_pair_network(views[:1], 1, 0)


def colour_of(_: PairNetwork, pairs: list[Pair]) -> np.ndarray:
    """Another number for each candidate, in place of a logit."""
    return np.array([one.candidate[..., :3].mean() for one in pairs]) / 100 - 1


def test_half_of_what_is_compared_has_most_inliers(network: PairNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "score_pairs", colour_of)
    none = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    query, *candidates = (Canvas(none, product(seed)) for seed in (1, 1, 2, 3, 4, 5))
    geometries = [None, None, Geometry(9, np.eye(3)), None, Geometry(3, np.eye(3))]
    every = compare_pictures(network, query, candidates, geometries, SIZE, 9)
    np.testing.assert_allclose(every, [one.pixels[..., :3].mean() / 100 - 1 for one in candidates])
    assert len(set(every)) == 5
    for most, rows in [(1, [0]), (2, [2, 0]), (3, [2, 0, 1]), (4, [2, 4, 0, 1])]:
        some = compare_pictures(network, query, candidates, geometries, SIZE, most)
        np.testing.assert_array_equal(some[rows], every[rows])
        others = np.setdiff1d(np.arange(5), rows)
        assert (some[others] == some[rows].min()).all()


def test_logits_are_bounded(network: PairNetwork) -> None:
    none = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    query = Canvas(none, product(1))
    sure = deepcopy(network)
    for bias, expected in [(100.0, HIGHEST), (-100.0, LOWEST)]:
        sure.decide[-1].bias.data.fill_(bias)
        assert compare_pictures(sure, query, [query, query], [None, None], SIZE, 8).tolist() == [expected] * 2


def test_the_network_adds_its_agreement_to_the_evidence(network: PairNetwork, saved: str) -> None:
    step = Verification(6, None, DETECTOR, MATCHER, network=saved)
    assert step.kinds == (*APPEARANCE, "agreement")
    extractor = CanvasExtractor(DETECTOR)
    query, *candidates = (extractor.extract(part, None) for part in (warped(textured(4)), textured(4), textured(5)))
    found = step._score_with_network(query, candidates)
    without = Verification(6, None, DETECTOR, MATCHER)
    assert without.kinds == APPEARANCE
    plain = without._score(query, candidates)
    np.testing.assert_array_equal(found[:, :4], plain[:, :4])
    np.testing.assert_array_equal(found[:, 5:], plain[:, 4:])
    assert found[0, 0] > 3
    geometries = fit_geometries(query.keypoints, [one.keypoints for one in candidates], MATCHER, SIZE)
    np.testing.assert_allclose(found[:, 4], compare_pictures(network, query, candidates, geometries, SIZE, 8), atol=0.05)


def test_a_file_that_is_missing_or_of_another_network_is_refused(tmp_path: Path) -> None:
    make = partial(Verification, 6, None, DETECTOR, MATCHER)
    with pytest.raises(ValueError, match=r"network='.*none.safetensors' is not a file; type network=FILE"):
        make(network=str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="compared=0: type how many"):
        make(compared=0)
    save_file({"stem.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("no network")
    for name in ("other.safetensors", "notes.txt"):
        with pytest.raises(ValueError, match=rf"network='.*{name}' holds no such network .*; type network=FILE"):
            make(network=str(tmp_path / name))
    with pytest.raises(ValueError, match="type every_turn=false, or network=null"):
        make(every_turn=True, network=str(tmp_path / "other.safetensors"))


def test_the_command_trains_what_retrieve_uses(
    toy: Path, tiny_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig], capsys, monkeypatch
) -> None:
    shared = [f"checkpoints=[{tiny_checkpoint}]", f"gallery={toy / 'gallery'}", f"features={tmp_path / 'features'}"]
    shared += ["device=cpu", "precision=32-true", "num_workers=0"]
    words = [*shared, f"output_dir={tmp_path / 'run'}", "rehearsal.views=12", "epochs=2", "rounds=1", "candidates=48"]
    steps: list[int] = []

    def draw(view: View, views: list[View], rng: np.random.Generator) -> tuple[list[Pair], list[bool]]:
        steps.append(len(views))
        if len(steps) == limit:
            raise KeyboardInterrupt
        return draw_pairs(view, views, rng)

    monkeypatch.setattr(dense_training, "draw_pairs", draw)
    limit = 14  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        command.verifier(configure("verifier", *words))
    assert steps == [12] * 14
    limit = -1
    file = command.verifier(configure("verifier", *words))
    assert steps == [12] * 26, "the first epoch is not repeated"
    assert file == tmp_path / "run" / "verifier.safetensors"
    assert len(list((tmp_path / "run" / "views-0").glob("*.png"))) == 12
    whole = command.verifier(configure("verifier", *words, f"output_dir={tmp_path / 'whole'}"))
    assert whole.read_bytes() == file.read_bytes()
    for other in ("epochs=3", "query=closer", "rerank.sift_verified.detector.closer=null"):
        with pytest.raises(ValueError, match=r"was made with .*; type another output_dir=FOLDER"):
            command.verifier(configure("verifier", *words, other))
    capsys.readouterr()

    answer = ["rerank=sift_verified", f"rerank.sift_verified.network={file}", f"queries={toy / 'queries'}", "report=false"]
    metrics = retrieve(configure("retrieve", *shared, *answer, f"truth={toy / 'truth.csv'}", f"output_dir={tmp_path / 'out'}"))
    assert 0 < metrics["mAP@7_by_hits"] <= 1
    printed = capsys.readouterr().out
    assert re.search(r"weights learned from 8 street views: inliers \S+ lightness \S+ chroma \S+ colour \S+ agreement", printed)


def test_the_command_says_what_it_needs(tiny_checkpoint: Path, tmp_path: Path, configure: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="verifier needs gallery=DIR_OR_CSV and checkpoints="):
        command.verifier(configure("verifier", "gallery=G"))
    words = ["gallery=G", f"checkpoints=[{tiny_checkpoint}]", f"output_dir={tmp_path / 'run'}"]
    for wrong, expected in [
        ("epochs=0", "epochs=0: type 1 or more"),
        ("candidates=1", "candidates=1: type 2 or more"),
        ("rehearsal.views=0", "rehearsal.views=0: type 1 or more"),
        ("rerank=sift", "rerank=sift: type one re-ranking by keypoints, without a network, .* rerank=sift_verified"),
        ("rerank=none", "rerank=none: type one re-ranking"),
        ("rerank=[sift_verified,query_expansion]", "rerank=sift_verified,query_expansion: type one"),
    ]:
        with pytest.raises(ValueError, match=expected):
            command.verifier(configure("verifier", *words, wrong))


def test_a_gallery_without_backdrops_is_refused(
    tiny_checkpoint: Path, write_picture: Callable[..., Path], tmp_path: Path, configure: Callable[..., DictConfig]
) -> None:
    for number in range(3):
        write_picture(f"gallery/p{number}.png", (90, 70), number)
    words = [f"checkpoints=[{tiny_checkpoint}]", f"gallery={tmp_path / 'gallery'}", f"features={tmp_path / 'features'}"]
    words += ["device=cpu", "precision=32-true", "num_workers=0", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="no photo of the gallery is a file with a plain backdrop"):
        command.verifier(configure("verifier", *words))


def test_copies_of_a_photo_are_not_called_wrong(tmp_path: Path) -> None:
    paths = []
    for name, seed in [("a", 0), ("copy", 0), ("b", 1)]:
        paths.append(tmp_path / f"{name}.png")
        cv2.imwrite(str(paths[-1]), textured(seed))
    cv2.imwrite(str(tmp_path / "view.png"), warped(textured(0)))
    gallery = Catalog(("a", "copy", "b"), tuple(paths))
    index = ExactIndex(device="cpu").fit(np.eye(3, dtype=np.float32), gallery.ids)
    queries = Features(unit(np.array([[0.9, 0.8, 0.7]], np.float32)), ("a",), np.full((1, 56, 56), 255, np.uint8))
    context = SearchContext(gallery, Catalog(("a",), (tmp_path / "view.png",)), tmp_path / "features")
    candidates = Candidates(index.search(queries.vectors, queries.ids, 3), queries, index, context)
    [view] = collect_views(candidates, DETECTOR, MATCHER, 3)
    assert view.right.inliers > 3
    [other] = view.others
    assert not np.array_equal(other.candidate, view.right.candidate)
