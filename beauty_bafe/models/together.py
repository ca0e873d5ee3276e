"""What processes that train together must share so that they learn what one process would: negatives and batch statistics."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """How many processes train together; 1 where no group of them was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, ...) of this process -> (P N, ...) of all P, in the order of their ranks; each passes the same N.

    Gradients flow back to the process that a row came from: the sum of what every process asks of it. DDP then takes the mean
    over processes, so a loss that all of them compute from all rows has the gradient that one process would give it.
    """
    if processes() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are of all processes' batches, which must have one shape.

    torch.nn.SyncBatchNorm does the same on GPUs alone. In evaluation, and in one process, it is BatchNorm2d.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or processes() == 1:
            return super().forward(inputs)
        from torch.distributed.nn.functional import all_reduce

        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = inputs.numel() // inputs.shape[1] * processes()
        with torch.autocast(inputs.device.type, enabled=False):
            values = inputs.float()
            mean = cast(Tensor, all_reduce(values.mean((0, 2, 3)))) / processes()
            centred = values - mean.view(1, -1, 1, 1)  # of the squares themselves the difference would be lost in rounding
            variance = cast(Tensor, all_reduce(centred.square().mean((0, 2, 3)))) / processes()
            scale = self.weight * (variance + self.eps).rsqrt()
            outputs = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return outputs.to(inputs.dtype)
