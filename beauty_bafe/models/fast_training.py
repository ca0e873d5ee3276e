"""Faster training steps for networks with fixed batch statistics; measured in benchmarks/train.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from .folding import find_norms, is_plain

WIDTH = 3  # the width of depthwise kernels whose bfloat16 gradients oneDNN computes fast


def optimize_for_training(network: nn.Module, example: Tensor) -> None:
    """Speed up training of a network with fixed batch statistics, in place; its parameters and outputs do not change.

    Batch norms scale the weights of their convolution at every step instead of its output, and depthwise convolutions under
    bfloat16 autocast on a CPU compute their gradients in ways that are fast in oneDNN.
    """
    norms: dict[nn.Module, nn.BatchNorm2d] = dict(find_norms(network, example))
    for layer in network.modules():
        if is_plain(layer):
            layer.forward = partial(_convolve, layer, norms.get(layer))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Hardtanh):
            layer.inplace = False  # in place, autograd would copy the input first, which the gradient needs
    for norm in norms.values():
        norm.forward = partial(_apply_children, norm)  # type: ignore[method-assign]


def _convolve(layer: nn.Conv2d, norm: nn.BatchNorm2d | None, inputs: Tensor) -> Tensor:
    weight, bias, padding = layer.weight, layer.bias, layer.padding
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        weight, bias = weight * scale.view(-1, 1, 1, 1), norm.bias + shift * scale
    if isinstance(layer, Conv2dSame):
        inputs, padding = pad_same(inputs, list(layer.kernel_size), list(layer.stride), list(layer.dilation)), (0, 0)
    halved = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1 and layer.kernel_size[1] >= WIDTH
    if inputs.device.type == "cpu" and halved and depthwise and layer.dilation == (1, 1) and not isinstance(padding, str):
        return _Depthwise.apply(inputs, weight, bias, layer.stride, padding)
    return F.conv2d(inputs, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution in bfloat16 with fast gradients.

    In bfloat16, oneDNN computes the gradient of the inputs for strides above 1, and that of the weights for kernels wider
    than 3, up to twenty times slower than in float32; that of the bias takes up to a third of the total time. So the first
    is computed in float32, the second for three columns of the kernel at a time, and the third as a plain sum.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        half = inputs.bfloat16()
        ctx.save_for_backward(half, weight)
        ctx.stride, ctx.padding, ctx.dtype = list(stride), list(padding), inputs.dtype
        bias = None if bias is None else bias.bfloat16()
        return torch.conv2d(half, weight.bfloat16(), bias, stride, padding, 1, inputs.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (inputs, weight) = gradients, ctx.saved_tensors
        back = change = shift = None
        if ctx.needs_input_grad[0]:
            dtype = torch.bfloat16 if ctx.stride == [1, 1] else torch.float32
            shape = torch.empty_like(inputs, dtype=dtype)  # this gradient needs only the shape of the inputs
            known = gradient.to(dtype), shape, weight.to(dtype)
            back = _gradients(*known, ctx.stride, ctx.padding, [True, False, False])[0].to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            change = _weight_gradient(gradient, inputs, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[2]:
            shift = gradient.sum((2, 3)).float().sum(0)  # with dtype=float32, PyTorch would first convert the whole tensor
        return back, change, shift, None, None


def _gradients(
    gradient: Tensor, inputs: Tensor, weight: Tensor, stride: list[int], padding: list[int], wanted: list[bool]
) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        gradient, inputs, weight, None, stride, padding, [1, 1], False, [0, 0], inputs.shape[1], wanted
    )


def _weight_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The gradient of `weight` (C, 1, K, L), three columns at a time: float32; `gradient` and `inputs` are bfloat16."""
    part, width = weight[..., :WIDTH].bfloat16(), weight.shape[3]
    if width == WIDTH:
        return _gradients(gradient, inputs, part, stride, padding, [False, True, False])[1].to(weight.dtype)
    change = torch.empty_like(weight)
    reach = (gradient.shape[3] - 1) * stride[1] + WIDTH
    for left in {*range(0, width - WIDTH, WIDTH), width - WIDTH}:
        lead = padding[1] - left
        seen = F.pad(inputs, (lead, reach - lead - inputs.shape[3])).contiguous(memory_format=torch.channels_last)
        change[..., left : left + WIDTH] = _gradients(gradient, seen, part, stride, [padding[0], 0], [False, True, False])[1]
    return change


def _apply_children(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    """Apply the dropout and activation inside timm's norms."""
    for part in norm.children():
        inputs = part(inputs)
    return inputs
