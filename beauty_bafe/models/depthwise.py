"""The gradient of depthwise kernels, compiled by Numba: oneDNN takes about twice as long for kernels wider than 3."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..compiled import compiled


def weight_gradient(
    gradient: Tensor, inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of the weights of a depthwise convolution, float32 (C, 1, K, L).

    `gradient`: of the outputs, bfloat16 (B, C, P, Q). `inputs`: bfloat16 (B, C, H, W). `padding`: zeros above and to the left
    of the inputs; there are as many below and to the right as the outputs need.
    """
    threads = torch.get_num_threads()
    sums = np.zeros((threads, *kernel, inputs.shape[1]), np.float32)

    pair = [tensor.permute(0, 2, 3, 1).contiguous().view(torch.uint16).numpy() for tensor in (inputs, gradient)]

    def work(number: int) -> None:
        own, back = (bits[number * len(bits) // threads : (number + 1) * len(bits) // threads] for bits in pair)
        _add_products(own, back, *stride, *padding, sums[number])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return torch.from_numpy(sums.sum(axis=0)).permute(2, 0, 1)[:, None]


@compiled
def _widen(halves, bits):  # type: ignore[no-untyped-def]
    """From bits of bfloat16 numbers, uint16, to those of float32 numbers, uint32."""
    for place in range(halves.shape[0]):
        bits[place] = np.uint32(halves[place]) << np.uint32(16)


@compiled
def _add_products(inputs, gradient, down, right, top, left, sums):  # type: ignore[no-untyped-def]
    """Add to sums, float32 (K, L, C), the products of inputs, (B, H, W, C), and gradient, (B, P, Q, C), at all places.

    Both are bits of bfloat16 numbers, uint16.
    """
    height, width, channels = inputs.shape[1:]
    rows, columns = gradient.shape[1:3]
    own_bits, back_bits = np.empty(height * width * channels, np.uint32), np.empty(rows * columns * channels, np.uint32)
    own, back = own_bits.view(np.float32), back_bits.view(np.float32)
    for picture in range(inputs.shape[0]):
        _widen(inputs[picture].reshape(-1), own_bits)
        _widen(gradient[picture].reshape(-1), back_bits)
        for i in range(sums.shape[0]):
            for row in range(rows):
                y = row * down + i - top
                if y < 0 or y >= height:
                    continue
                for j in range(sums.shape[1]):
                    total = sums[i, j]
                    for column in range(max(0, -((j - left) // right)), min(columns, (width - 1 + left - j) // right + 1)):
                        start, place = (y * width + column * right + j - left) * channels, (row * columns + column) * channels
                        one, other = own[start : start + channels], back[place : place + channels]
                        for channel in range(channels):
                            total[channel] += one[channel] * other[channel]
