"""Evidence of pictures laid over each other: their appearance, and the contrast of two candidates."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from beauty_bafe.rerank.appearance import APPEARANCE, compare_appearance, contrast_candidates
from beauty_bafe.rerank.keypoints import THUMBNAIL
from beauty_bafe.rerank.matching import Geometry

MATRIX = np.array([[0.9, -0.2, 30], [0.2, 0.9, -20], [0, 0, 1.0]])
SIZE = 320


def smooth(seed: int, inside: slice = slice(8, 56)) -> np.ndarray:
    """The thumbnail of a smooth random picture whose product is a square."""
    thumbnail = np.random.default_rng(seed).integers(0, 255, (8, 8, 4), np.uint8)
    thumbnail = cv2.resize(thumbnail, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_CUBIC)
    thumbnail[..., 3] = 0
    thumbnail[inside, inside, 3] = 255
    return thumbnail


def laid_over(seen: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """What another camera sees of it; `matrix` leads from its canvas to that of `seen`."""
    scale = np.diag([THUMBNAIL / SIZE, THUMBNAIL / SIZE, 1])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(seen, scale @ matrix @ np.linalg.inv(scale), (THUMBNAIL, THUMBNAIL), flags=flags)


def test_the_same_picture_under_a_known_geometry() -> None:
    shop, geometry = smooth(0), Geometry(20, MATRIX)
    inliers, lightness, chroma, colour = compare_appearance(laid_over(shop, MATRIX), shop, geometry, SIZE)
    assert inliers == pytest.approx(np.log(21))
    assert min(lightness, chroma) > 0.97
    assert -0.3 < colour <= 0
    other = compare_appearance(laid_over(smooth(1), MATRIX), shop, geometry, SIZE)
    assert max(other[1:3]) < 0.5
    assert other[3] < 4 * colour
    askew = compare_appearance(laid_over(shop, MATRIX), shop, Geometry(20, np.eye(3)), SIZE)
    assert askew[1] < 0.8, "under another geometry other things lie over each other"


def test_light_and_its_colour_are_taken_out() -> None:
    shop = smooth(0)
    thumbnail = shop.astype(int)
    thumbnail[..., 0] = thumbnail[..., 0] // 2 + 20
    thumbnail[..., 1:3] = thumbnail[..., 1:3] + [9, -6]
    seen = thumbnail.clip(0, 255).astype(np.uint8)
    _, lightness, chroma, colour = compare_appearance(seen, shop, Geometry(5, np.eye(3)), SIZE)
    assert min(lightness, chroma) > 0.97
    assert colour > -0.3


def test_without_geometry_or_overlap_nothing_is_seen() -> None:
    assert compare_appearance(smooth(0), smooth(0), None, SIZE) == [0.0] * len(APPEARANCE)
    away = Geometry(3, np.array([[1, 0, 1000.0], [0, 1, 0], [0, 0, 1]]))
    assert compare_appearance(smooth(0), smooth(0), away, SIZE) == [pytest.approx(np.log(4)), 0, 0, 0]
    flat = np.full((THUMBNAIL, THUMBNAIL, 4), 255, np.uint8)
    assert compare_appearance(flat, flat, Geometry(3, np.eye(3)), SIZE)[1:] == [0, 0, 0], "a plain picture is like every other"


def test_a_fit_may_miss_by_a_pixel() -> None:
    """Print as fine as a thumbnail's pixels, laid over itself one of them off."""
    thumbnail = np.random.default_rng(0).integers(0, 255, (THUMBNAIL, THUMBNAIL, 4), np.uint8)
    thumbnail[..., 3] = 255
    shop, step = thumbnail, SIZE / THUMBNAIL
    for matrix, least in ((np.eye(3), 0.99), (np.array([[1, 0, step], [0, 1, 0], [0, 0, 1]]), 0.6)):
        _, lightness, chroma, _ = compare_appearance(shop, shop, Geometry(5, matrix), SIZE)
        assert min(lightness, chroma) > least


def test_only_what_shows_both_products_is_compared() -> None:
    shop = smooth(0)
    other = smooth(1).copy()
    other[8:32] = shop[8:32]
    half = other.copy()
    half[32:, :, 3] = 0
    geometry = Geometry(5, np.eye(3))
    for pair in ((shop, half), (half, shop)):
        assert min(compare_appearance(*pair, geometry, SIZE)[1:3]) > 0.95
    assert max(compare_appearance(other, shop, geometry, SIZE)[1:3]) < 0.9
    corner = shop.copy()
    corner[..., 3] = 0
    corner[8:21, 8, 3] = 255
    assert compare_appearance(corner, shop, geometry, SIZE)[1:] == [0, 0, 0], "13 pixels"
    corner[21, 8, 3] = 255
    assert compare_appearance(corner, shop, geometry, SIZE)[1] > 0.95, "14 pixels"


def test_colours_that_differ_wholly_count_no_more_than_two_dozen_levels() -> None:
    thumbnails = np.random.default_rng(0).choice([0, 255], (2, THUMBNAIL, THUMBNAIL, 4)).astype(np.uint8)
    thumbnails = np.repeat(np.repeat(thumbnails[:, ::16, ::16], 16, 1), 16, 2)
    thumbnails[..., 3] = 255
    first, second = (np.ascontiguousarray(thumbnail) for thumbnail in thumbnails)
    assert compare_appearance(first, second, Geometry(5, np.eye(3)), SIZE)[3] == -2


