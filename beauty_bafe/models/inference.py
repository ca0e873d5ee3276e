"""Fast inference from uint8 pictures to descriptors, each layer at the lowest precision that preserves accuracy."""

from __future__ import annotations

import copy
import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import pooling as pooling_functions
from . import views
from .descriptor import Pooling
from .extractor import BackgroundAgnosticExtractor, Extraction, check_pictures, resize_mask
from .folding import fold_norms
from .half_precision import to_bfloat16
from .runtime import OpenVinoExtractor, OpenVinoModule
from .views import View, clamp_window, guided_filter, inverse_window, product_window, resize, sample_window

log = logging.getLogger("beauty_bafe")

MASK_SIZE = 112  # pixels a side of stored masks; coarser ones blur edges
GPU_BATCH = 256  # pictures
# The maps of four pictures of 224 px fit into a CPU's caches: 1.7 times as fast as 16, 2 times as 64 (EfficientNet-Lite0).
CPU_PIXELS = 4 * 224**2
COMPILE_ABOVE = 60.0  # seconds of eager execution per network and size; compiling takes 12 to 30 and halves the rest
OWN = (pooling_functions.__name__, views.__name__)  # modules whose functions decide nothing in Python that depends on values
PLAN_ABOVE = 500  # pictures; for fewer, a forecast is not worth its time


def halving(scales: Sequence[float]) -> dict[str, str]:
    """What descriptors of these scales depend on besides them, for the keys of stores and indexes; nothing for [1.0].

    >>> halving([1.0]), halving([0.5, 1.0])
    ({}, {'halving': 'means of 2 x 2'})
    """
    return {} if tuple(scales) == (1.0,) else {"halving": "means of 2 x 2"}


