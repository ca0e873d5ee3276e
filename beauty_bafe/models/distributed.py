"""Negatives and batch statistics shared by all processes, so that distributed training equals training in one process."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """The number of processes that train together; 1 without distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, ...) of this process -> (P N, ...) of all P, in the order of their ranks; N must be the same in each.

    A row's gradient is the sum of its gradients in all processes. As DDP then takes the mean over processes, a loss that each
    computes from all rows has the same gradient as in one process.
    """
    if world_size() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with training statistics over the batches of all processes, which must have the same shape.

    torch.nn.SyncBatchNorm does the same, but on GPUs only. In evaluation, and with one process, this is BatchNorm2d.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(inputs)
        from torch.distributed.nn.functional import all_reduce

        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = inputs.numel() // inputs.shape[1] * world_size()
        with torch.autocast(inputs.device.type, enabled=False):
            values = inputs.float()
            mean = cast(Tensor, all_reduce(values.mean((0, 2, 3)))) / world_size()
            centred = values - mean.view(1, -1, 1, 1)  # the mean of squares minus the squared mean would lose precision
            variance = cast(Tensor, all_reduce(centred.square().mean((0, 2, 3)))) / world_size()
            scale = self.weight * (variance + self.eps).rsqrt()
            outputs = centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        with torch.no_grad():
            momentum = cast(float, self.momentum)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return outputs.to(inputs.dtype)
