"""Views of a picture: resized, cropped to the product, without its background; and the masks that are seen there."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor, Extraction, resize_mask
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.models.views import (
    View,
    clamp_window,
    cut_out,
    guided_filter,
    inverse_window,
    product_window,
    resize,
    sample_window,
    whiten,
)
from tests.textured import scene

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


@pytest.fixture
def extractor(tiny: dict[str, Any]) -> BackgroundAgnosticExtractor:
    torch.manual_seed(0)
    return BackgroundAgnosticExtractor(**tiny).eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.inference_mode()
def test_a_whitened_picture_is_described_without_its_background(extractor: BackgroundAgnosticExtractor) -> None:
    view = View(change=partial(whiten, threshold=0.5))
    seen = pictures(64)
    engine = Engine(Describer(extractor, POOLINGS, masks=False, view=view), "cpu", "32-true", 4, "torch")
    white = view.change(seen, extractor(seen).saliency(64), 255)
    assert not torch.equal(white, seen)
    expected = [F.normalize(pooling(extractor.extract(white))) for pooling in POOLINGS]
    for output, wanted in zip(engine(seen), expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)


def test_shrinking_smooths() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = resize(stripes, 16)[..., 2:-2]
    assert (small - 127.5).abs().max() < 8


@pytest.mark.parametrize("side", [16, 21, 31, 33, 42])
def test_what_is_too_fine_becomes_grey(side: int) -> None:
    """Stripes of a pixel each, at sizes that antialiasing is for; at half the size they are averaged in pairs anyway."""
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = resize(stripes, side)[..., 2:-2]
    assert (small - 127.5).abs().mean() < 32, "plain bilinear interpolation has 64"


def test_half_the_size_is_the_mean_of_four_pixels() -> None:
    seen = pictures(64)
    means = F.avg_pool2d(seen.float(), 2)
    torch.testing.assert_close(resize(seen, 32), means)
    whole = torch.tensor([[0.0, 0.0, 1.0]]).expand(3, 3)
    torch.testing.assert_close(sample_window(seen, whole, 0, 32), means, atol=1e-3, rtol=0)


def test_a_window_is_the_crop_enlarged() -> None:
    seen = pictures(64)
    window = torch.tensor([[0.25, -0.5, 0.25]]).expand(3, 3)  # 16 pixels around x 40, y 16
    crop = F.interpolate(F.pad(seen, (1, 1, 1, 1))[..., 8:26, 32:50].float(), scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]
    torch.testing.assert_close(sample_window(seen, window, 0, 32), crop, atol=1e-3, rtol=0)


def test_beyond_the_canvas_is_the_value_that_is_named_or_the_nearest_pixels() -> None:
    seen = pictures(64)
    window = torch.tensor([[1.0, 0.0, 0.5]]).expand(3, 3)  # its right half lies outside
    white, nearest = (sample_window(seen, window, outside, 32) for outside in (255, None))
    assert (white[..., 17:] == 255).all()
    torch.testing.assert_close(nearest[..., 16:], seen[:, :, 16:48, 63:].float().expand(-1, -1, -1, 16), atol=1e-3, rtol=0)
    torch.testing.assert_close(white[..., :15], nearest[..., :15])
    torch.testing.assert_close(nearest[..., :16], seen[:, :, 16:48, 48:].float(), atol=1e-3, rtol=0)


def test_what_is_made_of_a_picture_is_not_rounded() -> None:
    """Rounding would make 1/255 of a difference in the last digit, and onnxruntime's are others than PyTorch's."""
    picture = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    picture[..., ::2] = 1
    window, half = torch.tensor([[0.0, 0.0, 0.37]]), torch.full((1, 1, 64, 64), 0.3)
    for made in (resize(picture, 32)[..., 1:-1], sample_window(picture, window, 0), whiten(picture, half, 0, None)):
        assert ((made > 0.01) & (made < 0.99)).float().mean() > 0.3


@torch.inference_mode()
def test_a_descriptor_of_the_picture_itself_gets_bytes(extractor: BackgroundAgnosticExtractor) -> None:
    seen: list[torch.Tensor] = []

    def pool(given: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        seen.append(given)
        return given.float().mean(dim=(2, 3))

    view = View(change=partial(whiten, threshold=None))
    Describer(extractor, [Pooling(pool, saliency=False, map="picture")], False, view=view)(pictures(64))
    saliency = extractor(pictures(64)).saliency(64)
    wanted = pictures(64) * saliency + 255 * (1 - saliency)
    assert seen[0].dtype == torch.uint8
    assert (seen[0] - wanted).abs().max() <= 0.5


def test_a_cut_out_product_fills_the_canvas_wherever_it_was() -> None:
    expected = None
    for size, top, left, height, width in ((64, 8, 16, 16, 32), (64, 40, 30, 16, 32), (64, 2, 2, 8, 16)):
        (cut,) = cut_out(*scene(size, top, left, height, width), pad=255, fill=0.75)
        assert (cut[:, :19] == 255).all(), "white above: 0.75 of 64 wide is 48, half as high 24, so 20 rows are left"
        inside = cut[0, 23:41, 12:52].float()
        expected = inside if expected is None else expected
        assert (inside - expected).abs().mean() < 6, "the same picture from any place and size"
        assert [int(cut[0, y, x]) for y, x in ((24, 12), (24, 50), (40, 12), (40, 50))] == [10, 60, 120, 200]


def test_what_a_window_shows_can_be_put_back() -> None:
    picture, mask = scene(64, 44, 4, 8, 16)
    window = clamp_window(product_window(mask, 2.0))
    assert window.tolist() == [[-0.5, 0.5, 0.5]], "32 of 64 pixels, moved into the lower left corner"
    seen = sample_window(picture, window, 255)
    expected = F.interpolate(picture[..., 32:, :32].float(), scale_factor=2, mode="bilinear", align_corners=False)
    inner = (..., slice(1, -1), slice(1, -1))
    assert (seen[inner].float() - expected[inner]).abs().max() <= 1
    back = sample_window(seen, inverse_window(window), 0)
    assert not back[..., :31, :].any(), "nothing was seen there"
    assert (back[..., 33:, :31].float() - picture[..., 33:, :31]).abs().mean() < 3


def test_a_last_digit_does_not_move_the_window() -> None:
    x = torch.linspace(-1, 1.3, 64)
    hill = torch.exp(-2 * x[:, None] ** 2 - 3 * x**2)[None, None]
    for value in hill[0, 0].amax(dim=0)[8:48:4]:  # each in turn comes to lie at the threshold
        below, above = (product_window(hill - value + 0.5 + offset, 1.0) for offset in (-1e-6, 1e-6))
        assert (below - above).abs().max() < 1e-4


@pytest.mark.parametrize(("height", "width", "trusted"), [(0, 0, False), (2, 2, False), (64, 64, False), (8, 8, True)])
def test_a_mask_that_must_be_wrong_is_not_trusted(height: int, width: int, trusted: bool) -> None:
    _, mask = scene(64, 0, 0, height, width)
    assert View(closer=1.3, least=0.005).trusts(mask).tolist() == [[[[trusted]]]]
    assert View(closer=1.3).trusts(mask).all(), "0 trusts all"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({}, "query.view has neither"),
        ({"closer": 0.9}, "view.closer"),
        ({"closer": 2, "edges": 1.5}, "view.edges=1.5:"),
        ({"closer": 2, "whole": 1}, "view.whole=1:"),
        ({"closer": 2, "detail": 0.5}, "view.detail"),
    ],
)
def test_views_out_of_range_are_refused(words: dict[str, float], error: str) -> None:
    with pytest.raises(ValueError, match=rf"{error}.*type"):
        View(**words)


class Grey(torch.nn.Module):
    """An extractor that takes cells of 4 x 4 pixels for the product that are not all grey."""

    def __init__(self, extractor: BackgroundAgnosticExtractor) -> None:
        super().__init__()
        self.extractor, self.seen = extractor, list[torch.Tensor]()
        self.size, self.pad, self.mean = extractor.size, extractor.pad, extractor.mean

    def extract(self, pictures: torch.Tensor) -> Extraction:
        self.seen.append(pictures)
        logits = (F.max_pool2d((pictures[:, :1] - 90).abs(), 4) > 0.5).float() * 40 - 20
        return self.extractor.extract(pictures)._replace(logits=[logits])


@torch.inference_mode()
def test_the_network_sees_the_product_again_from_close_by(extractor: BackgroundAgnosticExtractor) -> None:
    picture, mask = scene(128, 79, 17, 16, 32)  # its edges are not those of halved pixels
    nothing = torch.full_like(picture, 90)
    network = Grey(extractor)
    describer = Describer(network, POOLINGS, True, view=View(closer=1.25, detail=2, least=0.005))  # type: ignore[arg-type]
    assert describer.canvas == 128
    *vectors, saliency = describer(torch.cat([picture, nothing]))
    rough = Grey(extractor).extract(resize(picture, 64)).saliency(64)
    closer = sample_window(picture, clamp_window(product_window(rough, 1.25)), None, 64)
    assert torch.equal(network.seen[1][0], closer[0])
    assert torch.equal(network.seen[1][1], resize(nothing, 64)[0]), "where nothing was found it sees the whole again"
    for pooling, output in zip(POOLINGS, vectors, strict=True):
        torch.testing.assert_close(output, F.normalize(pooling(extractor.extract(network.seen[1]))))
    wanted = F.interpolate(mask, (112, 112), mode="area")
    finer, coarser = ((found - wanted[0, 0]).abs().mean() for found in (saliency[0] / 255, resize_mask(rough, 112)[0, 0]))
    assert finer < 0.7 * coarser


@torch.inference_mode()
def test_both_adds_the_picture_as_it_came(extractor: BackgroundAgnosticExtractor) -> None:
    change = partial(cut_out, fill=0.9)
    seen = pictures(128)
    seen[:, :, 30:60, 40:90] //= 8
    views = (View(1.25, 0.0, change, detail=2), View(1.25, 0.0, change, 0.25, 2))
    alone, mixed = (Describer(extractor, POOLINGS, True, view=view) for view in views)
    assert (alone.canvas, alone.passes, mixed.passes) == (128, 3, 3)
    whole = [F.normalize(pooling(extractor.extract(resize(seen, 64)))) for pooling in POOLINGS]
    for one, both, other in zip(alone(seen)[:2], mixed(seen)[:2], whole, strict=True):
        torch.testing.assert_close(both, F.normalize(0.75 * one + 0.25 * other))
    assert torch.equal(alone(seen)[2], mixed(seen)[2])
    assert str(views[1]) == "closer 1.25, edges 0.0, cut_out(fill=0.9) at 2, 0.25 whole, least 0.0, version 5"


@torch.inference_mode()
def test_the_mask_that_is_shown_has_followed_edges(extractor: BackgroundAgnosticExtractor) -> None:
    picture, _ = scene(128, 80, 16, 16, 32)
    view = View(closer=1.25, edges=0.1, detail=2)
    *_, shown = Describer(Grey(extractor), POOLINGS, True, view=view)(picture)  # type: ignore[arg-type]
    window = clamp_window(product_window(Grey(extractor).extract(resize(picture, 64)).saliency(64), 1.25))
    seen = sample_window(picture, window, None, 64)
    drawn = guided_filter(Grey(extractor).extract(seen).saliency(112), seen, 0.1)
    wanted = resize_mask(sample_window(drawn, inverse_window(window), 0, 224), 112)[0, 0] * 255
    assert (shown[0].float() - wanted).abs().max() < 1