class Describer(nn.Module):
    """An extractor and its poolings: uint8 (B, 3, S, S) -> one descriptor per pooling, float32 (B, D), length 1.

    `scales`: input sizes as multiples of the extractor's; `flip`: also the mirror images. The normalised descriptors of all
    of these are summed. `view` crops or changes the pictures once the saliency is known.
    With `masks` the last output is the final saliency, in the coordinates of the input picture, uint8 (B, 112, 112), 0 to
    255. Raises ValueError for scales that the network does not accept, or that are not multiples of its patches.
    """

    def __init__(
        self,
        extractor: BackgroundAgnosticExtractor,
        poolings: Sequence[Pooling],
        masks: bool,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        view: View | None = None,
    ) -> None:
        super().__init__()
        self.extractor, self.poolings, self.masks = extractor, list(poolings), masks
        self.extract: Callable[[Tensor], Extraction] = extractor.extract
        self.sides, self.flip, self.view = [round(extractor.size * scale) for scale in scales], flip, view
        for side in set(self.sides) - {extractor.size}:
            try:
                extractor(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=extractor.mean.device))
            except (AssertionError, RuntimeError) as error:  # timm's transformers assert their size
                patch = extractor.backbone.patch
                if patch is not None and extractor.size % patch == 0 and side % patch:
                    fitting = [max(1, round(size / patch)) * patch for size in self.sides]
                    shares = ",".join(f"{size / extractor.size:.4g}" for size in fitting)
                    raise ValueError(
                        f"extraction.scales={list(scales)}: {side} px is not a multiple of the patches of {patch} px; "
                        f"type extraction.scales=[{shares}] for {', '.join(map(str, fitting))} px"
                    ) from error
                raise ValueError(
                    f"extraction.scales={list(scales)}: this network accepts only pictures of {extractor.size} px ({error}); "
                    "type extraction.scales=[1.0]"
                ) from error

    @property
    def canvas(self) -> int:
        """The side S of the input pictures in pixels: that of the largest scale."""
        detail = round(self.extractor.size * self.view.detail) if self.view is not None else 0
        return max([self.extractor.size, *self.sides, detail])

    @property
    def passes(self) -> int:
        """Forward passes per picture; each input size is compiled separately."""
        described = len(self.sides) * (2 if self.flip else 1)
        # `_describe` uses the pass at the network's own size that found the mask.
        remaining = described - self.sides.count(self.extractor.size)
        if self.view is None:
            return 1 + remaining
        seen = remaining if self.view.change is None else described
        return 1 + (self.view.closer is not None) + seen + (remaining if self.view.whole > 0 else 0)

    @property
    def traceable(self) -> bool:
        """Whether a trace of it is right for all pictures, as far as is known: not with functions from elsewhere."""
        functions = [pooling.function for pooling in self.poolings]
        if self.view is not None and self.view.change is not None:
            functions.append(self.view.change)
        return all(getattr(function, "func", function).__module__ in OWN for function in functions)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        check_pictures(pictures)
        if self.canvas != self.extractor.size:
            pictures = pictures.float()  # once for all that is resampled from them
        whole = self.extract(resize(pictures, self.extractor.size))
        outputs, saliency = (
            self._describe_view(self.view, pictures, whole) if self.view else (self._describe(pictures, whole), None)
        )
        if self.masks:
            drawn = whole.saliency(MASK_SIZE) if saliency is None else resize_mask(saliency, MASK_SIZE)
            outputs.append((drawn[:, 0] * 255 + 0.5).to(torch.uint8))
        return outputs

    def _describe_view(self, view: View, pictures: Tensor, whole: Extraction) -> tuple[list[Tensor], Tensor]:
        """Descriptors of the pictures under the view, and the saliency that it used, float (B, 1, M, M)."""
        # The network's own size is enough for the window, and half of it for masks that are stored, but not for a cut-out.
        whole_side, side = self.extractor.size, max(MASK_SIZE, self.extractor.size // 2)
        if view.change is not None:
            whole_side = side = self.canvas
        saliency, pad = whole.saliency(whole_side), self.extractor.pad
        trusted = view.trusts(saliency)
        seen, known, window = pictures, whole, None
        if view.closer is not None:
            canvas = saliency.new_tensor([[0.0, 0.0, 1.0]])
            window = torch.where(trusted[:, :, 0, 0], clamp_window(product_window(saliency, view.closer)), canvas)
            # At most halved, as more would skip whole pixels; a cut-out is resampled once more, from full detail.
            half = max(self.extractor.size, *self.sides, self.canvas // 2)
            seen = sample_window(pictures, window, None, half if view.change is None else None)
            known = self.extract(resize(seen, self.extractor.size))
            saliency = known.saliency(side)
        if self.masks or view.change is not None:
            if view.edges > 0:
                saliency = guided_filter(saliency, known.pictures if view.change is None else seen, view.edges)
            if window is not None:  # at twice the size, as the window shrinks: masks are averaged when they are stored
                saliency = sample_window(saliency, inverse_window(window), 0, 2 * side if view.change is None else None)
        if view.change is None:
            outputs = self._describe(seen, known)
        else:
            outputs = self._describe(torch.where(trusted, view.change(pictures, saliency, pad), pictures), None)
        if view.whole > 0:
            both = zip(outputs, self._describe(pictures, whole), strict=True)
            outputs = [F.normalize((1 - view.whole) * one + view.whole * other) for one, other in both]
        return outputs, saliency

    def _describe(self, pictures: Tensor, known: Extraction | None) -> list[Tensor]:
        """A descriptor for each pooling; `known`: the network's output for these pictures at its own size, if available."""
        extractions = []
        for side in self.sides:
            if known is None or side != self.extractor.size:
                extractions.append(self.extract(resize(pictures, side)))
            else:
                extractions.append(known)
            if self.flip:
                extractions.append(self.extract(extractions[-1].pictures.flip(3)))
        outputs = []
        for pooling in self.poolings:
            vectors = [F.normalize(pooling(extraction).float()) for extraction in extractions]
            outputs.append(vectors[0] if len(vectors) == 1 else F.normalize(torch.stack(vectors).sum(dim=0)))
        return outputs


class Engine:
    """Runs a Describer in batches of one fixed size, so that a picture's descriptor does not depend on its neighbours.

    `precision`: "32-true", or "bf16-mixed" for `to_bfloat16`. `batch`: pictures per batch, None for the device's default;
    halved when memory runs out. `runtime`: openvino, torch, compiled (torch.compile), or auto (see `plan`).
    """

    def __init__(self, describer: Describer, device: str, precision: str, batch: int | None, runtime: str) -> None:
        self.device, self.runtime = device, runtime
        self.batch = batch or default_batch_size(device, describer.canvas)
        self.describer = describer = copy.deepcopy(describer).eval()  # it is changed below
        if not describer.masks and describer.view is None:
            taps = len(describer.extractor.backbone.channels)
            describer.extractor.shallowest = min(pooling.shallowest(taps) for pooling in describer.poolings)
        self._run: Callable[[Tensor], list[Tensor]] = describer
        if runtime == "openvino" and precision == "32-true" and describer.traceable:
            self._run = OpenVinoModule(describer, precision)
        elif runtime == "openvino":  # windows and masks would suffer from bfloat16
            describer.extract = OpenVinoExtractor(describer.extractor, precision)
        elif precision == "bf16-mixed":
            size = describer.extractor.size
            fold_norms(describer.extractor, torch.zeros(1, 3, size, size, dtype=torch.uint8))
            to_bfloat16(describer.extractor)
            describer.extractor.to(memory_format=torch.channels_last)
        self.describer.to(device)
        self.seconds = 0.0

    def plan(self, pictures: int) -> float:
        """Forecast the seconds that `pictures` take without compiling; plan to compile above `COMPILE_ABOVE`, if possible."""
        seconds = 0.0
        if pictures > PLAN_ABOVE:
            self._dry_run()
            start = time.perf_counter()
            self._dry_run()
            seconds = (time.perf_counter() - start) / self.batch * pictures
        if self.runtime == "auto":
            compiling = seconds > COMPILE_ABOVE * self.describer.passes and _has_compiler(self.device)
            self.runtime = "compiled" if compiling else "torch"
        return seconds

    def describe(self) -> dict[str, Any]:
        """The settings that a resumed run must keep, plain values."""
        return {"runtime": self.runtime, "batch": self.batch}

    def widths(self) -> list[int]:
        """Dimensions of each pooling's descriptor."""
        return [output.shape[1] for output in self._dry_run()[: len(self.describer.poolings)]]

    def compile(self) -> float:
        """Compile if planned; returns the seconds it took. Raises RuntimeError if compilation fails."""
        if self.runtime != "compiled" or self._run is not self.describer:
            return 0.0
        start = time.perf_counter()
        # One graph per network: with PyTorch's limit of 8, larger ensembles would fall back to eager mode.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # Freezing makes weights constants, so that the compiler can arrange them for this processor.
        self._run = torch.compile(self.describer, dynamic=False, options={"freezing": True})
        try:
            self._dry_run()
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"torch.compile failed here ({str(error).splitlines()[0][:200]}); type extraction.runtime=torch"
            ) from error
        return time.perf_counter() - start

    def _dry_run(self) -> list[Tensor]:
        size = self.describer.canvas
        return self(torch.zeros(self.batch, 3, size, size, dtype=torch.uint8))

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> list[Tensor]:
        """uint8 (N, 3, S, S) of any N, on the CPU -> the Describer's outputs for all N, on the CPU."""
        start = time.perf_counter()
        done: list[list[Tensor]] = []
        at = 0
        while at < len(pictures):
            batch = self.batch  # another thread may halve it meanwhile
            part = pictures[at : at + batch]
            if len(part) < batch:  # always the same shape: compiled once, with the same results for every batch
                part = torch.cat([part, part.new_zeros(batch - len(part), *part.shape[1:])])
            try:
                outputs = self._run(part.to(self.device, non_blocking=True))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if batch == 1 or not _is_out_of_memory(error):
                    raise
                if self.batch == batch:
                    self.batch = batch // 2
                    log.info(f"out of memory: continuing with batches of {self.batch} pictures")
                continue
            done.append([output[: len(pictures) - at].cpu() for output in outputs])
            at += batch
        self.seconds += time.perf_counter() - start
        return [torch.cat(parts) for parts in zip(*done, strict=True)]


def default_batch_size(device: str, side: int) -> int:
    """The fastest batch size of a device for pictures of `side` pixels."""
    return GPU_BATCH if device != "cpu" else 1 << max(0, min(6, (CPU_PIXELS // side**2).bit_length() - 1))


def _has_compiler(device: str) -> bool:
    if device != "cpu":
        return device.startswith("cuda") and importlib.util.find_spec("triton") is not None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "MPS backend out of memory")
    )
