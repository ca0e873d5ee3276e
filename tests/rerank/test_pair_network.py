"""The network that compares aligned pictures, alignment by appearance, and altered copies."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.rerank.alignment import align_by_appearance
from beauty_bafe.rerank.altered import alter
from beauty_bafe.rerank.dense import score_pairs, stack_pairs
from beauty_bafe.rerank.pair_network import REACH, SIDE, PairNetwork
from tests.textured import pair, product


@pytest.fixture(scope="module")
def network() -> PairNetwork:
    torch.manual_seed(0)
    return PairNetwork().eval()


@pytest.mark.parametrize(("turn", "scale"), [(0, 1.0), (90, 1.0), (-45, 0.8), (150, 1.25)])
def test_a_turned_product_is_aligned_by_its_appearance(turn: float, scale: float) -> None:
    candidate, other = product(1), product(2)
    centre = (SIDE - 1) / 2
    known = np.vstack([cv2.getRotationMatrix2D((centre, centre), turn, scale), [0, 0, 1]])
    query = cv2.warpAffine(candidate, np.linalg.inv(known)[:2], (SIDE, SIDE))
    query[..., :3] = cv2.convertScaleAbs(query[..., :3], alpha=0.8)  # darker
    found, _ = align_by_appearance(query, [candidate, other])
    np.testing.assert_allclose(found, known, atol=1e-6)


def test_altered_copies_differ_visibly_and_only_on_the_product() -> None:
    picture, other, rng = product(1), product(2), np.random.default_rng(0)
    copies = [copy for copy in (alter(picture, other, rng) for _ in range(60)) if copy is not None]
    assert len(copies) > 30
    inside = picture[..., 3] > 127
    for copy in copies:
        np.testing.assert_array_equal(copy[..., 3], picture[..., 3])
        changed = np.abs(copy[..., :3].astype(int) - picture[..., :3]).sum(axis=-1)
        assert changed[~inside].max() <= 6, "rounding"
        assert (changed[inside] > 20).mean() > 0.02
    assert min((np.abs(copy[..., :3].astype(int) - picture[..., :3]).max(axis=-1)[inside] > 20).mean() for copy in copies) < 0.5
    tiny = picture.copy()
    tiny[..., 3] = 0
    assert alter(tiny, other, rng) is None


def test_a_batch_of_pairs_equals_pairs_alone(network: PairNetwork) -> None:
    pairs = [pair(product(1), product(1), 2.0), pair(product(1), product(2)), pair(product(3), product(2), 0.7)]
    with torch.inference_mode():
        together = network(*stack_pairs(pairs))
        alone = torch.cat([network(*stack_pairs([one])) for one in pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    empty = product(1)
    empty[..., 3] = 0
    assert np.isfinite(score_pairs(network, [pair(empty, empty)])).all()


def test_attention_against_a_loop_over_cells(network: PairNetwork) -> None:
    rng = torch.Generator().manual_seed(0)
    query, candidate = (torch.randn(2, 48, 20, 20, generator=rng) for _ in range(2))
    seen = torch.rand(2, 1, 20, 20, generator=rng)
    with torch.inference_mode():
        attention, similarity, best = network._attend(query, candidate, seen, torch.tensor([True, False]))
    spreads = network.spread.detach().exp().tolist()
    for row, kind in enumerate((1, 0)):
        reach, spread = REACH[kind], spreads[kind]
        for place in [(0, 0), (3, 17), (10, 10)]:
            own = candidate[row, :, place[0], place[1]]
            weights, scores = torch.zeros(20, 20), []
            for i in range(20):
                for j in range(20):
                    distance = (i - place[0]) ** 2 + (j - place[1]) ** 2
                    cosine = F.cosine_similarity(own, query[row, :, i, j], dim=0)
                    if distance <= reach**2:
                        penalty = -distance / (2 * spread**2)
                        weights[i, j] = (cosine * network.sharpness.detach() + penalty - 3 * (seen[row, 0, i, j] < 0.3)).exp()
                        scores.append(float(cosine + 0.1 * penalty))
            cell = place[0] * 20 + place[1]
            torch.testing.assert_close(attention[row, cell], (weights / weights.sum()).flatten(), atol=1e-5, rtol=1e-4)
            assert float(best[row, cell]) == pytest.approx(max(scores), abs=1e-5)
            assert float(similarity[row, cell, 5]) == pytest.approx(
                float(F.cosine_similarity(own, query[row, :, 0, 5], dim=0)), abs=1e-5
            )
