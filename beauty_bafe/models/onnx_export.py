"""Export a Describer as an ONNX file, and check onnxruntime's outputs against PyTorch's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .inference import Describer

OPSET = 20  # the first whose GridSample and AffineGrid the exporter uses, for views
BATCHES = (1, 2, 7)  # if the batch size became a constant, one of them fails
MIN_COSINE, MAX_MASK_DIFFERENCE = 0.9999, 1  # of descriptors; of masks, of 255


class Agreement(NamedTuple):
    """onnxruntime against PyTorch in float32: lowest cosine, largest mask difference (of 255), number of pictures."""

    cosine: float
    mask: int
    pictures: int


def export_onnx(describer: Describer, file: Path) -> None:
    """Write `describer`, of one pooling and with masks, as ONNX.

    Input `pictures`, uint8 (N, 3, S, S), S being the describer's canvas; outputs `descriptor`, float32 (N, D) of length 1,
    and `mask`, uint8 (N, 112, 112). Raises RuntimeError for what ONNX cannot express.
    """
    for name in ("onnxscript", "onnx_ir"):  # they log every node that they simplify
        logging.getLogger(name).setLevel(logging.WARNING)
    # Two pictures: the exporter treats a dimension of 1 as a constant.
    pictures = torch.zeros(2, 3, describer.canvas, describer.canvas, dtype=torch.uint8)
    try:
        with torch.no_grad():
            torch.onnx.export(
                describer,
                (pictures,),
                file,
                dynamo=True,
                input_names=["pictures"],
                output_names=["descriptor", "mask"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # each stage of the exporter has its own exceptions
        raise RuntimeError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error


def check_onnx(file: Path, describer: Describer, pictures: Iterable[Tensor]) -> Agreement:
    """Compare `file` with the describer it was made from, on the CPU, in batches of 1, 2 and 7.

    `pictures`: uint8 (3, S, S) each, at least 10 of them. Raises RuntimeError if a descriptor or mask differs too much.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    worst = Agreement(1.0, 0, 0)
    for batch in _batches(pictures):
        with torch.no_grad():
            vectors, masks = describer(batch)
        try:
            found = [torch.from_numpy(output) for output in session.run(None, {"pictures": batch.numpy()})]
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise RuntimeError(f"onnxruntime fails for a batch of {len(batch)}: {str(error)[:200]}") from error
        cosine = float(torch.cosine_similarity(found[0], vectors).min())
        off = int((found[1].int() - masks.int()).abs().max())
        worst = Agreement(min(worst.cosine, cosine), max(worst.mask, off), worst.pictures + len(batch))
        # Written so that NaN fails.
        if not (cosine >= MIN_COSINE and off <= MAX_MASK_DIFFERENCE):
            raise RuntimeError(
                f"onnxruntime differs from PyTorch among pictures {worst.pictures - len(batch) + 1} to {worst.pictures}: "
                f"cosine {cosine:.6f}, at least {MIN_COSINE} allowed; mask {off}/255, at most {MAX_MASK_DIFFERENCE}/255 allowed"
            )
    return worst


def _batches(pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """Stacks of 1, 2, 7, 1, 2, ... pictures, uint8 (N, 3, S, S); the last contains the remainder."""
    part: list[Tensor] = []
    turn = 0
    for picture in pictures:
        part.append(picture)
        if len(part) == BATCHES[turn % len(BATCHES)]:
            yield torch.stack(part)
            part, turn = [], turn + 1
    if part:
        yield torch.stack(part)
