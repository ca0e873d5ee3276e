"""Learned keypoints and a learned matcher: kornia's networks, with weights from files, packages or kornia's download."""

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
from .keypoints import Detector, Keypoints, compare_by, to_bytes
from .matching import Matches

SPARE = 4  # times the keypoints asked for are found, as those beside the product are left out
SURE = 0.1  # the probability that a match of LightGlue's needs, as its authors have it
NEVER = -1e9  # the log probability of a match with padding


def check(weights: str | None, setting: str) -> None:
    """Raise ValueError where kornia or the file of weights is missing, before anything is computed."""
    if find_spec("kornia") is None:
        raise ValueError("learned keypoints need kornia, which is not installed; pip install 'beauty_bafe[matching]'")
    if weights is not None:
        find_weights(weights, setting)


def load(make: Callable[[], nn.Module], download: Callable[[], nn.Module], weights: str | None, setting: str) -> nn.Module:
    """The network that `make` builds, with `weights`, ready to run; None lets kornia `download` one whole.

    Raises ValueError where the weights do not fit, RuntimeError where the download fails.
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
    known = {_name(key): value for key, value in state.items()}
    needed = dict(network.named_parameters()) | {key: value for key, value in network.named_buffers() if "running" in key}
    wrong = [key for key, value in needed.items() if key not in known or known[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"{setting}={weights} does not fit {type(network).__name__}: {len(wrong)} of {len(needed)} tensors are missing or "
            f"of another shape ({', '.join(wrong[:3])})"
        )
    network.load_state_dict({key: known[key] for key in network.state_dict() if key in known}, strict=False)
    return network.eval().to(device)


def _name(key: str) -> str:
    """A tensor's name as kornia has it: XFeat's authors save LighterGlue as `matcher`, older files of LightGlue by kind."""
    return re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", key.removeprefix("matcher."))


@dataclass(frozen=True)
class Learned(Detector):
    """`weights`: FILE, package:NAME/FILE, or None for kornia's download."""

    weights: str | None = None

    def __post_init__(self) -> None:
        check(self.weights, "detector.weights")

    def key(self) -> dict[str, Any]:
        content = None if self.weights is None else digest(find_weights(self.weights, "detector.weights").read_bytes())
        return super().key() | {"weights": content, "kornia": version("kornia")}

    def _load(self, make: Callable[[], nn.Module], download: Callable[[], nn.Module]) -> nn.Module:
        return load(make, download, self.weights, "detector.weights")

    def _pixels(self, rgb: np.ndarray, network: nn.Module) -> Tensor:
        """uint8 (S, S, 3) -> float32 (1, 3, S, S), 0 to 1."""
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).to(next(network.parameters()).device)
        return pixels.permute(2, 0, 1)[None].float() / 255

    def _kept(self, points: Tensor, inside: np.ndarray | None) -> Tensor:
        """Which of the points, float (K, 2), strongest first, are the strongest that may be kept: int64 (<= most,)."""
        if inside is None or not self.foreground:
            return torch.arange(min(len(points), self.most), device=points.device)
        x, y = points.round().long().clamp(0, len(inside) - 1).T
        return torch.from_numpy(inside).to(points.device)[y, x].nonzero()[: self.most, 0]


@dataclass(frozen=True)
class Aliked(Learned):
    """ALIKED (Zhao et al., TIM 2023), 128-d. `variant`: kornia's name; aliked-n16rot was trained with all rotations.

    `least`: the score that a keypoint needs, 0 to 1; those of a blank or noisy picture stay below 0.02.
    """

    variant: str = "aliked-n16rot"
    least: float = 0.05

    @cached_property
    def network(self) -> Any:
        from kornia.feature import ALIKED

        known: dict[str, Any] = {"max_num_keypoints": SPARE * self.most, "detection_threshold": -1.0}
        return self._load(lambda: ALIKED(self.variant, **known), lambda: ALIKED.from_pretrained(self.variant, **known))

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        features, scores = self.network.extract_dense_map(self._pixels(rgb, self.network))
        places, strengths, _ = self.network.dkd(scores)
        found = places[0][strengths[0] > self.least]  # -1 to 1
        points = (found + 1) / 2 * (len(rgb) - 1)
        kept = self._kept(points, inside)
        descriptors = self.network.desc_head(features, [found[kept]])[0][0]
        return Keypoints(points[kept].float().cpu().numpy(), to_bytes(descriptors.float().cpu().numpy()))


@dataclass(frozen=True)
class XFeat(Learned):
    """XFeat (Potje et al., CVPR 2024), 64-d: fast, and not made for turned pictures. `size`: a multiple of 32."""

    @cached_property
    def network(self) -> Any:
        from kornia.feature import XFeat as Network

        known: dict[str, Any] = {"top_k": SPARE * self.most}

        def download() -> nn.Module:
            return Network.from_pretrained(**known).net

        network = Network(**known).eval()
        network.net = cast(Any, self._load(lambda: network.net, download))
        return network

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray, inside: np.ndarray | None = None) -> Keypoints:
        found = self.network.detectAndCompute(self._pixels(rgb, self.network))[0]
        kept = self._kept(found["keypoints"], inside)
        points, descriptors = (found[name][kept].float().cpu().numpy() for name in ("keypoints", "descriptors"))
        return Keypoints(points, to_bytes(descriptors))


