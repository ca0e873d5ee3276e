"""Learned keypoint detectors and a learned matcher: kornia's networks, with weights from files, packages or downloads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..manifest import digest
from ..models.backbones import find_weights, read_state
from ..models.precision import fastest_precision, pick_device
from .keypoints import Detector, Keypoints, normalized_descriptors, quantize
from .matching import Matches

OVERSAMPLE = 4  # detect this many times the requested keypoints, as those off the product are dropped
MIN_PROBABILITY = 0.1  # of a match of LightGlue, its authors' default
MASKED = -1e9  # log probability of a match with padding


def check_available(weights: str | None, setting: str) -> None:
    """Raise ValueError if kornia or the weight file is missing, before anything is computed."""
    if find_spec("kornia") is None:
        raise ValueError("learned keypoints need kornia, which is not installed; pip install 'beauty_bafe[matching]'")
    if weights is not None:
        find_weights(weights, setting)


def load_network(
    make: Callable[[], nn.Module], download: Callable[[], nn.Module], weights: str | None, setting: str
) -> nn.Module:
    """Build a network with `make` and load `weights` into it, for inference; None: call `download`, which returns both.

    Raises ValueError if the weights do not fit, RuntimeError if the download fails.
    """
    device = pick_device("auto")
    if weights is None:
        try:
            return download().eval().to(device)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"kornia could not download the weights ({error}); type {setting}=FILE or package:NAME/FILE"
            ) from error
    network, state = make(), read_state(find_weights(weights, setting))
    known = {_kornia_name(key): value for key, value in state.items()}
    needed = dict(network.named_parameters()) | {key: value for key, value in network.named_buffers() if "running" in key}
    wrong = [key for key, value in needed.items() if key not in known or known[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{setting}={weights} does not fit {type(network).__name__}: {len(wrong)} of {len(needed)} tensors are missing or "
            f"have another shape ({', '.join(wrong[:3])}); type the weights of this network"
        )
    network.load_state_dict({key: known[key] for key in network.state_dict() if key in known}, strict=False)
    return network.eval().to(device)


def _kornia_name(key: str) -> str:
    """kornia's name of a tensor. XFeat's authors prefix LighterGlue with `matcher`; older LightGlue files group by kind."""
    return re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", key.removeprefix("matcher."))


@dataclass(frozen=True)
class LearnedDetector(Detector):
    """A detector with a network. `weights`: FILE, package:NAME/FILE, or None for kornia's download."""

    weights: str | None = None

    def __post_init__(self) -> None:
        check_available(self.weights, "detector.weights")

    def key(self) -> dict[str, Any]:
        content = None if self.weights is None else digest(find_weights(self.weights, "detector.weights").read_bytes())
        return super().key() | {"weights": content, "kornia": version("kornia")}

    def _load(self, make: Callable[[], nn.Module], download: Callable[[], nn.Module]) -> nn.Module:
        return load_network(make, download, self.weights, "detector.weights")

    def _pixels(self, rgb: np.ndarray, network: nn.Module) -> Tensor:
        """uint8 (S, S, 3) -> float32 (1, 3, S, S), 0 to 1."""
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).to(next(network.parameters()).device)
        return pixels.permute(2, 0, 1)[None].float() / 255

    def _select(self, points: Tensor, inside: np.ndarray | None) -> Tensor:
        """Indices of the `most` strongest allowed points, int64 (<= most,), given float (K, 2), strongest first."""
        if inside is None or not self.foreground:
            return torch.arange(min(len(points), self.most), device=points.device)
        x, y = points.round().long().clamp(0, len(inside) - 1).T
        return torch.from_numpy(inside).to(points.device)[y, x].nonzero()[: self.most, 0]


