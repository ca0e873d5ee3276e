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
from beauty_bafe.models.views import resize, whiten

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
    view = partial(whiten, threshold=0.5)
    seen = pictures(64)
    engine = Engine(Describer(extractor, POOLINGS, masks=False, view=view), "cpu", "32-true", 4, False)
    white = view(seen, extractor(seen).saliency(64), 255)
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
