"""The optimized network against the plain one: same function, same gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from beauty_bafe.models.depthwise import gradients
from beauty_bafe.models.fast_training import _relu_limit, optimize_for_training


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
@pytest.mark.parametrize("padding", [2, 7])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_under_autocast_against_float32(groups: int, padding: int, kernel: Any, stride: Any, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, kernel, stride, padding=padding, groups=groups, bias=bias)
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


def block(layer: nn.Conv2d, act: type[nn.Module] | None) -> nn.Sequential:
    """A convolution and a norm with statistics of its own, in which a third of the outputs are clamped."""
    torch.manual_seed(1)
    norm = BatchNormAct2d(layer.out_channels, apply_act=act is not None, act_layer=act or nn.ReLU)
    norm.running_mean = torch.randn(layer.out_channels)
    norm.running_var = torch.rand(layer.out_channels) / 4 + 0.05
    nn.init.uniform_(norm.weight, 1, 3)
    nn.init.normal_(norm.bias)
    return nn.Sequential(layer, norm).eval()


@pytest.mark.parametrize("act", [nn.ReLU6, nn.ReLU, nn.SiLU, None])
@pytest.mark.parametrize("size", [(11, 12), (14, 14), (7, 9)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 1, bias=False),
        lambda: nn.Conv2d(8, 8, 3, 2, padding=1),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
        lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
        lambda: Conv2dSame(8, 8, 3, 2, bias=False),
        *(lambda k=k, s=s: Conv2dSame(8, 8, k, s, groups=8, bias=False) for k in (3, 5, 7) for s in (1, 2, (1, 2))),
    ],
)
def test_blocks_under_autocast_against_float32(
    make: Callable[[], nn.Conv2d], size: tuple[int, int], act: type[nn.Module] | None
) -> None:
    network = block(make(), act)
    quick, inputs = copy.deepcopy(network), torch.randn(2, 8, *size)
    optimize_for_training(quick, inputs)
    exact, rounded = (inputs.clone().requires_grad_() for _ in range(2))
    output = network(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quick(rounded)
    assert found.dtype == torch.bfloat16 or act is nn.SiLU
    torch.testing.assert_close(found.float(), output, atol=0.1, rtol=0.03)
    linear = copy.deepcopy(network)
    linear[1].act = nn.Identity()
    before, back = linear(inputs), torch.randn(output.shape)
    back[(before.abs() < 0.1) | ((before - 6).abs() < 0.1)] = 0  # rounding can carry these over a limit
    expected = torch.autograd.grad((output * back).sum(), [exact, *network.parameters()])
    gradients = torch.autograd.grad((found.float() * back).sum(), [rounded, *quick.parameters()])
    for one, two in zip(gradients, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == two.shape
        assert (one - two).norm() <= 0.02 * two.norm() + 1e-3


def test_an_activation_is_computed_with_its_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    network = block(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6)
    inputs = torch.randn(1, 8, 9, 9)
    optimize_for_training(network, inputs)
    monkeypatch.setattr(nn.ReLU6, "forward", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(inputs).max() == 6


@pytest.mark.parametrize(
    ("act", "drop", "limit"),
    [
        (nn.ReLU6(), nn.Identity(), 6.0),
        (nn.ReLU(), nn.Identity(), math.inf),
        (nn.Hardtanh(), nn.Identity(), None),
        (nn.SiLU(), nn.Identity(), None),
        (nn.ReLU(), nn.Dropout(0.5), None),
        (nn.Identity(), nn.Identity(), None),
    ],
)
def test_which_activations_are_limits(act: nn.Module, drop: nn.Module, limit: float | None) -> None:
    norm = BatchNormAct2d(4)
    norm.act, norm.drop = act, drop
    assert _relu_limit(norm) == limit
    act.register_forward_hook(lambda *_: None)
    assert _relu_limit(norm) is None, "a tapped module must be called"


class Twice(nn.Module):
    """A convolution and a norm that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = block(nn.Conv2d(4, 4, 1), nn.ReLU6)
        self.again, self.other = block(nn.Conv2d(4, 4, 1), nn.ReLU)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.other(self.again(self.norm(self.layer(inputs)))) + self.norm(self.again(inputs))