@dataclass(frozen=True)
class Aliked(LearnedDetector):
    """ALIKED (Zhao et al., TIM 2023), 128-d. `variant`: kornia's name; aliked-n16rot was trained with all rotations.

    `least`: minimum score of a keypoint, 0 to 1; in blank or noisy pictures scores stay below 0.02.
    """

    variant: str = "aliked-n16rot"
    least: float = 0.05

    @cached_property
    def network(self) -> Any:
        from kornia.feature import ALIKED

        known: dict[str, Any] = {"max_num_keypoints": OVERSAMPLE * self.most, "detection_threshold": -1.0}
        return self._load(lambda: ALIKED(self.variant, **known), lambda: ALIKED.from_pretrained(self.variant, **known))

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        features, scores = self.network.extract_dense_map(self._pixels(rgb, self.network))
        positions, strengths, _ = self.network.dkd(scores)
        detected = positions[0][strengths[0] > self.least]  # -1 to 1
        points = (detected + 1) / 2 * (len(rgb) - 1)
        kept = self._select(points, inside)
        descriptors = self.network.desc_head(features, [detected[kept]])[0][0]
        return Keypoints(points[kept].float().cpu().numpy(), quantize(descriptors.float().cpu().numpy()))


@dataclass(frozen=True)
class XFeat(LearnedDetector):
    """XFeat (Potje et al., CVPR 2024), 64-d: fast, but not rotation-invariant. `size`: a multiple of 32."""

    @cached_property
    def network(self) -> Any:
        from kornia.feature import XFeat as Network

        known: dict[str, Any] = {"top_k": OVERSAMPLE * self.most}

        def download() -> nn.Module:
            return Network.from_pretrained(**known).net

        network = Network(**known).eval()
        network.net = cast(Any, self._load(lambda: network.net, download))
        return network

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        detected = self.network.detectAndCompute(self._pixels(rgb, self.network))[0]
        kept = self._select(detected["keypoints"], inside)
        points, descriptors = (detected[name][kept].float().cpu().numpy() for name in ("keypoints", "descriptors"))
        return Keypoints(points, quantize(descriptors))


