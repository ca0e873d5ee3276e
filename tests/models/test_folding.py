"""Batch norms folded away: the same function before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.folding import fold_norms


@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("tf_efficientnet_lite0", 0), ("densenet121", 62), ("vgg11_bn", 0), ("seresnet50", 0)]
)
def test_folded_norms_change_nothing(lived_in: Callable[[str], Any], name: str, left: int) -> None:
    """DenseNet's norms that take several convolutions at once must stay."""
    network = lived_in(name)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network.forward_features(inputs)
        fold_norms(network, torch.randn(1, 3, 64, 64))
        after = network.forward_features(inputs)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == left
    torch.testing.assert_close(after, before, atol=1e-4 * before.abs().max().item(), rtol=1e-3)


def test_a_tapped_norm_is_still_tapped(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny | {"taps": ["conv_stem", "bn1", "blocks.1", "bn2"]}).eval()
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        before = extractor(pictures)
        fold_norms(extractor, pictures[:1])
        after = extractor(pictures)
    for one, two in zip((*before.taps, before.last), (*after.taps, after.last), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
