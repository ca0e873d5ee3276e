"""Which device, and bf16 where it multiplies it faster than float32."""

from __future__ import annotations

import ctypes
import sys

import torch


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


def keep_memory() -> None:
    """Let glibc keep freed memory for the next step instead of handing it back: new pages cost time (benchmarks/train.md)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for large tensors
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor any trimming of the heap