@dataclass(frozen=True)
class LightGlue:
    """LightGlue (Lindenberger et al., ICCV 2023) for `features`: aliked, disk, or xfeat, whose LighterGlue is small.

    `layers`: how many of its layers run, None for all; every layer was trained to give matches, and time goes with them.
    `batch`: pairs that run together. `precision`: "32-true", "bf16-mixed", None for the faster here.
    """

    features: str
    weights: str | None = None
    layers: int | None = None
    batch: int = 16
    precision: str | None = None

    def __post_init__(self) -> None:
        check(self.weights, "matcher.weights")

    @cached_property
    def network(self) -> Assignment:
        from kornia.feature import LightGlue as Network

        if self.features not in Network.features:
            raise ValueError(f"matcher.features={self.features}: type one of {', '.join(sorted(Network.features))}")
        known: dict[str, Any] = {key: value for key, value in Network.features[self.features].items() if key != "weights"}

        def make() -> nn.Module:
            return Network(cast(str, None), **known)  # kornia takes None, whatever its hint says

        network = load(make, lambda: Network(self.features), self.weights, "matcher.weights")
        device = next(network.parameters()).device.type
        halved = (self.precision or fastest_precision(device)) == "bf16-mixed"
        return Assignment(network, self.layers, torch.bfloat16 if halved else torch.float32)

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
            mutual = (back.gather(1, best.indices) == here) & (best.values > np.log(SURE))
            for row, keep, other in zip(part, mutual.cpu().numpy(), best.indices.cpu().numpy(), strict=True):
                matches[row] = (np.flatnonzero(keep), other[keep])
        return matches

    def _stack(self, pictures: Sequence[Keypoints], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Points float32 (B, K, 2), -1 to 1; descriptors float32 (B, K, D); which are no padding, bool (B, K)."""
        most = max(len(keypoints.points) for keypoints in pictures)
        points = np.zeros((len(pictures), most, 2), np.float32)
        descriptors = np.zeros((len(pictures), most, pictures[0].descriptors.shape[1]), np.float32)
        present = np.zeros((len(pictures), most), bool)
        for row, keypoints in enumerate(pictures):
            count = len(keypoints.points)
            points[row, :count] = keypoints.points * (2 / size) - 1
            descriptors[row, :count] = compare_by(keypoints)
            present[row, :count] = True
        device = next(self.network.parameters()).device
        first, second, third = (torch.from_numpy(array).to(device) for array in (points, descriptors, present))
        return first, second, third


class Assignment(nn.Module):
    """kornia's LightGlue over pairs of one padded shape, for the first `layers` layers, multiplying in `dtype`.

    Its own loop takes no padding without being compiled for it, and leaves points out pair by pair, one pair at a time.
    """

    def __init__(self, network: Any, layers: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        most = len(network.transformers)
        if layers is not None and not 1 <= layers <= most:
            raise ValueError(f"matcher.layers={layers}: this network has 1 to {most}, null for all")
        self.place = network.posenc  # in float32: bfloat16 has no more than 256 places along a side
        self.lift = network.input_proj.to(dtype)
        self.layers = network.transformers[: layers or most].to(dtype)
        self.assign = network.log_assignment[(layers or most) - 1].to(dtype)
        self.dtype = dtype

    def forward(
        self, points: Tensor, descriptors: Tensor, present: Tensor, points1: Tensor, descriptors1: Tensor, present1: Tensor
    ) -> Tensor:
        """One query, (1, M, ..) each, with candidates, (B, N, ..) each (see `LightGlue._stack`).

        Gives the log probability that two keypoints match, float32 (B, M, N).
        """
        turn, turn1 = self.place(points).to(self.dtype), self.place(points1).to(self.dtype)
        x, x1 = self.lift(descriptors.to(self.dtype)), self.lift(descriptors1.to(self.dtype))
        keys, keys1 = present[:, None, None], present1[:, None, None]
        for layer in self.layers:
            x, x1 = layer.self_attn(x, turn, keys), layer.self_attn(x1, turn1, keys1)
            x = x.expand(len(x1), -1, -1)  # alone up to here, as it has not seen the candidates yet
            x, x1 = _look_across(layer.cross_attn, x, x1, keys, keys1)
        first, second = self.assign.final_proj(x), self.assign.final_proj(x1)
        likeness = (first @ second.mT).float() / first.shape[-1] ** 0.5
        likeness = likeness.masked_fill(~(present[:, :, None] & present1[:, None]), NEVER)
        sure, sure1 = (F.logsigmoid(self.assign.matchability(part).float()) for part in (x, x1))
        return likeness.log_softmax(dim=2) + likeness.log_softmax(dim=1) + sure + sure1.mT


def _look_across(block: Any, x: Tensor, x1: Tensor, keys: Tensor, keys1: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture's keypoints attend to the other's: kornia's cross-attention without holding the products of all pairs."""

    def heads(values: Tensor) -> Tensor:
        return values.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    ask, ask1, tell, tell1 = heads(block.to_qk(x)), heads(block.to_qk(x1)), heads(block.to_v(x)), heads(block.to_v(x1))
    heard = F.scaled_dot_product_attention(ask, ask1, tell1, attn_mask=keys1)
    heard1 = F.scaled_dot_product_attention(ask1, ask, tell, attn_mask=keys)
    told, told1 = (block.to_out(part.transpose(1, 2).flatten(2)) for part in (heard, heard1))
    return x + block.ffn(torch.cat([x, told], -1)), x1 + block.ffn(torch.cat([x1, told1], -1))
