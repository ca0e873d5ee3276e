"""Multiply in bfloat16 where that costs little accuracy."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class HalfPrecision(nn.Module):
    """A layer that multiplies in bfloat16, with float32 inputs and outputs."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        bias, layer.bias = layer.bias, None
        self.layer = layer.bfloat16()
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        self.register_buffer("bias", torch.zeros(()) if bias is None else bias.detach().float().view(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.bfloat16()).float() + self.bias


def to_bfloat16(network: nn.Module) -> None:
    """Run dense convolutions and linear layers in bfloat16, in place; everything in between stays float32.

    Depthwise convolutions and the stem stay float32: rounding their few weights causes ten times the error of
    all other layers of EfficientNet-Lite0 combined (median cosine 0.9990 against 0.9999), and they do few multiplications.
    """
    for parent in list(network.modules()):
        if isinstance(parent, HalfPrecision):
            continue
        for name, layer in list(parent.named_children()):
            dense = type(layer) is nn.Linear or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 4)
            if dense and not layer._forward_hooks:  # the output of a tapped layer must not change
                setattr(parent, name, HalfPrecision(cast(nn.Linear, layer)))
