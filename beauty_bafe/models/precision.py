"""Devices, and their fastest safe precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch


def check_device(device: str, key: str = "device") -> None:
    """Raise ValueError if a name is not that of a device."""
    if not re.fullmatch(r"auto|cpu|gpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"{key}={device}: type auto, cpu, gpu, cuda, cuda:1 (or another number) or mps")


def pick_device(device: str) -> str:
    """The setting `device` -> a torch device: cpu, cuda, cuda:N or mps (Apple's GPU).

    auto: a GPU if there is one, otherwise cpu; gpu: any GPU. Raises ValueError for a device that is not available.
    """
    check_device(device)
    cuda = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    gpus = cuda + (["mps"] if torch.backends.mps.is_available() else [])
    if device in ("auto", "gpu") and gpus:
        return gpus[0]
    if device in ("auto", "cpu"):
        return "cpu"
    if device not in gpus:
        raise ValueError(
            f"device={device}, but PyTorch sees {', '.join(gpus) or 'no GPU'} here; type device=cpu or device=auto"
        )
    return device


def pick_devices(devices: str | Sequence[str] | None, device: str) -> list[str]:
    """The settings `devices` (all, a list, or None) and `device` -> torch devices. Raises ValueError like `pick_device`."""
    if devices is None:
        return [pick_device(device)]
    if isinstance(devices, str):
        if devices != "all":
            raise ValueError(
                f"extraction.devices={devices}: type all, a list such as [cuda:0,cuda:1], or null to use the setting device"
            )
        first = pick_device(device)
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] if first.startswith("cuda") else [first]
    if not devices:
        raise ValueError("extraction.devices=[] names no device; type all, or null to use the setting device")
    return [pick_device(one) for one in devices]


def fastest_precision(device: str) -> str:
    """Lightning's name of the fastest safe precision on a torch device."""
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without AVX512-BF16 or AMX, oneDNN emulates bf16, which is slower than float32.
        fast = device == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16-mixed" if fast else "32-true"


def trainer_settings(accelerator: str, devices: Any, precision: str) -> dict[str, Any]:
    """Lightning's `accelerator`, `devices` and `precision` for the setting `device` and a precision that may be auto.

    Raises ValueError for a device that is not available, or a single GPU's number with several devices.
    """
    device = pick_device(accelerator)
    kind, _, number = device.partition(":")
    if number and devices != 1:
        raise ValueError(f"device={device} is one GPU, but trainer.devices={devices}; type device=cuda to train on several")
    return {
        "accelerator": kind,
        "devices": [int(number)] if number else devices,
        "precision": fastest_precision(device) if precision == "auto" else precision,
    }


def count_devices(accelerator: str, devices: Any) -> Any:
    """How many processes per machine `trainer.devices` means: a number, a list of GPUs, or -1 for all available GPUs.

    Values that Lightning rejects are returned unchanged.
    """
    if isinstance(devices, str):  # Lightning takes "2" for two, "0,1" and "1," for lists
        listed = [part for part in devices.split(",") if part.strip()]
        devices = (
            listed if "," in devices else int(devices) if devices.isdigit() else -1 if devices in ("-1", "auto") else devices
        )
    if isinstance(devices, list):
        return len(devices)
    if devices == -1 and pick_device(accelerator).startswith("cuda"):
        return torch.cuda.device_count()
    return devices
