from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import Extraction
from beauty_bafe.models.pooling import gem, mac, spoc


def slow(name: str, maps: Tensor, weight: Tensor | None, p: float = 3.0) -> Tensor:
    """One cell at a time, in double precision."""
    result = torch.zeros(maps.shape[:2], dtype=torch.float64)
    for b in range(maps.shape[0]):
        for c in range(maps.shape[1]):
            total, mass, largest = 0.0, 0.0, float("-inf")
            for y in range(maps.shape[2]):
                for x in range(maps.shape[3]):
                    w = 1.0 if weight is None else weight[b, 0, y, x].item()
                    value = maps[b, c, y, x].item()
                    total += w * (max(value, 0) ** p if name == "gem" else value)
                    mass += w
                    largest = max(largest, w * value)
            result[b, c] = {"spoc": total / mass, "gem": max(total / mass, 0) ** (1 / p), "mac": largest}[name]
    return result


@pytest.mark.parametrize("function", [spoc, gem, mac])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_the_slow_twin(function, weighted: bool) -> None:
    torch.manual_seed(0)
    maps, weight = torch.randn(3, 5, 4, 6), torch.rand(3, 1, 4, 6) if weighted else None
    expected = slow(function.__name__, maps, weight)
    torch.testing.assert_close(function(maps, weight).double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("function", [spoc, gem, mac])
def test_empty_masks_and_dead_channels_stay_finite(function) -> None:
    maps = torch.rand(2, 3, 4, 4)
    maps[:, 1] = 0
    for weight in (torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 1e-30), None):
        maps.requires_grad_(True)
        pooled = function(maps, weight)
        assert pooled.isfinite().all()
        pooled.sum().backward()
        assert maps.grad.isfinite().all()
        maps = maps.detach()


@pytest.mark.parametrize("function", [spoc, gem, mac])
def test_rows_do_not_depend_on_their_batch(function) -> None:
    maps, weight = torch.rand(4, 3, 5, 5), torch.rand(4, 1, 5, 5)
    alone = torch.cat([function(maps[i : i + 1], weight[i : i + 1]) for i in range(4)])
    assert torch.equal(function(maps, weight), alone)


def extraction() -> Extraction:
    torch.manual_seed(1)
    sizes = (8, 4, 2, 2)
    return Extraction([torch.rand(2, 1, s, s) for s in sizes], [torch.rand(2, 6, s, s) for s in sizes], torch.rand(2, 9, 2, 2))


def test_pooling_picks_map_and_mask() -> None:
    e = extraction()
    assert torch.equal(Pooling(spoc, saliency=False)(e), spoc(e.last))
    assert torch.equal(Pooling(spoc, saliency=True)(e), spoc(e.last, e.masks[-1]))
    assert torch.equal(Pooling(mac, saliency=True, map=2)(e), mac(e.taps[1], e.masks[1]))


def test_pooling_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="taps 1 to 4, and last"):
        Pooling(spoc, saliency=False, map=5)(extraction())
    with pytest.raises(ValueError, match="type last, or the number of a tap"):
        Pooling(spoc, saliency=False, map="first")
