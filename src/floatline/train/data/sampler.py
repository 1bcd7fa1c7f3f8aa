"""The order of samples: a permutation for each epoch, known from (seed, epoch) alone; and each rank's part of it.

So a position in the data is two numbers, epoch and samples drawn, and resuming computes the order again instead of
replaying random numbers. The epoch advances when an iterator has been exhausted; an iterator that is left early starts
its epoch again.

With lengths, the order is that of length bucketing (techniques/batches/buckets.py): samples of like length lie in one
update.

Several ranks draw the same order and share each update. A position counts all ranks' samples, so that a run may go on
with another number of ranks.

Not covered: weighted sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from floatline.errors import DataError
from floatline.techniques.batches.buckets import (
    bucketed_updates,
    cut_by_tokens,
    digest_of,
    generator_of,
    mix_seed,
    split_to_multiple,
)

__all__ = ["EpochIterator", "EpochSampler", "UpdateSampler", "mix_seed"]

Update = list[int] | list[tuple[int, ...]]
"""Samples of one update, or its micro-batches."""


class EpochSampler(Sampler[int]):
    """Draws every sample once an epoch.

    Args:
        size: Number of samples.
        shuffle: A new order each epoch; else 0, 1, 2 ...
        seed: Of the orders.
        batch_size: With `drop_last`, the tail of an order that fills no batch of this size is left out.
        drop_last: See `batch_size`.
        lengths: Tokens of each sample, for length bucketing; None does without.
        window: Batches whose samples are sorted together by length.

    Attributes:
        epoch: The epoch that the next iterator draws, the first is 0.

    >>> sampler = EpochSampler(3, shuffle=True, seed=1)
    >>> sorted(sampler), sampler.epoch
    ([0, 1, 2], 1)
    """

    def __init__(
        self,
        size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        batch_size: int = 1,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
        window: int = 1,
    ) -> None:
        self.size = size
        self.shuffle = shuffle
        self.seed = seed
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.lengths = lengths
        self.window = window
        self.length = size - size % batch_size if drop_last else size
        self.epoch = 0
        self._drawn = 0

    def __len__(self) -> int:
        """Samples drawn in an epoch."""
        return self.length

    def order(self, epoch: int) -> list[int]:
        """Return the samples of an epoch in order."""
        if self.lengths is not None:
            updates = bucketed_updates(
                self.lengths,
                batch_size=self.batch_size,
                window=self.window,
                seed=self.seed,
                epoch=epoch,
                shuffle=self.shuffle,
                drop_last=self.drop_last,
            )
            return [index for update in updates for index in update]
        if not self.shuffle:
            return list(range(self.length))
        return torch.randperm(self.size, generator=generator_of(self.seed, epoch))[: self.length].tolist()

    def __iter__(self) -> EpochIterator:
        return EpochIterator(self, self.epoch, self._drawn)

    def start_at(self, epoch: int, drawn: int = 0) -> None:
        """Let the next iterator draw from this position: `drawn` samples of `epoch` are left out."""
        self.epoch = epoch
        self._drawn = drawn

    def state_of(self, epoch: int, drawn: int) -> dict[str, Any]:
        """Return a position as plain values, with what must be equal for it to mean the same samples."""
        state = {"epoch": epoch, "drawn": drawn, "size": self.size, "seed": self.seed, "shuffle": int(self.shuffle)}
        return state if self.lengths is None else {**state, "bucketing": self._bucketing}

    @property
    def _bucketing(self) -> str:
        """What a bucketed order depends on besides size and seed; "" for an order without lengths."""
        if self.lengths is None:
            return ""
        return f"window {self.window} of {self.batch_size}, lengths {digest_of(self.lengths)}"

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
        saved = state.get("bucketing", "")
        if saved != self._bucketing:
            raise DataError(
                f"the data position was saved with length bucketing {saved or 'off'}, now {self._bucketing or 'off'}",
                hint="resume with the settings and data of the interrupted run, or start a new run directory",
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


class UpdateSampler(Sampler[Update]):
    """Draws one rank's part of each update, in the order of an EpochSampler.

    Args:
        samples: The order of all ranks' samples; its `batch_size` is that of an update.
        max_tokens: Most padded tokens of a micro-batch; needs the lengths. Then a part is a list of micro-batches,
            equally many on each rank. None gives a list of samples.
        rank: This process's number, from 0.
        ranks: Number of processes.

    >>> [list(UpdateSampler(EpochSampler(4, batch_size=2, shuffle=False), rank=rank, ranks=2)) for rank in (0, 1)]
    [[[0], [2]], [[1], [3]]]
    """

    def __init__(self, samples: EpochSampler, *, max_tokens: int | None = None, rank: int = 0, ranks: int = 1) -> None:
        self.samples = samples
        self.max_tokens = max_tokens
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Updates of an epoch."""
        batch_size = self.samples.batch_size
        return (len(self.samples) + batch_size - 1) // batch_size

    def __iter__(self) -> UpdateIterator:
        return UpdateIterator(self)

    def share(self, update: list[int]) -> Update:
        """Return this rank's part of an update.

        Sorted by length where lengths are known, and dealt out, so that ranks compute as much at any time.
        """
        lengths = self.samples.lengths
        if lengths is None or (self.max_tokens is None and self.ranks == 1):
            return update[self.rank :: self.ranks]
        groups = cut_by_tokens(update, lengths, self.max_tokens)
        if self.max_tokens is None:
            return groups[0][self.rank :: self.ranks]
        groups = split_to_multiple(groups, lengths, self.ranks)
        return [tuple(group) for group in groups[self.rank :: self.ranks]]


class UpdateIterator(Iterator[Update]):
    """Draws the rest of one epoch, update by update; torchdata saves it through `state_dict`."""

    def __init__(self, sampler: UpdateSampler) -> None:
        self.sampler = sampler
        self.drawing = iter(sampler.samples)

    def __next__(self) -> Update:
        update = list(islice(self.drawing, self.sampler.samples.batch_size))
        if not update:
            raise StopIteration
        return self.sampler.share(update)

    def state_dict(self) -> dict[str, Any]:
        """Return the position; it counts all ranks' samples."""
        return self.drawing.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned.

        Raises:
            DataError: It was saved for other data.
        """
        self.drawing.load_state_dict(state)
