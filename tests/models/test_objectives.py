from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.evaluation.metrics import evaluate
from beauty_bafe.models.objectives import (
    contrast_loss,
    distillation_loss,
    mask_metrics,
    overlap_loss,
    reciprocal_rank,
    saliency_loss,
)


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


def test_overlap_loss_by_hand() -> None:
    label = torch.zeros(1, 1, 2, 2)
    label[..., 0] = 1
    fine, coarse = torch.tensor([[[[2.0, -2.0], [2.0, 2.0]]]]), torch.zeros(1, 1, 1, 1)
    right, wrong = torch.tensor(2.0).sigmoid().item(), torch.tensor(-2.0).sigmoid().item()
    entropy = -(3 * math.log(right) + math.log(wrong)) / 4
    dice = 1 - (2 * 2 * right + 1) / (3 * right + wrong + 2 + 1)
    at_coarse = math.log(2) + 1 - (2 * 0.25 + 1) / (0.5 + 0.5 + 1)
    assert overlap_loss([fine, coarse], label).item() == pytest.approx(entropy + dice + at_coarse / 4, rel=1e-5)


def test_an_edge_through_a_cell_is_learned() -> None:
    label = torch.zeros(1, 1, 8, 8)
    label[..., :3] = 1  # the edge runs through the first of two cells
    sharp, blind = (torch.tensor([left, -9.0]).view(1, 1, 1, 2).repeat(1, 1, 2, 1) for left in (4.0, 9.0))
    assert overlap_loss([sharp], label) < overlap_loss([blind], label)


def test_contrast_loss_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    street, clean = (F.normalize(torch.randn(4, 8, generator=generator)) for _ in range(2))
    total = 0.0
    for i in range(4):
        finds = [math.exp(float(street[i] @ row) / 0.1) for row in clean]
        found = [math.exp(float(clean[i] @ row) / 0.1) for row in street]
        total -= (math.log(finds[i] / sum(finds)) + math.log(found[i] / sum(found))) / 2
    assert contrast_loss(street, clean, 0.1).item() == pytest.approx(total / 4, rel=1e-4)
    assert contrast_loss(clean, clean, 0.01).item() < 0.1 < contrast_loss(street, clean, 0.01).item()


def test_contrast_loss_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    street, clean = (F.normalize(torch.randn(16, 256, generator=generator) + 1) for _ in range(2))
    wanted = contrast_loss(street, clean, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrast_loss(street, clean, 0.05), wanted)


def test_average_precision_against_the_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(n, 3, generator=generator)) for n in (20, 30))
    own = torch.randint(0, 30, (20,), generator=generator)
    answers = {str(i): [str(j) for j in row.argsort(descending=True)[:7].tolist()] for i, row in enumerate(queries @ gallery.T)}
    truth = {str(i): {str(j)} for i, j in enumerate(own.tolist())}
    wanted = evaluate(answers, truth, 7).summary()["mAP@7_by_min"]
    assert reciprocal_rank(queries, gallery, own).mean().item() == pytest.approx(wanted)
    assert 0 < wanted < 1


def test_distillation_is_the_mean_of_the_cells_cosine_distances() -> None:
    maps, known = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    distances = []
    for picture in range(2):
        for row in range(3):
            for column in range(4):
                one, other = maps[picture, :, row, column], known[picture, :, row, column]
                distances.append(1 - (one @ other / (one.norm() * other.norm())).item())
    assert distillation_loss(maps, known).item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    assert distillation_loss(maps, 3 * maps).item() == pytest.approx(0, abs=1e-6)
