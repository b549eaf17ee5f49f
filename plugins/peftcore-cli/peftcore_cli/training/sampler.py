"""Random sampler that groups examples of similar lengths, to reduce padding."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from peftcore_cli.data import mixture

_BATCHES = 50  # batches whose examples are sorted by length together


class LengthGroupedSampler(Sampler[int]):
    """Yields indices in an order that only depends on the seed and the epoch, so that resuming is exact.

    Args:
        lengths: number of tokens of each example.
        batch_size: batch size of the data loader, which takes indices in order.
        seed: random seed of the order.
        weighted_sizes: (number of examples, weight) of each data set, see `mixture`; by default each example is used
            once.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, weighted_sizes: Sequence[tuple[int, float]] = ()
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0
        self.weighted_sizes = weighted_sizes or [(len(lengths), 1.0)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(mixture.count(size, weight) for size, weight in self.weighted_sizes if size)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        order = mixture.sample_epoch(self.weighted_sizes, generator)
        generator.shuffle(order)
        full, group_size = len(order) - len(order) % self.batch_size, _BATCHES * self.batch_size
        for begin in range(0, full, group_size):
            end = min(begin + group_size, full)
            order[begin:end] = array("q", sorted(order[begin:end], key=self.lengths.__getitem__))
        begins = array("q", range(0, full, self.batch_size))
        generator.shuffle(begins)
        for begin in begins:
            yield from order[begin : begin + self.batch_size]
        yield from order[full:]  # the last batch is not full