@pytest.mark.parametrize(
    "make",
    [
        Twice,
        lambda: nn.Sequential(*block(nn.Conv2d(4, 4, 1), nn.ReLU6), block(nn.Conv2d(4, 4, 1), None)[1]),
        lambda: nn.Sequential(*block(nn.Conv2d(4, 4, 1), nn.ReLU), block(nn.Conv2d(4, 4, 1), None)[1]),
    ],
    ids=["layers used twice", "norm after norm, ReLU6", "norm after norm, ReLU"],
)
def test_only_the_norm_of_a_convolution_is_joined_to_it(make: Callable[[], nn.Module]) -> None:
    network, inputs = make().eval(), torch.randn(2, 4, 5, 5)
    wanted = network(inputs)
    for _ in range(2):
        optimize_for_training(network, inputs)
        torch.testing.assert_close(network(inputs), wanted, atol=1e-4, rtol=1e-4)


def test_processors_that_are_slow_in_bfloat16_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = block(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6), torch.randn(1, 8, 9, 9)
    monkeypatch.setattr("beauty_bafe.models.fast_training.fastest_precision", lambda _: "32-true")
    monkeypatch.setattr("beauty_bafe.models.fast_training._Convolution", None)
    optimize_for_training(network, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(inputs).max() == 6


@pytest.mark.parametrize("limit", [None, 6.0, math.inf])
@pytest.mark.parametrize("channels", [6, 16, 40])  # less than a block, a block, blocks that overlap
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((3, 3), (1, 1)), ((5, 5), (2, 2)), ((3, 7), (0, 3)), ((4, 5), (1, 0)), ((1, 3), (0, 4)), ((8, 1), (8, 0))],
)
def test_depthwise_gradients_against_float32(
    kernel: tuple[int, int],
    padding: tuple[int, int],
    stride: tuple[int, int],
    channels: int,
    limit: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, channels, 13, 9).bfloat16()
    exact, weight = inputs.float().requires_grad_(), torch.randn(channels, 1, *kernel, requires_grad=True)
    bias = torch.zeros(channels, requires_grad=True)
    made = F.conv2d(exact, weight, bias, stride, padding, 1, channels)
    made = made[..., : made.shape[2] - (made.shape[2] > 1), :]  # fewer rows than there could be
    back = torch.randn(made.shape).bfloat16()
    clamped = None if limit is None else (3 * torch.randn(made.shape) + 3).clamp(0, limit).bfloat16()
    passed = back if clamped is None or limit is None else back * ((clamped > 0) & (clamped < limit))
    expected = torch.autograd.grad((made * passed.float()).sum(), [exact, weight, bias])
    for threads in (1, 2, 8):  # more than pictures, too
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = gradients(back, clamped, limit, inputs, weight, stride, padding)
        assert found[0] is not None
        torch.testing.assert_close(found[0].float(), expected[0], atol=1e-6, rtol=2**-8)  # nearest bfloat16 numbers
        torch.testing.assert_close(found[1:], expected[1:], atol=1e-4, rtol=1e-5)
    nothing, *rest = gradients(back, clamped, limit, inputs, weight, stride, padding, back=False)
    assert nothing is None
    torch.testing.assert_close(tuple(rest), found[1:])


def test_depthwise_gradients_keep_what_is_not_a_number() -> None:
    inputs, weight = torch.ones(1, 16, 5, 5).bfloat16(), torch.ones(16, 1, 3, 3)
    back = torch.zeros(1, 16, 5, 5).bfloat16()
    back[0, 3, 2, 2], back[0, 4, 2, 2] = math.nan, math.inf
    first, change, shift = gradients(back, None, None, inputs, weight, (1, 1), (1, 1))
    assert first is not None
    for value in (first[0, 3, 1:4, 1:4], change[3], shift[3]):
        assert value.isnan().all()
    for value in (first[0, 4, 1:4, 1:4], change[4], shift[4]):
        assert value.isposinf().all()
    others = [channel for channel in range(16) if channel not in (3, 4)]
    assert all((value == 0).all() for value in (first[0, others], change[others], shift[others]))


def test_depthwise_gradients_are_rounded_to_the_nearest_or_even_number() -> None:
    weight = 1 + torch.arange(32).view(32, 1, 1, 1) / 256  # every second one is halfway between two bfloat16 numbers
    weight[-1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # NaN, of which rounding would make -0
    ones = torch.ones(1, 32, 2, 3).bfloat16()
    first, *_ = gradients(ones, None, None, ones, weight, (1, 1), (0, 0))
    assert first is not None
    torch.testing.assert_close(first, weight.bfloat16().view(1, 32, 1, 1).expand_as(first), atol=0, rtol=0, equal_nan=True)


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