@dataclass(frozen=True)
class LightGlue:
    """LightGlue (Lindenberger et al., ICCV 2023) for `features`: aliked, disk, or xfeat (the smaller LighterGlue).

    `layers`: number of layers to run, None for all; each was trained to predict matches, and the time is proportional to
    their number. `batch`: pairs per batch. `precision`: "32-true", "bf16-mixed", or None for the faster one on this device.
    """

    features: str
    weights: str | None = None
    layers: int | None = None
    batch: int = 16
    precision: str | None = None

    def __post_init__(self) -> None:
        check_available(self.weights, "matcher.weights")

    @cached_property
    def network(self) -> BatchedLightGlue:
        from kornia.feature import LightGlue as Network

        if self.features not in Network.features:
            raise ValueError(f"matcher.features={self.features}: type one of {', '.join(sorted(Network.features))}")
        known: dict[str, Any] = {key: value for key, value in Network.features[self.features].items() if key != "weights"}

        def make() -> nn.Module:
            return Network(cast(str, None), **known)  # kornia accepts None, contrary to its annotation

        network = load_network(make, lambda: Network(self.features), self.weights, "matcher.weights")
        device = next(network.parameters()).device.type
        half = (self.precision or fastest_precision(device)) == "bf16-mixed"
        return BatchedLightGlue(network, self.layers, torch.bfloat16 if half else torch.float32)

    @torch.inference_mode()
    def __call__(self, query: Keypoints, candidates: Sequence[Keypoints], size: int) -> list[Matches]:
        matches: list[Matches] = [(np.zeros(0, int), np.zeros(0, int))] * len(candidates)
        rows = [row for row, candidate in enumerate(candidates) if len(candidate.points)]
        if not len(query.points):
            return matches
        own = self._stack([query], size)
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            scores = self.network(*own, *self._stack([candidates[row] for row in part], size))
            best, back = scores.max(dim=2), scores.argmax(dim=1)
            here = torch.arange(scores.shape[1], device=scores.device)
            mutual = (back.gather(1, best.indices) == here) & (best.values > np.log(MIN_PROBABILITY))
            for row, keep, other in zip(part, mutual.cpu().numpy(), best.indices.cpu().numpy(), strict=True):
                matches[row] = (np.flatnonzero(keep), other[keep])
        return matches

    def _stack(self, pictures: Sequence[Keypoints], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pad and stack: points, float32 (B, K, 2), -1 to 1; descriptors, float32 (B, K, D); valid ones, bool (B, K)."""
        most = max(len(keypoints.points) for keypoints in pictures)
        points = np.zeros((len(pictures), most, 2), np.float32)
        descriptors = np.zeros((len(pictures), most, pictures[0].descriptors.shape[1]), np.float32)
        present = np.zeros((len(pictures), most), bool)
        for row, keypoints in enumerate(pictures):
            count = len(keypoints.points)
            points[row, :count] = keypoints.points * (2 / size) - 1
            descriptors[row, :count] = normalized_descriptors(keypoints)
            present[row, :count] = True
        device = next(self.network.parameters()).device
        first, second, third = (torch.from_numpy(array).to(device) for array in (points, descriptors, present))
        return first, second, third


class BatchedLightGlue(nn.Module):
    """The first `layers` layers of kornia's LightGlue over a batch of padded pairs, with matrix products in `dtype`.

    kornia's own forward supports padding only when compiled, and its point pruning works on one pair at a time.
    """

    def __init__(self, network: Any, layers: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        most = len(network.transformers)
        if layers is not None and not 1 <= layers <= most:
            raise ValueError(f"matcher.layers={layers}: this network has 1 to {most}, null for all")
        self.position_encoding = network.posenc  # float32, as bfloat16 distinguishes only 256 positions along a side
        self.input_projection = network.input_proj.to(dtype)
        self.layers = network.transformers[: layers or most].to(dtype)
        self.assignment = network.log_assignment[(layers or most) - 1].to(dtype)
        self.dtype = dtype

    def forward(
        self, points: Tensor, descriptors: Tensor, present: Tensor, points1: Tensor, descriptors1: Tensor, present1: Tensor
    ) -> Tensor:
        """Log probability that two keypoints match, float32 (B, M, N).

        Takes one query, (1, M, ...) each, and its candidates, (B, N, ...) each (see `LightGlue._stack`).
        """
        rotary, rotary1 = self.position_encoding(points).to(self.dtype), self.position_encoding(points1).to(self.dtype)
        x, x1 = self.input_projection(descriptors.to(self.dtype)), self.input_projection(descriptors1.to(self.dtype))
        keys, keys1 = present[:, None, None], present1[:, None, None]
        for layer in self.layers:
            x, x1 = layer.self_attn(x, rotary, keys), layer.self_attn(x1, rotary1, keys1)
            x = x.expand(len(x1), -1, -1)  # one copy up to the first cross-attention
            x, x1 = _cross_attention(layer.cross_attn, x, x1, keys, keys1)
        first, second = self.assignment.final_proj(x), self.assignment.final_proj(x1)
        similarity = (first @ second.mT).float() / first.shape[-1] ** 0.5
        similarity = similarity.masked_fill(~(present[:, :, None] & present1[:, None]), MASKED)
        matchable, matchable1 = (F.logsigmoid(self.assignment.matchability(part).float()) for part in (x, x1))
        return similarity.log_softmax(dim=2) + similarity.log_softmax(dim=1) + matchable + matchable1.mT


def _cross_attention(block: Any, x: Tensor, x1: Tensor, keys: Tensor, keys1: Tensor) -> tuple[Tensor, Tensor]:
    """kornia's bidirectional cross-attention, computed without storing the attention matrices."""

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    qk, qk1, v, v1 = heads(block.to_qk(x)), heads(block.to_qk(x1)), heads(block.to_v(x)), heads(block.to_v(x1))
    attended = F.scaled_dot_product_attention(qk, qk1, v1, attn_mask=keys1)
    attended1 = F.scaled_dot_product_attention(qk1, qk, v, attn_mask=keys)
    message, message1 = (block.to_out(part.transpose(1, 2).flatten(2)) for part in (attended, attended1))
    return x + block.ffn(torch.cat([x, message], -1)), x1 + block.ffn(torch.cat([x1, message1], -1))
