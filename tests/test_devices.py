"""Tensors of a GPU and of the CPU must not meet. Tested without a GPU: PyTorch's fake tensors have a device but no data."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from beauty_bafe.config import compose
from beauty_bafe.index.first_pass import Rounded
from beauty_bafe.models import pooling
from beauty_bafe.models.descriptor import Pooling
from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.fast_training import optimize_for_training
from beauty_bafe.models.inference import Describer
from beauty_bafe.models.views import View, cut_out, whiten
from beauty_bafe.rerank.pair_network import SIDE, PairNetwork

CUT, WHITE = partial(cut_out, fill=0.9), partial(whiten, threshold=0.5)
POOLINGS = [
    Pooling(pool, saliency=saliency)
    for pool in (pooling.spoc, pooling.gem, pooling.mac, pooling.rmac)
    for saliency in (False, True)
]


def to_gpu(module: nn.Module) -> None:
    """As `module.to("cuda")`, which is not possible under FakeTensorMode."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            weight = nn.Parameter(torch.empty_like(weight, device="cuda"), requires_grad=weight.requires_grad)
            setattr(part, name, weight)
        for name, values in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(values, device="cuda"))


def drawn(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cuda")


def test_a_tensor_of_the_other_device_is_noticed() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="at least two devices"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@pytest.mark.parametrize("several", [False, True], ids=["once", "scales and flips"])
@pytest.mark.parametrize(
    "view",
    [None, View(1.3, 0.1, detail=2, least=0.005), View(1.3, 0.1, CUT, 0.5, 2), View(change=WHITE, whole=0.5)],
    ids=str,
)
def test_describing_stays_on_its_device(view: View | None, several: bool, tiny: dict[str, Any]) -> None:
    extractor = BackgroundAgnosticExtractor(**tiny).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        to_gpu(extractor)
        describer = Describer(extractor, POOLINGS, True, (1.0, 1.5) if several else (1.0,), several, view)
        outputs = describer(drawn(4, 3, describer.canvas, describer.canvas))
    assert len(outputs) == len(POOLINGS) + 1
    assert {output.device.type for output in outputs} == {"cuda"}


@pytest.mark.parametrize("objective", ["saliency", "joint", "frozen"])
def test_training_and_validation_stay_on_their_device(objective: str, tiny: dict[str, Any]) -> None:
    settings = compose("train", [f"objective={objective}", "data.root=none"]).objective
    if "average" in settings:
        settings.average = 0  # needs pretrained weights
    module = instantiate(settings, model=tiny, _recursive_=False, _convert_="all")
    module.log = lambda *_, **__: None
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(module)
        if not module.extractor.frozen:
            optimize_for_training(module.extractor.backbone, torch.zeros(1, 3, 64, 64, device="cuda"))
        batch = {"pictures": drawn(4, 2, 3, 64, 64), "masks": drawn(4, 2, 1, 64, 64), "row": torch.arange(4, device="cuda")}
        loss = module.training_step(batch, 0)
        module.eval().on_validation_epoch_start()
        module.validation_step(batch, 0)
        module.validation_step(batch, 0, 1)
    (kept,) = module._held_out
    assert {loss.device.type, *(value.device.type for value in kept.values())} == {"cuda"}


@pytest.mark.parametrize("metric", ["ip", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_pass_stays_on_its_device(metric: str, dtype: torch.dtype) -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        queries = torch.empty(70, 64, device="cuda")
        estimates = next(Rounded(torch.empty(900, 64), metric, "cuda", dtype).compare(queries, 7))
        found = [estimates.likely(7), *estimates.reaching(queries[:, 0])]
    assert {part.device.type for part in found} == {"cuda"}


def test_comparing_pairs_stays_on_its_device() -> None:
    network = PairNetwork(pretrained=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_gpu(network)
        pictures = [drawn(4, 4, SIDE, SIDE) for _ in range(2)]
        inliers = torch.ones(4, device="cuda")
        logits = network(*pictures, inliers, inliers > 0)
    assert logits.device.type == "cuda"
