from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import Extraction
from beauty_bafe.models.pooling import amac, crow, gem, grmac, mac, ramac, regions, rmac, scda, spoc


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


def slow_regional(maps: Tensor, weight: Tensor | None, threshold, least: float = 0.0) -> Tensor:
    """One picture, one region, one cell at a time. `threshold(activation)` gives the bar a cell must pass, or None."""
    result = []
    for b in range(len(maps)):
        x = maps[b].double() * (1 if weight is None else weight[b].double())
        activation = x.sum(0)
        bar = threshold(activation)
        parts = []
        for top, left, side in regions(maps.shape[2], maps.shape[3], 3):
            cells = [(r, c) for r in range(top, top + side) for c in range(left, left + side)]
            vector = torch.stack([torch.stack([x[k, r, c] for r, c in cells]).max() for k in range(len(x))])
            share = 1.0 if bar is None else sum(float(activation[r, c] > bar) for r, c in cells) / len(cells)
            mass = 1.0 if weight is None else sum(weight[b, 0, r, c].item() for r, c in cells) / len(cells)
            parts.append((share if share > least else 0.0, mass, vector / max(vector.norm().item(), 1e-12)))
        if not any(share for share, _, _ in parts):
            parts = [(1.0, mass, vector) for _, mass, vector in parts]
        result.append(sum(share * mass * vector for share, mass, vector in parts))
    return torch.stack(result)


def slow_part(chosen: list[list[bool]]) -> set[tuple[int, int]]:
    """The largest 8-connected part, by flooding; of equal ones the one whose last cell comes last in reading order."""
    left = {(r, c) for r, row in enumerate(chosen) for c, yes in enumerate(row) if yes}
    parts = []
    while left:
        part, edge = set(), {left.pop()}
        while edge:
            part |= edge
            near = {(r + i, c + j) for r, c in edge for i in (-1, 0, 1) for j in (-1, 0, 1)}
            edge = near & left
            left -= edge
        parts.append(part)
    return max(parts, key=lambda part: (len(part), max(part)))


def slow_other(name: str, maps: Tensor, weight: Tensor | None) -> Tensor:
    result = []
    for b in range(len(maps)):
        w = torch.ones(maps.shape[2:]).double() if weight is None else weight[b, 0].double()
        x = maps[b].double()
        activation = (x * w).sum(0)
        cells = [(r, c) for r in range(x.shape[1]) for c in range(x.shape[2])]
        if name == "amac":
            inside = [(r, c) for r, c in cells if activation[r, c] >= activation.mean()]
            result.append(torch.stack([max(w[r, c] * x[k, r, c] for r, c in inside) for k in range(len(x))]))
        elif name == "scda":
            part = slow_part((activation > activation.mean()).tolist())
            mean = torch.stack([sum(w[r, c] * x[k, r, c] for r, c in part) for k in range(len(x))])
            mean = mean / sum(w[r, c] for r, c in part)
            largest = torch.stack([max(w[r, c] * x[k, r, c] for r, c in part) for k in range(len(x))])
            result.append(torch.cat([mean / mean.norm(), largest / largest.norm()]))
        else:
            positive = activation.clamp(min=0)
            shares = torch.stack([sum(w[r, c] for r, c in cells if x[k, r, c] > 0) / w.sum() for k in range(len(x))])
            spatial = (positive / positive.norm()) ** 0.5
            sums = torch.stack([sum(spatial[r, c] * w[r, c] * x[k, r, c] for r, c in cells) for k in range(len(x))])
            result.append((shares.sum() / shares).log() * sums)
    return torch.stack(result)


THRESHOLDS = {
    "rmac": lambda _: None,
    "ramac": lambda activation: activation.mean(),
    "grmac": lambda activation: ((activation - activation.min()) ** 3.5).mean() ** (1 / 3.5) + activation.min(),
}


@pytest.mark.parametrize("function", [rmac, ramac, grmac, amac, crow, scda])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 7), (4, 6), (9, 5)])
def test_regional_and_selective_poolings_against_slow_twins(function, weighted: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    # As after a ReLU: many cells are zero, none below.
    maps, weight = torch.randn(3, 5, *shape).clamp(min=0), torch.rand(3, 1, *shape) if weighted else None
    name = function.__name__
    if name in THRESHOLDS:
        expected = slow_regional(maps, weight, THRESHOLDS[name], 1 / 3 if name == "grmac" else 0.0)
    else:
        expected = slow_other(name, maps, weight)
    torch.testing.assert_close(function(maps, weight).double(), expected, atol=1e-4, rtol=1e-4)


def test_attention_can_leave_out_weakly_attended_regions() -> None:
    maps = torch.zeros(1, 1, 7, 7)
    maps[0, 0, 0, 0] = 1.0
    full = ramac(maps)
    assert 0 < ramac(maps, least=0.1).item() < full.item()
    assert ramac(maps, least=0.9).item() == rmac(maps).item(), "where no region is attended to enough, all count"


def test_regions_of_oblong_maps_overlap() -> None:
    assert regions(7, 10, 1) == [(0, 0, 7), (0, 3, 7)]
    for height, width in ((3, 20), (20, 3), (7, 7), (1, 1), (1, 5)):
        for top, left, side in regions(height, width, 3):
            assert 0 <= top <= height - side
            assert 0 <= left <= width - side


ALL = [spoc, gem, mac, rmac, ramac, grmac, amac, crow, scda]


@pytest.mark.parametrize("function", ALL)
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


@pytest.mark.parametrize("function", ALL)
def test_rows_do_not_depend_on_their_batch(function) -> None:
    maps, weight = torch.rand(4, 3, 5, 5), torch.rand(4, 1, 5, 5)
    alone = torch.cat([function(maps[i : i + 1], weight[i : i + 1]) for i in range(4)])
    assert torch.equal(function(maps, weight), alone)


def extraction() -> Extraction:
    torch.manual_seed(1)
    sizes = (8, 4, 2, 2)
    masks, taps = [torch.rand(2, 1, s, s) for s in sizes], [torch.rand(2, 6, s, s) for s in sizes]
    return Extraction(masks, taps, torch.rand(2, 9, 2, 2), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))


def test_pooling_picks_map_and_mask() -> None:
    e = extraction()
    assert torch.equal(Pooling(spoc, saliency=False)(e), spoc(e.last))
    assert torch.equal(Pooling(spoc, saliency=True)(e), spoc(e.last, e.masks[-1]))
    assert torch.equal(Pooling(mac, saliency=True, map=2)(e), mac(e.taps[1], e.masks[1]))


def test_pooling_the_picture_itself() -> None:
    e = extraction()
    seen = []

    def pool(pictures: Tensor, weight: Tensor | None) -> Tensor:
        seen.append((pictures, weight))
        return pictures.float().mean(dim=(2, 3))

    Pooling(pool, saliency=False, map="picture")(e)
    Pooling(pool, saliency=True, map="picture")(e)
    assert torch.equal(seen[0][0], e.pictures)
    assert seen[0][0].dtype == torch.uint8
    assert seen[0][1] is None
    assert torch.equal(seen[1][1], e.saliency(16))
    assert [Pooling(pool, saliency=s, map="picture").shallowest(4) for s in (False, True)] == [4, 0]


def test_pooling_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="taps 1 to 4, and last"):
        Pooling(spoc, saliency=False, map=5)(extraction())
    with pytest.raises(ValueError, match="type last, picture, or the number of a tap"):
        Pooling(spoc, saliency=False, map="first")
