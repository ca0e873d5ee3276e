"""The order of training photos, which depends only on the seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index); the order is drawn from (seed, epoch), and each of `replicas` processes takes its share.

    `epoch_size` cuts a large catalogue into shorter epochs: epoch e is the e-th slice of a stream of shuffled passes,
    so that validation and checkpoints can be more frequent and no photo is repeated before all have occurred once.
    """

    def __init__(self, length: int, seed: int, epoch_size: int | None = None, replicas: int = 1, rank: int = 0) -> None:
        self.length, self.seed = length, seed
        self.epoch_size = epoch_size or length
        self.replicas, self.rank = replicas, rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_size // self.replicas

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.epoch * self.epoch_size
        order: np.ndarray | None = None
        last_pass = -1
        for position in range(start + self.rank, start + len(self) * self.replicas, self.replicas):
            turn, offset = divmod(position, self.length)
            if turn != last_pass:
                order, last_pass = np.random.default_rng((self.seed, turn)).permutation(self.length), turn
            assert order is not None
            yield self.epoch, int(order[offset])


def split_indices(length: int, replicas: int, rank: int) -> list[int]:
    """The indices below `length` for process `rank` of `replicas`: equally many for each, so that some occur twice.

    >>> split_indices(5, 2, 0), split_indices(5, 2, 1)
    ([0, 2, 4], [1, 3, 0])
    """
    each = -(-length // replicas)
    return [(rank + place * replicas) % length for place in range(each)]
