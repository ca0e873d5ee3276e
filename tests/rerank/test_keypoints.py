"""Keypoints and their matches: known geometry, slow twins, and pictures without any."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from beauty_bafe.extraction.features import unit
from beauty_bafe.rerank import keypoints
from beauty_bafe.rerank.keypoints import Keypoints, Sift, crop_to_product, root_sift
from beauty_bafe.rerank.matching import NearestNeighbours, count_matches, fit_geometry, mutual_nearest_neighbours
from tests.textured import HOMOGRAPHY, SIZE, textured, warped

DETECTOR = Sift(SIZE, 300)


def test_matches_of_a_known_homography() -> None:
    query, same, other = (DETECTOR(picture) for picture in (warped(textured(0)), textured(0), textured(1)))
    matches, distance = count_matches(query, same, 0.8)
    assert matches > 3 * count_matches(query, other, 0.8)[0]
    assert 0 < distance < 300
    table = np.sort(np.linalg.norm(query.descriptors[:, None].astype(float) - same.descriptors[None], axis=2), axis=1)
    assert matches == int((table[:, 0] < 0.8 * table[:, 1]).sum()), "against every distance"
    rows, columns = mutual_nearest_neighbours(root_sift(query.descriptors), root_sift(same.descriptors), 0.9)
    truth = cv2.perspectiveTransform(same.points[columns][None], HOMOGRAPHY)[0]
    error = np.linalg.norm(truth - query.points[rows], axis=1)
    geometry = fit_geometry(query.points[rows], same.points[columns])
    assert geometry is not None
    assert np.median(error) < 2
    assert abs(geometry.inliers + 4 - int((error < 4).sum())) <= max(3, 0.15 * len(rows))
    corners = np.array([[[50.0, 50.0], [150, 50], [150, 150], [50, 150]]])
    back = cv2.perspectiveTransform(cv2.perspectiveTransform(corners, HOMOGRAPHY), geometry.matrix)
    assert np.abs(back - corners).max() < 3, "the map leads from the query to the candidate"
    rows, columns = mutual_nearest_neighbours(root_sift(query.descriptors), root_sift(other.descriptors), 0.9)
    wrong = fit_geometry(query.points[rows], other.points[columns])
    assert wrong is None or wrong.inliers < geometry.inliers / 4


def test_mutual_matches_against_a_slow_twin() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((30, 128)).astype(np.float32)
    base[:4], base[25:29] = base[10:14], base[15:19]  # what one of them has twice fails the ratio from the other's side
    query, candidate = (unit(part).astype(np.float32) for part in (base[:25] + 0.2 * rng.random((25, 128)), base[5:]))
    expected = []
    for row in range(25):
        forward = np.linalg.norm(candidate - query[row], axis=1)
        column = int(forward.argmin())
        backward = np.linalg.norm(query - candidate[column], axis=1)
        if int(backward.argmin()) == row and all(d.min() < 0.9 * np.sort(d)[1] for d in (forward, backward)):
            expected.append((row, column))
    assert 5 < len(expected) < 20
    assert list(zip(*mutual_nearest_neighbours(query, candidate, 0.9), strict=True)) == expected


def test_few_or_no_matches_prove_nothing() -> None:
    points = np.random.default_rng(0).random((4, 2)).astype(np.float32) * 100
    assert fit_geometry(points[:3], points[:3]) is None
    enlarged = fit_geometry(points, points * 2)
    assert enlarged is not None
    assert enlarged.inliers == 1, "the affine map has one match to spare, the homography none"
    np.testing.assert_allclose(enlarged.matrix, np.diag([2, 2, 1]), atol=1e-3)
    mirrored = points * [-1, 1] + [100, 0]
    assert fit_geometry(points, mirrored.astype(np.float32)) is None, "no photo is a mirror image"
    nothing = Keypoints(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8))
    some = DETECTOR(textured(0))
    assert count_matches(nothing, some, 0.8) == count_matches(some, nothing, 0.8) == (0, 0.0)
    assert mutual_nearest_neighbours(root_sift(nothing.descriptors), root_sift(some.descriptors), 0.9)[0].size == 0


def test_keypoints_can_keep_to_the_product() -> None:
    picture = textured(0)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[:100] = True
    kept = Sift(SIZE, 300, foreground=True)(picture, inside)
    assert 0 < len(kept.points) < len(DETECTOR(picture).points)
    assert kept.points[:, 1].max() <= 101
    assert len(DETECTOR(picture, inside).points) == len(DETECTOR(picture).points), "heeded where asked for only"


def test_a_crop_shows_only_the_product() -> None:
    small = np.full((SIZE, SIZE, 3), 255, np.uint8)
    small[:50, 100:150] = cv2.resize(textured(0)[40:160, 40:160], (50, 50), interpolation=cv2.INTER_AREA)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:50, 100:150] = 255
    features = [Sift(SIZE, 300, foreground=True, closer=closer).extract(small, mask) for closer in (1.0, None)]
    near, whole = (each.keypoints for each in features)
    assert np.ptp(near.points, axis=0).min() > 3 * np.ptp(whole.points, axis=0).max()
    shown = [(each.thumbnail[..., 3] > 127).mean() for each in features]
    assert shown == pytest.approx([1, 1 / 16], abs=0.05), "the thumbnail is of the same canvas"
    for wrong in (np.zeros_like(mask), np.full_like(mask, 255)):
        for foreground, closer in ((False, 1.0), (True, 1.0), (True, None)):
            seen, plain = (Sift(SIZE, 300, foreground, closer).extract(small, part) for part in (wrong, None))
            np.testing.assert_array_equal(seen.keypoints.points, plain.keypoints.points, "such masks show nothing")
            np.testing.assert_array_equal(seen.thumbnail, plain.thumbnail)


def test_no_more_keypoints_than_asked_for() -> None:
    """OpenCV keeps all orientations of the last place, and those as strong as it."""
    found = [Sift(SIZE, most)(textured(0)) for most in range(1, 40)]
    assert [len(each.points) for each in found] == [len(each.descriptors) for each in found] == [*range(1, 40)]


def test_keys_depend_on_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kept ones are never mixed with them."""
    others = (201, 300), (200, 301), (200, 300, True), (200, 300, False, 1.3), (200, 300, False, None, 0.01)
    keys = [Sift(*settings).key() for settings in ((200, 300), *others)]
    monkeypatch.setattr(keypoints, "THUMBNAIL", 32)
    keys.append(DETECTOR.key())
    monkeypatch.setattr(cv2, "__version__", "0")
    keys.append(DETECTOR.key())
    assert all(key not in keys[:number] for number, key in enumerate(keys))


