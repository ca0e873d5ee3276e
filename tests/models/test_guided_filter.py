"""Masks that follow the edges of colours, against a slow twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beauty_bafe.models.extractor import resize_mask
from beauty_bafe.models.views import guided_filter
from tests.textured import scene


def guided_slowly(mask: torch.Tensor, guide: torch.Tensor, radius: int, faint: float) -> torch.Tensor:
    """Window by window: ridge regression of the mask (H, W) on the colours (3, H, W); the mean of all fits at each cell."""
    height, width = mask.shape
    fits = torch.zeros(4, height, width, dtype=torch.float64)
    windows = [
        [(slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)) for x in range(width)]
        for y in range(height)
    ]
    for y, row in enumerate(windows):
        for x, window in enumerate(row):
            colours, wanted = guide[:, *window].flatten(1).double(), mask[window].flatten().double()
            centred = colours - colours.mean(dim=1, keepdim=True)
            covariance = centred @ centred.T / centred.shape[1] + faint * torch.eye(3)
            slope = torch.linalg.solve(covariance, centred @ (wanted - wanted.mean()) / centred.shape[1])
            fits[:, y, x] = torch.cat([slope, (wanted.mean() - slope @ colours.mean(dim=1))[None]])
    mean = torch.stack([torch.stack([fits[:, *window].flatten(1).mean(dim=1) for window in row]) for row in windows])
    return (mean[..., :3].permute(2, 0, 1) * guide).sum(dim=0) + mean[..., 3]


def test_a_mask_follows_edges_as_its_slow_twin() -> None:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])  # channels depend on each other
    small = (255 * torch.einsum("ij,bjhw->bihw", mixed, torch.rand(1, 3, 12, 12, generator=generator))).to(torch.uint8)
    # Cells of one colour each, so that the coarse grid sees just them.
    picture = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    mask = torch.rand(1, 1, 12, 12, generator=generator)
    found = guided_filter(mask.repeat_interleave(8, 2).repeat_interleave(8, 3), picture, 0.25)
    wanted = (3 * (guided_slowly(mask[0, 0], small[0] / 255, 3, 1e-4) - 0.5) + 0.5).clamp(0, 1)
    # In a cell's middle the enlarged fit is the cell's own, up to half a pixel.
    middle = found[0, 0, 4::8, 4::8]
    assert (middle - wanted).abs().max() < 0.06
    assert ((middle > 0.5) == (wanted > 0.5)).float().mean() > 0.97


@pytest.mark.parametrize("grey", [True, False])
def test_a_mask_follows_edges_in_single_precision(grey: bool) -> None:
    """Grey beside white tells no colour from another, and flat white has no covariance: easily a percent off."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 256, (1, 1 if grey else 3, 16, 16), generator=generator, dtype=torch.uint8)
    picture = cells.expand(-1, 3, -1, -1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    picture[..., :64] = 255
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 32:-32, 32:-32] = 1
    exact = guided_filter(mask.double(), picture.double(), 0.1)
    assert exact.dtype == torch.float64
    assert (guided_filter(mask, picture, 0.1) - exact).abs().max() < 1e-4


def test_a_mask_two_pixels_off_comes_to_the_products_edge() -> None:
    picture, mask = scene(128, 40, 30, 48, 64)
    picture[:, 2] = 255 - picture[:, 2]
    off = F.interpolate(mask.roll((2, -2), (2, 3)), (32, 32), mode="area")  # and blurred
    off = F.interpolate(off, (128, 128), mode="bilinear")
    found = guided_filter(off, picture, 0.1)
    assert (found - mask).abs().mean() < 0.5 * (off - mask).abs().mean()
    wrong, was = (((drawn > 0.5) != (mask > 0.5)).float().mean() for drawn in (found, off))
    assert wrong < 0.35 * was, (wrong, was)
    grey = torch.full_like(picture, 90)
    assert ((guided_filter(off, grey, 0.02) > 0.5) == (off > 0.5)).float().mean() > 0.98, "without colours it hardly moves"


def test_a_smaller_mask_follows_the_same_edges() -> None:
    picture, mask = scene(128, 40, 30, 48, 64)
    picture[:, 2] = 255 - picture[:, 2]
    off = F.interpolate(mask.roll((2, -2), (2, 3)), (32, 32), mode="area")
    large, small = (guided_filter(resize_mask(off, side), picture, 0.1) for side in (128, 64))
    assert small.shape == (1, 1, 64, 64)
    assert (small - F.avg_pool2d(large, 2)).abs().mean() < 0.01
