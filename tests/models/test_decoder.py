"""Decoders: what they compute, and how settings and checkpoints name them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.decoder import TopDownDecoder
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor, resize_mask
from beauty_bafe.models.module import load_extractor

DECODER: dict[str, Any] = {"_target_": "beauty_bafe.models.decoder.TopDownDecoder", "width": 8}
PICTURES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_decoder_follows_its_description() -> None:
    torch.manual_seed(0)
    decoder = TopDownDecoder([3, 5], 4).eval()
    shallow, deep = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    with torch.no_grad():
        at_deep = decoder.smooth[1](decoder.lateral[1](deep))
        raised = F.interpolate(at_deep, (8, 8), mode="bilinear", align_corners=False)
        at_shallow = decoder.smooth[0](decoder.lateral[0](shallow) + raised)
        fine, coarse = decoder([shallow, deep])
        torch.testing.assert_close(fine, decoder.heads[0](at_shallow))
        torch.testing.assert_close(coarse, decoder.heads[1](at_deep))


def test_every_tap_gets_the_finest_mask(tiny: dict[str, Any]) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny | {"decoder": DECODER}).eval()
    with torch.inference_mode():
        result = extractor(PICTURES)
        assert result.logits is not None
        for mask, tap in zip(result.masks, result.taps, strict=True):
            torch.testing.assert_close(mask, resize_mask(result.logits[0].sigmoid(), tap.shape[-2:]))
        extractor.shallowest = len(result.taps)
        assert extractor(PICTURES).masks == [], "whoever needs no mask does not wait for one"


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "beauty_bafe.models.decoder.make_decoder", "topdown", None])
def test_nothing_but_a_decoder_is_made(target: str | None, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"objective.decoder._target_={target}: type beauty_bafe.models.decoder.TopDown"):
        BackgroundAgnosticExtractor(**tiny | {"decoder": {"_target_": target, "width": 8}})


@pytest.mark.parametrize(("older", "decoder"), [("topdown", DECODER), ("taps", None)])
def test_checkpoints_of_earlier_versions_load(older: str, decoder: Any, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Those named one of two decoders, whose channels were `hidden`."""
    extractor = BackgroundAgnosticExtractor(**tiny | {"decoder": copy.deepcopy(decoder)}).eval()
    state = {f"extractor.{key}": value for key, value in extractor.state_dict().items()}
    content = {"hyper_parameters": {"model": tiny | {"decoder": older, "hidden": 8}}, "state_dict": state}
    torch.save(content, tmp_path / "old.ckpt")
    with torch.inference_mode():
        expected, found = extractor(PICTURES), load_extractor(tmp_path / "old.ckpt")(PICTURES)
    torch.testing.assert_close(found.masks, expected.masks, rtol=0, atol=0)
