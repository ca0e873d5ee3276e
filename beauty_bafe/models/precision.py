"""Which device, and bf16 where it multiplies it faster than float32."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def fastest_precision(device: str | None = None) -> str:
    """Lightning's name of the fastest safe precision of `device` ("cpu", "cuda", None for what is there)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without AVX512-BF16 or AMX, oneDNN emulates bf16 and is slower than in float32.
        fast = device == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def pick_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` -> a torch device. Raises ValueError where there is no GPU to use."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device}: type auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch sees no GPU here; type device=cpu or device=auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def spare_depthwise(network: nn.Module) -> None:
    """Under autocast on a CPU, let depthwise convolutions compute in float32, in place.

    oneDNN's bfloat16 gradients of theirs take up to five times as long as its float32 ones, and about half of a training step
    of EfficientNet-Lite0 (benchmarks/train.md).
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            layer.forward = partial(_in_float32, layer.forward)  # type: ignore[method-assign]


def _in_float32(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    if inputs.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return forward(inputs)
    with torch.autocast("cpu", enabled=False):
        return forward(inputs.float())


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step instead of handing it back: new pages cost time (benchmarks/train.md)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for large tensors
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor any trimming of the heap
