"""Inference runtimes: PyTorch, eager or compiled, and OpenVINO, the fastest on CPUs."""

from __future__ import annotations

import functools
import importlib.util
import os
import queue
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .extractor import BackgroundAgnosticExtractor, Extraction
from .precision import fastest_precision

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, InferRequest

RUNTIMES = ("auto", "torch", "compiled", "openvino")
_LOCK = threading.Lock()  # tracing is not thread-safe, and two threads must not both create a core


def pick_runtime(runtime: str, device: str) -> str:
    """The setting `runtime` for a torch device: auto is openvino on a CPU if installed, otherwise resolved by `Engine.plan`.

    Raises ValueError for an unknown runtime, or for OpenVINO on a device other than a CPU.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"extraction.runtime={runtime}: type {', '.join(RUNTIMES)}")
    if runtime == "openvino" and device != "cpu":
        raise ValueError(f"extraction.runtime=openvino runs on a CPU, not on {device}; type device=cpu or runtime=auto")
    installed = importlib.util.find_spec("openvino") is not None
    if runtime == "openvino" and not installed:
        raise ValueError("extraction.runtime=openvino needs the package openvino; type pip install openvino")
    return "openvino" if runtime == "auto" and device == "cpu" and installed else runtime


def pick_precision(precision: str, device: str, runtime: str) -> str:
    """The setting `precision`: auto is float32 with OpenVINO, whose bfloat16 is inaccurate, otherwise the fastest safe one."""
    if precision != "auto":
        return precision
    return "32-true" if runtime == "openvino" else fastest_precision(device)


class _Flat(nn.Module):
    """`BackgroundAgnosticExtractor.extract` with a tuple of tensors as its output, as tracing requires."""

    def __init__(self, extractor: BackgroundAgnosticExtractor) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        found = self.extractor.extract(pictures)
        self.counts = len(found.masks), len(found.taps), None if found.logits is None else len(found.logits)
        return *found.masks, *found.taps, found.last, *(found.logits or [])


class OpenVinoExtractor:
    """`BackgroundAgnosticExtractor.extract` as an OpenVinoModule."""

    def __init__(self, extractor: BackgroundAgnosticExtractor, precision: str) -> None:
        self._network = _Flat(extractor).eval()
        self._run = OpenVinoModule(self._network, precision)

    def __call__(self, pictures: Tensor) -> Extraction:
        """(B, 3, S, S), uint8 or float in 0..255 -> Extraction."""
        outputs = self._run(pictures.float())
        masks, taps, logits = self._network.counts
        found = outputs[masks + taps + 1 :] if logits is not None else None
        return Extraction(outputs[:masks], outputs[masks : masks + taps], outputs[masks + taps], pictures, found)


class _Tuple(nn.Module):
    """A module with a tuple as its output, as tracing requires."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(pictures))


class OpenVinoModule:
    """A module, from a batch of pictures to tensors, run by OpenVINO on the CPU in as many threads as torch has. Thread-safe.

    `precision`: 32-true or bf16-mixed, which rounds all layers. The module must not decide in Python what depends on values,
    as it is traced, at the first use of each input shape, which takes a few seconds. Raises RuntimeError for a module that
    OpenVINO cannot convert, and in a process forked from one that has used it.
    """

    def __init__(self, module: nn.Module, precision: str) -> None:
        self._module = _Tuple(module).eval()
        self._hint = "bf16" if precision == "bf16-mixed" else "f32"
        self._models: dict[tuple[int, ...], CompiledModel] = {}
        # A request owns the buffers of one inference, so each thread needs its own.
        self._free: dict[tuple[int, ...], queue.SimpleQueue[InferRequest]] = {}

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """(B, ...), of the same dtype in all calls -> what the module returns."""
        core = open_core()
        shape = tuple(pictures.shape)
        with _LOCK:
            if shape not in self._models:
                self._models[shape], self._free[shape] = self._convert(core, pictures), queue.SimpleQueue()
        try:
            request = self._free[shape].get_nowait()
        except queue.Empty:
            request = self._models[shape].create_infer_request()
        results = request.infer([pictures.contiguous().numpy()], share_inputs=True)
        outputs = [torch.from_numpy(result) for result in results.to_tuple()]
        self._free[shape].put(request)
        return outputs

    def _convert(self, core: Core, pictures: Tensor) -> CompiledModel:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # that tracing makes sizes constant, which is intended here
                traced: Any = torch.jit.trace(self._module, torch.zeros_like(pictures), check_trace=False)
                frontend = FrontEndManager().load_by_framework("pytorch")
                decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
                model = frontend.convert(frontend.load(decoder))
                model.reshape({model.inputs[0]: list(pictures.shape)})
        except Exception as error:  # the tracer and the converter have their own exceptions
            raise RuntimeError(
                f"OpenVINO cannot run this network ({str(error).strip().splitlines()[0][:200]}); type extraction.runtime=torch"
            ) from error
        settings = {
            "INFERENCE_PRECISION_HINT": self._hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # pinned threads of two runs at once would share one core
        }
        return core.compile_model(model, "CPU", settings)


def open_core() -> Core:
    """The process's OpenVINO core. Raises RuntimeError in a process forked from one that has used OpenVINO."""
    with _LOCK:
        process, core = _core()
    if process != os.getpid():  # OpenVINO's threads do not exist in a forked child, which would wait for them forever
        raise RuntimeError(
            "this process was forked from one that has used OpenVINO; start it with spawn instead, or type "
            "extraction.runtime=torch"
        )
    return core


@functools.cache
def _core() -> tuple[int, Core]:
    """The process's only core, and the id of the process that created it.

    On processors with AMX, each core installs a stack for signals and frees it when it is deleted. With two cores, the
    thread can be left with a freed stack, and the next signal kills the process.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report each import to Intel
    from openvino import Core

    return os.getpid(), Core()
