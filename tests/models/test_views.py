"""Pictures looked at at several sizes, mirrored, and without their background."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.inference import Describer, Engine
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.models.views import View, cut_out, resize, whiten

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]


@pytest.fixture
def extractor(tiny: dict[str, Any]) -> BackgroundAgnosticExtractor:
    torch.manual_seed(0)
    return BackgroundAgnosticExtractor(**tiny).eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.inference_mode()
def test_scales_and_flips_are_added_at_length_one(extractor: BackgroundAgnosticExtractor) -> None:
    describer = Describer(extractor, POOLINGS, masks=True, scales=(0.5, 1.5), flip=True)
    assert (describer.canvas, describer.passes) == (96, 4)
    seen = pictures(96)
    outputs = describer(seen)
    for pooling, output in zip(POOLINGS, outputs, strict=False):
        total = torch.zeros_like(output)
        for side in (32, 96):
            for picture in (resize(seen, side), resize(seen, side).flip(3)):
                total += F.normalize(pooling(extractor(picture)))
        torch.testing.assert_close(output, F.normalize(total))
    saliency = extractor(resize(seen, 64)).saliency(56)[:, 0] * 255
    assert (outputs[-1].float() - saliency).abs().max() < 1, "the mask shown is of the network's own size"


@torch.inference_mode()
def test_one_scale_is_the_plain_descriptor(extractor: BackgroundAgnosticExtractor) -> None:
    plain, told = (Describer(extractor, POOLINGS, False, **given)(pictures(64)) for given in ({}, {"scales": [1.0]}))
    for one, other in zip(plain, told, strict=True):
        assert torch.equal(one, other)


@torch.inference_mode()
def test_a_whitened_picture_is_described_without_its_background(extractor: BackgroundAgnosticExtractor) -> None:
    view = View(partial(whiten, threshold=0.5))
    seen = pictures(64)
    engine = Engine(Describer(extractor, POOLINGS, masks=False, view=view), "cpu", "32-true", 4, False)
    white = view.change(seen, extractor(seen).saliency(64), 255)
    assert not torch.equal(white, seen)
    expected = [F.normalize(pooling(extractor(white))) for pooling in POOLINGS]
    for output, wanted in zip(engine(seen), expected, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)


def test_shrinking_smooths() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 255
    small = resize(stripes, 16)[..., 2:-2]
    assert (small.float() - 127.5).abs().max() < 8


def test_a_network_of_one_size_refuses_scales() -> None:
    options = {"img_size": 64, "depth": 1, "embed_dim": 16, "num_heads": 2}
    transformer = BackgroundAgnosticExtractor(
        "vit_tiny_patch16_224", ["blocks.0"], "norm", 64, hidden=4, pretrained=False, options=options
    ).eval()
    Describer(transformer, POOLINGS, masks=False, scales=[1.0])
    with pytest.raises(ValueError, match=r"extraction.scales=\[0.5\]: this network takes pictures of 64 px alone"):
        Describer(transformer, POOLINGS, masks=False, scales=[0.5])


def scene(size: int, top: int, left: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A grey picture with a product of four differently coloured quarters, and its mask."""
    picture, mask = torch.full((1, 3, size, size), 90, dtype=torch.uint8), torch.zeros(1, 1, size, size)
    quarters = torch.tensor([[10, 60], [120, 200]], dtype=torch.uint8).repeat_interleave(height // 2, 0)
    picture[..., top : top + height, left : left + width] = quarters.repeat_interleave(width // 2, 1)
    mask[..., top : top + height, left : left + width] = 1
    return picture, mask


def test_a_cut_out_product_fills_the_canvas_wherever_it_was() -> None:
    expected = None
    for size, top, left, height, width in ((64, 8, 16, 16, 32), (64, 40, 30, 16, 32), (64, 2, 2, 8, 16)):
        (cut,) = cut_out(*scene(size, top, left, height, width), pad=255, fill=0.75, least=0.005)
        assert (cut[:, :19] == 255).all(), "white above: 0.75 of 64 wide is 48, half as high 24, so 20 rows are left"
        inside = cut[0, 23:41, 12:52].float()
        expected = inside if expected is None else expected
        assert (inside - expected).abs().mean() < 6, "the same picture from any place and size"
        assert [int(cut[0, y, x]) for y, x in ((24, 12), (24, 50), (40, 12), (40, 50))] == [10, 60, 120, 200]


@pytest.mark.parametrize(("height", "width"), [(0, 0), (2, 2), (64, 64)])
def test_a_mask_that_must_be_wrong_leaves_the_picture_as_it_is(height: int, width: int) -> None:
    picture, mask = scene(64, 0, 0, height, width)
    assert torch.equal(cut_out(picture, mask, pad=255, fill=0.9, least=0.005), picture)


@torch.inference_mode()
def test_both_adds_the_picture_as_it_came(extractor: BackgroundAgnosticExtractor) -> None:
    change = partial(cut_out, fill=0.9, least=0.005)
    seen = pictures(128)
    seen[:, :, 30:60, 40:90] //= 8
    alone, mixed, plain = (
        Describer(extractor, POOLINGS, True, view=view) for view in (View(change, detail=2), View(change, 0.25, 2), None)
    )
    assert (alone.canvas, alone.passes, mixed.passes) == (128, 2, 3)
    whole = plain(resize(seen, 64))
    for one, both, other in zip(alone(seen)[:2], mixed(seen)[:2], whole[:2], strict=True):
        torch.testing.assert_close(both, F.normalize(0.75 * one + 0.25 * other))
    assert torch.equal(mixed(seen)[2], whole[2]), "the mask shown is of the picture as it came"
    assert str(View(change, 0.25, 2)) == "cut_out(fill=0.9, least=0.005) at 2, 0.25 whole"
