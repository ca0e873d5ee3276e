"""How often a Describer passes pictures through the network, at which sizes, and what it makes of several."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.inference import Describer
from beauty_bafe.models.pooling import gem, spoc
from beauty_bafe.models.views import View, cut_out, guided_filter, resize, sample_window

POOLINGS = [Pooling(spoc, saliency=True), Pooling(gem, saliency=False)]
CUT = partial(cut_out, fill=0.9)


@pytest.fixture
def extractor(tiny: dict[str, Any]) -> BackgroundAgnosticExtractor:
    torch.manual_seed(0)
    return BackgroundAgnosticExtractor(**tiny).eval()


def pictures(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@torch.inference_mode()
def test_scales_and_flips_are_added_at_length_one(extractor: BackgroundAgnosticExtractor) -> None:
    describer = Describer(extractor, POOLINGS, masks=True, scales=(0.5, 1.5), flip=True)
    assert (describer.canvas, describer.passes) == (96, 5)
    seen = pictures(96)
    outputs = describer(seen)
    for pooling, output in zip(POOLINGS, outputs, strict=False):
        total = torch.zeros_like(output)
        for side in (32, 96):
            for picture in (resize(seen, side), resize(seen, side).flip(3)):
                total += F.normalize(pooling(extractor.extract(picture)))
        torch.testing.assert_close(output, F.normalize(total))
    saliency = extractor.extract(resize(seen, 64)).saliency(112)[:, 0] * 255
    assert (outputs[-1].float() - saliency).abs().max() < 1, "the mask shown is of the network's own size"


@torch.inference_mode()
def test_one_scale_is_the_plain_descriptor(extractor: BackgroundAgnosticExtractor) -> None:
    plain, told = (Describer(extractor, POOLINGS, False, **given)(pictures(64)) for given in ({}, {"scales": [1.0]}))
    for one, other in zip(plain, told, strict=True):
        assert torch.equal(one, other)


def test_a_network_of_one_size_refuses_scales() -> None:
    options = {"img_size": 64, "depth": 1, "embed_dim": 16, "num_heads": 2}
    transformer = BackgroundAgnosticExtractor(
        "vit_tiny_patch16_224", ["blocks.0"], "norm", 64, hidden=4, pretrained=False, options=options
    ).eval()
    Describer(transformer, POOLINGS, masks=False, scales=[1.0])
    with pytest.raises(ValueError, match=r"extraction.scales=\[0.5\]: this network accepts only pictures of 64 px"):
        Describer(transformer, POOLINGS, masks=False, scales=[0.5])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.0), (1.0, 2.0), (1.5,), (1.0, 1.0)])
@pytest.mark.parametrize(
    "view",
    [
        None,
        View(1.25, 0.1, detail=2),
        View(1.25, 0.1, whole=0.5, detail=3),
        View(1.25, 0.1, CUT, detail=2),
        View(1.25, 0.1, CUT, 0.5),
        View(change=CUT, whole=0.5),
    ],
    ids=str,
)
@torch.inference_mode()
def test_each_view_takes_the_passes_that_it_counts(
    view: View | None, scales: tuple[float, ...], flip: bool, extractor: BackgroundAgnosticExtractor
) -> None:
    describer = Describer(extractor, POOLINGS, True, scales, flip, view)
    calls = []
    describer.extract = lambda seen: calls.append(seen) or extractor.extract(seen)  # type: ignore[func-returns-value]
    seen = pictures(describer.canvas)
    outputs = describer(seen)
    assert len(calls) == describer.passes
    assert {call.shape[-1] for call in calls} <= {64, *describer.sides}
    assert all(output.isfinite().all() for output in outputs)
    sides = {side: [call for call in calls if call.shape[-1] == side] for side in describer.sides}
    flips = sum(torch.equal(one, other.flip(3)) for same in sides.values() for one in same for other in same)
    assert (flips > 0) is flip


@pytest.mark.parametrize(
    ("detail", "scales", "side"), [(1, (1.0,), 64), (2, (1.0,), 64), (3, (1.0,), 96), (2, (0.5, 1.5), 96), (2, (0.5,), 64)]
)
@torch.inference_mode()
def test_a_window_is_halved_at_most(
    detail: float, scales: tuple[float, ...], side: int, extractor: BackgroundAgnosticExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = []

    def sample(seen: torch.Tensor, window: torch.Tensor, outside: float | None, side: int | None = None) -> torch.Tensor:
        sampled.append((outside, side))
        return sample_window(seen, window, outside, side)

    monkeypatch.setattr("beauty_bafe.models.inference.sample_window", sample)
    describer = Describer(extractor, POOLINGS, False, scales, view=View(1.25, detail=detail))
    describer(pictures(describer.canvas))
    assert sampled == [(None, side)]


@pytest.mark.parametrize(("size", "side"), [(64, 112), (224, 112), (336, 168)])
@torch.inference_mode()
def test_masks_are_filtered_at_half_the_size(
    size: int, side: int, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    filtered = []

    def filter_(saliency: torch.Tensor, seen: torch.Tensor, radius: float) -> torch.Tensor:
        filtered.append((saliency.shape[-1], seen.shape[-1]))
        return guided_filter(saliency, seen, radius)

    monkeypatch.setattr("beauty_bafe.models.inference.guided_filter", filter_)
    extractor = BackgroundAgnosticExtractor(**tiny | {"size": size}).eval()
    for view, wanted in ((View(1.25, 0.1, detail=2), (side, size)), (View(1.25, 0.1, CUT, detail=2), (2 * size, 2 * size))):
        describer = Describer(extractor, POOLINGS, True, view=view)
        assert describer(pictures(describer.canvas))[-1].shape == (3, 112, 112)
        assert filtered.pop() == wanted
