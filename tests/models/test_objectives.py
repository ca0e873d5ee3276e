from __future__ import annotations

import pytest
import torch

from beauty_bafe.models.objectives import mask_metrics, saliency_loss


def test_loss_is_the_sum_of_the_taps_errors() -> None:
    label = torch.zeros(1, 1, 4, 4)
    label[..., :2] = 1  # left half
    fine, coarse = torch.full((1, 1, 4, 4), 0.5), torch.tensor([[[[0.9, 0.2], [1.0, 0.0]]]])
    expected = 0.25 + (0.01 + 0.04) / 4
    assert saliency_loss([fine, coarse], label).item() == pytest.approx(expected)
    assert saliency_loss([label], label).item() == 0


def test_metrics_by_hand() -> None:
    label, mask = torch.zeros(1, 1, 1, 10), torch.zeros(1, 1, 1, 10)
    label[..., :4] = 1
    mask[..., 2:8] = 0.75  # two hits, four false alarms, two misses
    metrics = {key: value.item() for key, value in mask_metrics(mask, label).items()}
    precision, recall = 2 / 6, 2 / 4
    assert metrics["mae"] == pytest.approx((2 * 1 + 2 * 0.25 + 4 * 0.75) / 10)
    assert metrics["iou"] == pytest.approx(2 / 8)
    assert metrics["f_beta"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))


def test_empty_masks() -> None:
    empty, full = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert all(mask_metrics(empty, empty)[key] == value for key, value in {"mae": 0, "iou": 1, "f_beta": 1}.items())
    assert all(mask_metrics(full, empty)[key] == value for key, value in {"mae": 1, "iou": 0, "f_beta": 0}.items())
