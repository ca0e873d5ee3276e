"""Batch norms folded away: the same function before and after, for use and for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from beauty_bafe.models.extractor import BackgroundAgnosticExtractor
from beauty_bafe.models.folding import fold_norms, quicken


def lived_in(name: str) -> nn.Module:
    """A network whose batch norms have statistics and weights to get wrong."""
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return network


@pytest.mark.parametrize(
    ("name", "left"), [("resnet18", 0), ("tf_efficientnet_lite0", 0), ("densenet121", 62), ("vgg11_bn", 0), ("seresnet50", 0)]
)
def test_folded_norms_change_nothing(name: str, left: int) -> None:
    """DenseNet's norms that take several convolutions at once must stay."""
    network = lived_in(name)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network.forward_features(inputs)
        fold_norms(network, torch.randn(1, 3, 64, 64))
        after = network.forward_features(inputs)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == left
    torch.testing.assert_close(after, before, atol=1e-4 * before.abs().max().item(), rtol=1e-3)


def test_a_tapped_norm_is_still_tapped(tiny: dict[str, Any]) -> None:
    torch.manual_seed(0)
    extractor = BackgroundAgnosticExtractor(**tiny | {"taps": ["conv_stem", "bn1", "blocks.1", "bn2"]}).eval()
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        before = extractor(pictures)
        fold_norms(extractor, pictures[:1])
        after = extractor(pictures)
    for one, two in zip((*before.taps, before.last), (*after.taps, after.last), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def learn(network: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and every parameter's gradient of some loss."""
    network.zero_grad()
    output = network.forward_features(inputs)  # type: ignore[operator]
    (output.float() * torch.linspace(-1, 1, output.shape[1]).view(-1, 1, 1)).mean().backward()
    return output, {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "densenet121", "vgg11_bn", "seresnet50"])
def test_quickened_networks_learn_the_same(name: str) -> None:
    network = lived_in(name).double()  # in float32 a rounding can carry a value over an activation's kink
    quick = copy.deepcopy(network)
    for _ in range(2):  # twice: a module may be fitted again
        quicken(quick, torch.randn(1, 3, 64, 64).double())
    inputs = torch.randn(2, 3, 64, 64).double()
    output, gradients = learn(network, inputs)
    quick_output, quick_gradients = learn(quick, inputs)
    torch.testing.assert_close(quick_output, output)
    torch.testing.assert_close(quick_gradients, gradients)
    assert list(quick.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
@pytest.mark.parametrize("kernel", [3, 5, (3, 5), 7, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_under_autocast_against_float32(groups: int, kernel: Any, stride: Any, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, stride, padding=2, groups=groups, bias=bias)
    network, inputs = nn.Sequential(layer), torch.randn(2, 4, 11, 12, requires_grad=True)
    wanted = network(inputs)
    exact = torch.autograd.grad(wanted.square().sum(), [inputs, *network.parameters()])
    quicken(network, torch.randn(1, 4, 11, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), wanted, atol=0.03, rtol=0.03)
    for one, two in zip(
        torch.autograd.grad(output.float().square().sum(), [inputs, *network.parameters()]), exact, strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.03 * two.abs().max().item(), rtol=0.03)