def variants() -> tuple[np.ndarray, list[np.ndarray]]:
    """What three variants of a product have in common, and the variants: a square of each is of another colour."""
    shop = smooth(0)
    colours = [(90, 200, 128), (150, 60, 200), (200, 100, 60)]
    drawn = [shop.copy() for _ in colours]
    for thumbnail, colour in zip(drawn, colours, strict=True):
        thumbnail[20:30, 20:30, :3] = colour
    return shop, drawn


def test_the_contrast_tells_which_variant_it_is() -> None:
    """Seen by another camera, in other light; the third is one that is not among the candidates."""
    _, (a, b, other) = variants()
    geometries = [Geometry(20, MATRIX), Geometry(4, MATRIX)]
    for thumbnail, expected in ((a, 1.0), (b, -1.0), (other, 0.0)):
        seen = laid_over(thumbnail, MATRIX).astype(int)
        seen[..., :3] += [-20, 9, -6]
        contrast = contrast_candidates(seen.clip(0, 255).astype(np.uint8), [a, b], geometries, SIZE)
        assert contrast[0, 1] == pytest.approx(expected, abs=0.3)
        assert contrast[1, 0] == -contrast[0, 1]
        assert np.isnan(np.diag(contrast)).all()


@pytest.mark.parametrize("fine", [False, True])
def test_the_contrast_against_a_slow_twin(fine: bool) -> None:
    """In another light. With `fine` print all over, the candidates agree at fewer than 25 pixels."""
    _, (a, b, other) = variants()
    if fine:
        b = smooth(1)
    query = a.copy()
    query[18:40, 18:28, :3] = other[18:40, 18:28, :3]
    query[..., :3] = (query[..., :3].astype(int) + np.array([-20, 9, -6])).clip(0, 255).astype(np.uint8)
    contrast = contrast_candidates(query, [a, b], [Geometry(9, np.eye(3))] * 2, SIZE)
    own, first, second = (
        cv2.GaussianBlur(part[..., :3].astype(np.float64) * [100 / 255, 1, 1], (0, 0), 0.7) for part in (query, a, b)
    )
    places = [(y, x) for y in range(8, 56) for x in range(8, 56)]
    differing = [place for place in places if np.linalg.norm(first[place] - second[place]) > 10]
    agreeing = [place for place in places if place not in differing]
    assert (len(agreeing) < 25) == fine
    cast = np.mean([(first[place] + second[place]) / 2 - own[place] for place in (places if fine else agreeing)], axis=0)
    above = below = 0.0
    for place in differing:
        difference = np.linalg.norm(first[place] - second[place])
        seen = own[place] + cast
        above += (difference - 10) * (np.linalg.norm(seen - second[place]) - np.linalg.norm(seen - first[place]))
        below += (difference - 10) * difference
    assert contrast[0, 1] == pytest.approx(above / below, abs=1e-4)
    assert abs(contrast[0, 1]) < 0.95


def test_there_is_no_contrast_where_nothing_can_be_compared() -> None:
    shop, (a, b, _) = variants()
    fit = Geometry(4, np.eye(3))

    def compared(query: np.ndarray, candidates: list[np.ndarray], geometries: list[Geometry | None]) -> bool:
        return bool(np.isfinite(contrast_candidates(query, candidates, geometries, SIZE)).any())

    assert compared(a, [a, b], [fit, fit])
    assert not compared(a, [a, b], [fit, None])
    assert not compared(a, [a, b], [fit, Geometry(3, np.eye(3))]), "too few inliers"
    assert not compared(a, [shop, shop.copy()], [fit, fit]), "the same picture twice"
    assert not compared(a, [a, b], [fit, Geometry(9, np.array([[1, 0, 1000.0], [0, 1, 0], [0, 0, 1]]))]), "one is elsewhere"
    hidden = a.copy()
    hidden[17:33, 17:33, 3] = 0
    assert not compared(hidden, [a, b], [fit, fit]), "a hand covers what differs"
    corner = a.copy()
    corner[..., 3] = 0
    for pixels, enough in ((49, False), (50, True)):
        corner[20:30, 20:25, 3].flat = 0
        corner[20:30, 20:25, 3] = (255 * (np.arange(50) < pixels)).reshape(10, 5)
        assert compared(corner, [a, b], [fit, fit]) == enough, "pixels that show all three"
    faint = shop.copy()
    for levels, enough in ((11, False), (40, True)):  # 1 and 30 above what counts, at about a hundred pixels
        faint[20:30, 20:30, 1] = (shop[20:30, 20:30, 1].astype(int) + levels).clip(0, 255)
        assert compared(a, [shop, faint], [fit, fit]) == enough
    contrast = contrast_candidates(a, [b, a, b, shop], [None, fit, fit, None], SIZE)
    assert np.argwhere(np.isfinite(contrast)).tolist() == [[1, 2], [2, 1]]


def test_the_candidates_with_the_most_inliers_are_compared() -> None:
    _, (a, b, _) = variants()
    geometries: list[Geometry | None] = [Geometry(4 + number % 10, np.eye(3)) for number in range(10)]
    contrast = contrast_candidates(a, [a, b] * 5, geometries, SIZE)
    expected = [[row, column] for row in range(2, 10) for column in range(2, 10) if (row - column) % 2]
    assert np.argwhere(np.isfinite(contrast)).tolist() == expected
