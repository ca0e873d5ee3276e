from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.extractor import BackgroundAgnosticExtractor, ChannelGate, Extraction, resize_mask


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_masks_follow_the_papers_equations(tiny: dict[str, Any]) -> None:
    """Written out tap by tap: mask = sigmoid(1x1(relu(3x3(x)))), vector = sum(m x) / sum(m), gate = sigmoid(1x1(vector))."""
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    with torch.no_grad():
        result = extractor(pictures())
        raw = extractor.backbone((pictures().float() / 255 - extractor.mean) / extractor.std)
        vector = None
        for level in (3, 2, 1, 0):
            x = raw.taps[level]
            if vector is not None:
                conv = extractor.gates[level][0]
                x = x * torch.sigmoid(vector @ conv.weight[:, :, 0, 0].T + conv.bias)[:, :, None, None]
            first, _, second = extractor.encoders[level]
            hidden = F.relu(F.conv2d(x, first.weight, first.bias, padding=1))
            mask = torch.sigmoid(F.conv2d(hidden, second.weight, second.bias))
            torch.testing.assert_close(result.masks[level], mask, atol=1e-5, rtol=1e-4)
            vector = (x * mask).sum((2, 3)) / mask.sum((2, 3))
    assert torch.equal(result.last, raw.last)


def test_gate_layers() -> None:
    one, two = ChannelGate(8, 4, 1), ChannelGate(8, 4, 2)
    assert [type(layer).__name__ for layer in one] == ["Conv2d", "Sigmoid"]
    assert [type(layer).__name__ for layer in two] == ["Conv2d", "ReLU", "Conv2d", "Sigmoid"]


def test_a_frozen_backbone_never_changes(tiny: dict[str, Any]) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny).train()
    before = {key: value.clone() for key, value in extractor.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in extractor.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        sum(mask.mean() for mask in extractor(pictures()).masks).backward()
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in extractor.backbone.state_dict().items())
    assert all(p.grad is not None for p in extractor.encoders.parameters())
    assert all(p.grad is not None for p in extractor.gates.parameters())


def test_an_unfrozen_backbone_learns(tiny: dict[str, Any]) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny | {"frozen": False})
    sum(mask.mean() for mask in extractor(pictures()).masks).backward()
    assert extractor.backbone.net.conv_stem.weight.grad.abs().sum() > 0


def test_a_picture_is_described_the_same_in_any_company(tiny: dict[str, Any]) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    with torch.inference_mode():
        together, alone = extractor(pictures(4)), extractor(pictures(4)[2:3])
    torch.testing.assert_close(together.last[2:3], alone.last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.masks[0][2:3], alone.masks[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [torch.rand(1, 3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])
def test_other_inputs_are_refused(tiny: dict[str, Any], bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \(B, 3, S, S\), got"):
        BackgroundAgnosticExtractor(**tiny)(bad)


def test_resize_averages_when_shrinking() -> None:
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert resize_mask(mask, 1).item() == 0.25
    assert resize_mask(mask, (4, 4)).shape == (1, 1, 4, 4)


def test_saliency_adds_the_taps_evidence() -> None:
    masks = [torch.full((1, 1, 2, 2), 0.8), torch.full((1, 1, 1, 1), 0.6), torch.full((1, 1, 1, 1), 0.0)]
    odds = 0.8 / 0.2 * 0.6 / 0.4
    nothing = torch.empty(0)
    added = Extraction(masks[:2], [], nothing, nothing).saliency(2)[0, 0, 0, 0].item()
    assert added == pytest.approx(odds / (1 + odds))
    assert Extraction(masks, [], nothing, nothing).saliency(2).isfinite().all()
