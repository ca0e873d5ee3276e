"""Two processes against one that sees the batches of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from beauty_bafe.models.distributed import SharedBatchNorm2d, gather_rows
from beauty_bafe.models.objectives import contrast_loss

PROCESSES = 2


class Network(nn.Module):
    """Descriptors, float (N, 6) of length 1, of float (N, 3, 4, 4), behind a batch norm."""

    def __init__(self, norm: type[nn.BatchNorm2d]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.last = norm(3), nn.Linear(48, 6)
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.uniform_(self.norm.bias, -1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.normalize(self.last(self.norm(inputs).flatten(1)))


def draw() -> tuple[Tensor, Tensor]:
    """Two views of 6 products, far from 0, and of the first process's products farther."""
    generator = torch.Generator().manual_seed(0)
    street, clean = (torch.randn(6, 3, 4, 4, generator=generator) + 100 for _ in range(2))
    street[:3] += 5
    return street, clean


def learn(network: nn.Module, street: Tensor, clean: Tensor) -> Tensor:
    """Two steps; returns the last loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        one, other = network(torch.cat([street, clean])).chunk(2)
        loss = contrast_loss(gather_rows(one), gather_rows(other), 0.1)
        loss.backward()
        optimizer.step()
    return loss.detach()


def train_share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    network = nn.parallel.DistributedDataParallel(Network(SharedBatchNorm2d))
    loss = learn(network, *(view[3 * rank : 3 * rank + 3] for view in draw()))
    torch.save({"loss": loss, "state": network.module.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does_with_the_batches_of_both(tmp_path: Path) -> None:
    """InfoNCE with negatives of both, through a batch norm with statistics of both: gradients must cross processes."""
    torch.multiprocessing.spawn(train_share, (tmp_path,), PROCESSES)
    network = Network(nn.BatchNorm2d)
    loss = learn(network, *draw())
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss)
        torch.testing.assert_close(found["state"], network.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_pytorchs_batch_norm(training: bool) -> None:
    street, _ = draw()
    ours, theirs = SharedBatchNorm2d(3).train(training), nn.BatchNorm2d(3).train(training)
    assert torch.equal(ours(street), theirs(street))
    assert torch.equal(gather_rows(street), street)
