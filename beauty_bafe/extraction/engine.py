"""The networks of an ensemble, from uint8 pictures to the descriptors and masks of every member. Reads and writes no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.pictures import letterbox
from ..models.descriptor import Pooling
from ..models.extractor import BackgroundAgnosticExtractor
from ..models.inference import Describer, Engine
from ..models.views import View

Canvas = tuple[int, int]  # side in pixels, and padding value


class Settings(Protocol):
    """How networks are run; see FeatureExtraction."""

    batch_size: int | None
    device: str
    precision: str
    runtime: str
    scales: tuple[float, ...]
    flip: bool


@dataclass(frozen=True)
class Network:
    """One network: `numbers` of the members that use it, the number of the canvas that it takes, and its engine."""

    numbers: list[int]
    canvas: int
    engine: Engine


class Described(NamedTuple):
    """A member's output for N pictures: `vectors`, float32 (N, D) of length 1; `masks`, uint8 (N, 112, 112), or None."""

    vectors: np.ndarray
    masks: np.ndarray | None


class EnsembleEngine:
    """The networks of all members: built once, safe to call from several threads. A descriptor depends only on its picture.

    `members`: network and pooling by the number of the member. `masks`: whether to return the masks of members whose pooling
    uses them. `view`: see Describer. `plans`: by member, the batch size and runtime of a run that is being resumed.
    """

    def __init__(
        self,
        settings: Settings,
        members: Mapping[int, tuple[BackgroundAgnosticExtractor, Pooling]],
        masks: bool,
        view: View | None = None,
        plans: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        self.masks, self.poolings = masks, {number: pooling for number, (_, pooling) in members.items()}
        shared: dict[BackgroundAgnosticExtractor, list[int]] = {}
        for number, (extractor, _) in members.items():
            shared.setdefault(extractor, []).append(number)
        engines = []
        for extractor, numbers in shared.items():
            # A resumed run keeps its plan, as another one would change the last bits of its vectors.
            plan = next((plans[number] for number in numbers if plans and plans.get(number)), {})
            poolings = [self.poolings[number] for number in numbers]
            drawn = masks and any(pooling.saliency for pooling in poolings)
            describer = Describer(extractor, poolings, drawn, settings.scales, settings.flip, view)
            runtime = plan.get("runtime", "auto") if settings.runtime == "auto" else settings.runtime
            batch = settings.batch_size or plan.get("batch")
            engines.append((numbers, Engine(describer, settings.device, settings.precision, batch, runtime)))
        taken = [(engine.describer.canvas, engine.describer.extractor.pad) for _, engine in engines]
        self.canvases: list[Canvas] = sorted(set(taken))
        self.networks = [
            Network(numbers, self.canvases.index(canvas), engine)
            for (numbers, engine), canvas in zip(engines, taken, strict=True)
        ]

    def __call__(self, canvases: Sequence[Tensor]) -> list[Described]:
        """A batch per canvas, uint8 (N, 3, S, S), as returned by `stack` -> one Described per member, in their order."""
        results: dict[int, Described] = {}
        for network in self.networks:
            outputs = [output.numpy() for output in network.engine(canvases[network.canvas])]
            for place, number in enumerate(network.numbers):
                drawn = self.masks and self.poolings[number].saliency
                results[number] = Described(outputs[place], outputs[-1] if drawn else None)
        return [results[number] for number in sorted(results)]


def longest(canvases: Sequence[Canvas]) -> int:
    """The largest side in pixels; pictures can be decoded at this size."""
    return max(side for side, _ in canvases)


def fit(rgb: np.ndarray, canvases: Sequence[Canvas]) -> list[Tensor]:
    """uint8 (H, W, 3) -> one uint8 (3, S, S) per canvas."""
    return [torch.from_numpy(letterbox(rgb, *canvas)).permute(2, 0, 1) for canvas in canvases]


def stack(pictures: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The outputs of `fit` for N pictures -> one uint8 (N, 3, S, S) per canvas."""
    return [torch.stack(views) for views in zip(*pictures, strict=True)]
