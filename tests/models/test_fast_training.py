"""The optimized network against the plain one: same function, same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from beauty_bafe.models.fast_training import optimize_for_training


def learn(network: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and every parameter's gradient of some loss."""
    output = network.forward_features(inputs)
    (output.float() * torch.linspace(-1, 1, output.shape[1]).view(-1, 1, 1)).mean().backward()
    return output, {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "densenet121", "vgg11_bn", "seresnet50"])
def test_optimized_networks_learn_the_same(lived_in: Callable[[str], Any], name: str) -> None:
    network = lived_in(name).double()  # in float32 a rounding can carry a value over an activation's kink
    quick = copy.deepcopy(network)
    for _ in range(2):  # twice: a module may be fitted again
        optimize_for_training(quick, torch.randn(1, 3, 64, 64).double())
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
    optimize_for_training(network, torch.randn(1, 4, 11, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(inputs)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), wanted, atol=0.03, rtol=0.03)
    for one, two in zip(
        torch.autograd.grad(output.float().square().sum(), [inputs, *network.parameters()]), exact, strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.03 * two.abs().max().item(), rtol=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 2, "dilation": 2, "groups": 4},
        {"padding": "same", "groups": 4},
        {"padding": 1, "padding_mode": "reflect", "groups": 4},
        {"padding": 1, "groups": 2},
    ],
)
def test_unusual_convolutions_stay_right(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4, momentum=None))
    for _ in range(3):
        network(3 * torch.randn(8, 4, 9, 9) + 1)  # statistics of its own
    network.eval()
    quick, inputs = copy.deepcopy(network), torch.randn(2, 4, 9, 9)
    optimize_for_training(quick, inputs)
    torch.testing.assert_close(quick(inputs), network(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(quick(inputs).float(), network(inputs).float(), atol=0.05, rtol=0.05)