def test_a_crop_has_the_pixels_of_the_file() -> None:
    """A product that takes half of a picture of twice the canvas is shown as it is, not enlarged from a reduced one."""
    picture = np.random.default_rng(0).integers(0, 255, (2 * SIZE, 2 * SIZE, 3), np.uint8)
    mask = np.zeros((112, 112), np.uint8)
    mask[28:84, 14:70] = 255
    canvas, inside = crop_to_product(picture, mask, SIZE, 1.0)
    np.testing.assert_array_equal(canvas, picture[SIZE // 2 : SIZE // 2 * 3, SIZE // 4 : SIZE // 4 * 5])
    assert inside is not None
    assert inside.mean() > 0.98


def test_inliers_are_those_beyond_what_any_map_explains() -> None:
    """Twenty matches of a homography, some of them a little off, and ten of none."""
    rng = np.random.default_rng(0)
    points = (rng.random((30, 2)) * SIZE).astype(np.float32)
    steep = np.array([[1, 0.2, 10], [0.1, 1.1, 5], [3e-3, -1e-3, 1]])  # no affine map comes near
    seen = cv2.perspectiveTransform(points[None], steep)[0]
    angles = rng.random(30) * 2 * np.pi
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.repeat([[0], [1], [25]], 10, axis=0)
    geometry = fit_geometry(points, (seen + steps).astype(np.float32))
    assert geometry is not None
    assert geometry.inliers == 20 - 4
    corners = np.float32([[[0, 0], [SIZE, 0], [0, SIZE], [SIZE, SIZE]]])
    wrong = cv2.perspectiveTransform(corners, geometry.matrix) - cv2.perspectiveTransform(corners, steep)
    assert np.abs(wrong).max() < 5


@pytest.mark.parametrize(("scale", "plausible"), [(15, True), (25, False), (1 / 15, True), (1 / 25, False)])
def test_nothing_is_twenty_times_as_large(scale: float, plausible: bool) -> None:
    points = (np.random.default_rng(0).random((12, 2)) * (SIZE if scale < 1 else 10)).astype(np.float32)
    assert (fit_geometry(points, (points * scale).astype(np.float32)) is not None) == plausible


def test_a_ratio_of_one_keeps_all_that_are_each_others_nearest() -> None:
    same = DETECTOR(textured(0))
    rows, columns = NearestNeighbours(1.0)(same, [same], SIZE)[0]
    assert len(rows) > 0.9 * len(same.points)
    np.testing.assert_array_equal(rows, columns)
