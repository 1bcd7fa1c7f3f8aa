"""The order of samples: a permutation for each epoch, known from (seed, epoch) alone.

So a position in the data is two numbers, epoch and samples drawn, and resuming computes the order again instead of
replaying random numbers. The epoch advances when an iterator has been exhausted; an iterator that is left early starts
its epoch again.

Not covered: several ranks, weighted sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from floatline.errors import DataError


class EpochSampler(Sampler[int]):
    """Draws every sample once an epoch.

    Args:
        size: Number of samples.
        shuffle: A new order each epoch; else 0, 1, 2 ...
        seed: Of the orders.
        batch_size: With `drop_last`, the tail of an order that fills no batch of this size is left out.
        drop_last: See `batch_size`.

    Attributes:
        epoch: The epoch that the next iterator draws, the first is 0.

    >>> sampler = EpochSampler(3, shuffle=True, seed=1)
    >>> sorted(sampler), sampler.epoch
    ([0, 1, 2], 1)
    """

    def __init__(
        self, size: int, *, shuffle: bool = True, seed: int = 0, batch_size: int = 1, drop_last: bool = False
    ) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.length = size - size % batch_size if drop_last else size
        self.epoch = 0
        self._drawn = 0

    def __len__(self) -> int:
        """Samples drawn in an epoch."""
        return self.length

    def order(self, epoch: int) -> list[int]:
        """Return the samples of an epoch in order."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        return torch.randperm(self.size, generator=generator)[: self.length].tolist()

    def __iter__(self) -> EpochIterator:
        return EpochIterator(self, self.epoch, self._drawn)

    def start_at(self, epoch: int, drawn: int = 0) -> None:
        """Let the next iterator draw from this position: `drawn` samples of `epoch` are left out."""
        self.epoch = epoch
        self._drawn = drawn

    def state_of(self, epoch: int, drawn: int) -> dict[str, int]:
        """Return a position as plain values, with what must be equal for it to mean the same samples."""
        return {"epoch": epoch, "drawn": drawn, "size": self.size, "seed": self.seed, "shuffle": int(self.shuffle)}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a position that was saved for other data or another order.

        Raises:
            DataError: It was.
        """
        mine = self.state_of(0, 0)
        for key, what in (("size", "samples"), ("seed", "train.seed"), ("shuffle", "shuffle")):
            if state[key] != mine[key]:
                raise DataError(
                    f"the data position was saved with {what}={state[key]}, now {what}={mine[key]}",
                    hint="resume with the data and seed of the interrupted run, or start a new run directory",
                )


class EpochIterator(Iterator[int]):
    """Draws the rest of one epoch; torchdata saves it through `state_dict`."""

    def __init__(self, sampler: EpochSampler, epoch: int, drawn: int) -> None:
        self.sampler = sampler
        self.epoch = epoch
        self.drawn = drawn
        self._order: list[int] | None = None

    def __next__(self) -> int:
        if self.drawn >= len(self.sampler):
            self.sampler.start_at(self.epoch + 1)
            raise StopIteration
        if self._order is None:
            self._order = self.sampler.order(self.epoch)
            self.sampler.start_at(self.epoch)
        self.drawn += 1
        return self._order[self.drawn - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.sampler.state_of(self.epoch, self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned.

        Raises:
            DataError: It was saved for other data.
        """
        position = state["position"]
        self.sampler.check_state(position)
        self.epoch, self.drawn, self._order = position["epoch"], position["drawn"], None
        ended = self.drawn >= len(self.sampler)
        self.sampler.start_at(self.epoch + ended)


def mix_seed(seed: int, epoch: int) -> int:
    """One seed of two numbers; with their sum, run 1 would draw its epoch 0 as run 0 draws its epoch 1."""
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
