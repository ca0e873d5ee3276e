"""Faster training steps for networks with fixed batch statistics; measured in benchmarks/train.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding, pad_same
from torch import Tensor, nn

from .folding import find_norms, is_plain
from .precision import fastest_precision


def optimize_for_training(network: nn.Module, example: Tensor) -> None:
    """Speed up training of a network with fixed batch statistics, in place; its parameters and outputs do not change.

    Batch norms scale the weights of their convolution at every step instead of its output. Under bfloat16 autocast on a CPU
    that is fast at it, dense and depthwise convolutions clamp their output while they write it if a ReLU follows the norm, so
    that NaN become 0, and the gradients of depthwise convolutions are computed by depthwise.py.
    """
    norms: dict[nn.Module, nn.BatchNorm2d] = dict(find_norms(network, example))
    for layer in network.modules():
        if is_plain(layer):
            norm = norms.get(layer)
            layer.forward = partial(_convolve, layer, norm, None if norm is None else _relu_limit(norm))  # type: ignore[arg-type]
        elif isinstance(layer, nn.Hardtanh):
            layer.inplace = False  # in place, autograd would copy the input first, which the gradient needs
    for norm in norms.values():
        rest: Callable[[Tensor], Tensor] = partial(_apply_children, norm) if _relu_limit(norm) is None else _unchanged
        norm.forward = rest  # type: ignore[method-assign, assignment]


def _relu_limit(norm: nn.Module) -> float | None:
    """The upper limit of the ReLU inside timm's norms; None if they contain anything else, or nothing, or if it is tapped."""
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    if len(parts) != 1 or parts[0]._forward_hooks:
        return None
    (part,) = parts
    if isinstance(part, nn.Hardtanh):
        return float(part.max_val) if part.min_val == 0 else None
    return math.inf if isinstance(part, nn.ReLU) else None


def _apply_children(norm: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    """Apply the dropout and activation inside timm's norms."""
    for part in norm.children():
        inputs = part(inputs)
    return inputs


def _unchanged(inputs: Tensor) -> Tensor:
    return inputs


def _convolve(layer: nn.Conv2d, norm: nn.BatchNorm2d | None, limit: float | None, inputs: Tensor) -> Tensor:
    """Convolution, then the batch norm, then clamping to 0..limit, each if there is one."""
    weight, bias, padding = layer.weight, layer.bias, layer.padding
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        weight, bias = weight * scale.view(-1, 1, 1, 1), norm.bias + shift * scale
    halved = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    quick = halved and inputs.device.type == "cpu" and fastest_precision("cpu").startswith("bf16")
    depthwise = layer.groups == layer.in_channels == layer.out_channels > 1
    if (
        quick
        and (depthwise or (limit is not None and layer.groups == 1))
        and layer.dilation == (1, 1)
        and not isinstance(padding, str)
    ):
        same = isinstance(layer, Conv2dSame)
        frames = [
            _frame(inputs.shape[2 + axis], layer.kernel_size[axis], layer.stride[axis], None if same else padding[axis])
            for axis in range(2)
        ]
        return _Convolution.apply(inputs, weight, bias, layer.stride, frames, layer.groups, limit)
    if isinstance(layer, Conv2dSame):
        inputs, padding = pad_same(inputs, list(layer.kernel_size), list(layer.stride), list(layer.dilation)), (0, 0)
    output = F.conv2d(inputs, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    return output if limit is None else F.hardtanh(output, 0, limit)


class _Frame(NamedTuple):
    """Along one axis: equal `padding` at both ends; of the outputs, `start` are left out at first, then `size` are kept."""

    padding: int
    start: int
    size: int


def _frame(length: int, kernel: int, stride: int, padding: int | None) -> _Frame:
    """`padding`: None for TensorFlow's "same", which can be one wider at the end.

    PyTorch pads both ends equally, so that one more zero at the end would mean copying the inputs; computing one more output
    and dropping the first copies less.
    """
    if padding is not None:
        return _Frame(padding, 0, (length + 2 * padding - kernel) // stride + 1)
    total = get_same_padding(length, kernel, stride, 1)
    odd = total % 2
    return _Frame(total // 2 + odd * stride, odd, -(-length // stride))


class _Convolution(torch.autograd.Function):
    """A convolution in bfloat16, dense or depthwise, that can clamp its output to 0..limit, with fast gradients.

    oneDNN is slow at the gradients of depthwise convolutions in bfloat16, which are therefore computed by depthwise.py.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        frames: Sequence[_Frame],
        groups: int,
        limit: float | None,
    ) -> Tensor:
        half, padding = inputs.bfloat16(), [frame.padding for frame in frames]
        bias = None if bias is None else bias.bfloat16()
        if limit is None:
            output = torch.conv2d(half, weight.bfloat16(), bias, stride, padding, 1, groups)
        else:
            clamp = "hardtanh", [0.0, limit], ""
            output = torch.ops.mkldnn._convolution_pointwise(
                half, weight.bfloat16(), bias, padding, stride, [1, 1], groups, *clamp
            )
        ctx.margins = [
            margin
            for frame, size in zip(reversed(frames), reversed(output.shape[2:]), strict=True)
            for margin in (frame.start, size - frame.start - frame.size)
        ]
        if any(ctx.margins):
            output = F.pad(output, [-margin for margin in ctx.margins]).contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(half, weight, None if limit is None else output)
        ctx.stride, ctx.frames, ctx.groups, ctx.limit = list(stride), frames, groups, limit
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (inputs, weight, output), rest = gradients, ctx.saved_tensors, (None,) * 4
        if ctx.groups > 1:
            from . import depthwise

            before = [frame.padding - frame.start * step for frame, step in zip(ctx.frames, ctx.stride, strict=True)]
            wanted = ctx.needs_input_grad
            *found, shift = depthwise.gradients(gradient, output, ctx.limit, inputs, weight, ctx.stride, before, wanted[0])
            return *found, shift if wanted[2] else None, *rest
        if ctx.limit is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, output, 0.0, ctx.limit)
        full = F.pad(gradient, ctx.margins) if any(ctx.margins) else gradient
        wanted = list(ctx.needs_input_grad[:3])
        padding, biases = [frame.padding for frame in ctx.frames], [len(weight)] if wanted[2] else None
        found = torch.ops.aten.convolution_backward(
            full, inputs, weight.bfloat16(), biases, ctx.stride, padding, [1, 1], False, [0, 0], 1, wanted
        )
        return *found, *rest
