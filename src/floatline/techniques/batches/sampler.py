"""A batch sampler for anybody's DataLoader: batches of like length under a budget of padded tokens.

    sampler = TokenBudgetSampler(lengths, max_tokens=8192, seed=1, rank=rank, ranks=world_size)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=pad)
    for epoch in range(epochs):
        for batch in loader: ...                # the sampler goes on to the next epoch by itself

There is one global sequence of batches an epoch, known from (seed, epoch). With R ranks, rank r takes the r-th of each
R consecutive batches, so R ranks see what one sees. Every rank has the same number of batches: where their number is no
multiple of R, the last ones are split.

A position is an epoch and the number of global batches drawn in it, so it can be resumed on another number of ranks.
The epoch advances when an iterator has been exhausted; an iterator that is left early starts its epoch again.
torchdata's StatefulDataLoader saves it with its workers' read-ahead taken into account; with torch's DataLoader and
workers, count the batches yourself and save `state_at(epoch, batches * ranks)`.

Not covered: a fixed number of samples per batch (`train.data.make_loader` has that), data without a length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from floatline.errors import ConfigError, DataError
from floatline.techniques.batches.buckets import (
    check_budget,
    checked_lengths,
    cut_by_tokens,
    digest_of,
    generator_of,
    split_to_multiple,
)


class TokenBudgetSampler(Sampler[list[int]]):
    """Draws every sample once an epoch, in batches of at most `max_tokens` padded tokens.

    Args:
        lengths: Tokens of each sample: a list, an array or a 1-d tensor.
        max_tokens: Most rows times width of a batch.
        window: Samples that would fill this many batches are sorted together; more leaves less padding and less
            randomness.
        seed: Of the orders.
        shuffle: A new order each epoch; else windows in the file's order, batches from long to short in each.
        drop_last: Leave out the last batches that not every rank would have one of. Else they are split; where they
            hold fewer samples than there are ranks, single samples from the epoch's start are drawn twice.
        rank: This process's number, from 0.
        ranks: Number of processes.

    Raises:
        ConfigError: A setting out of range.
        DataError: `lengths` is missing, a stream, or holds something that is no length; or a sample is longer than
            `max_tokens` (it is named).

    Attributes:
        epoch: The epoch that the next iterator draws.

    >>> sampler = TokenBudgetSampler([3, 9, 3, 4, 8], max_tokens=18, shuffle=False)
    >>> list(sampler), sampler.epoch
    ([[1, 4], [3, 0, 2]], 1)
    """

    def __init__(
        self,
        lengths: Any,
        *,
        max_tokens: int,
        window: int = 50,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if window < 1:
            raise ConfigError(f"window is {window}", hint="give 1 or more: batches whose samples are sorted together")
        check_ranks(rank, ranks)
        self.lengths = checked_lengths(lengths)
        check_budget(self.lengths, max_tokens)
        self.max_tokens = max_tokens
        self.window = window
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self._drawn = 0
        self._digest = digest_of(self.lengths)
        self._cached: tuple[int, list[list[int]]] | None = None

    def __len__(self) -> int:
        """Batches that this rank draws from the current position to the epoch's end."""
        return len(self._shares(self.epoch, self._drawn)) // self.ranks

    def batches(self, epoch: int) -> list[list[int]]:
        """Return an epoch's global sequence of batches, the same for every number of ranks."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._make(epoch))
        return self._cached[1]

    def _make(self, epoch: int) -> list[list[int]]:
        generator = generator_of(self.seed, epoch)
        size = len(self.lengths)
        order = torch.randperm(size, generator=generator).tolist() if self.shuffle else list(range(size))
        batches = [
            batch
            for start in range(0, size, self._samples_sorted_together())
            for batch in cut_by_tokens(
                order[start : start + self._samples_sorted_together()], self.lengths, self.max_tokens
            )
        ]
        if self.shuffle:
            batches = [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def _samples_sorted_together(self) -> int:
        """The window in samples: a batch holds about max_tokens / mean length of them."""
        return max(1, self.window * self.max_tokens * len(self.lengths) // sum(self.lengths))

    def _shares(self, epoch: int, drawn: int) -> list[list[int]]:
        """The global batches from a position on, their number a multiple of the ranks."""
        batches = self.batches(epoch)[drawn:]
        tail = len(batches) % self.ranks
        if not tail:
            return batches
        whole, last = batches[:-tail], batches[-tail:]
        if self.drop_last:
            return whole
        missing = self.ranks - sum(map(len, last))
        if missing > 0:
            start = [index for batch in self.batches(epoch) for index in batch]
            last = [[index] for batch in last for index in batch]
            return [*whole, *last, *([start[at % len(start)]] for at in range(missing))]
        return [*whole, *split_to_multiple(last, self.lengths, self.ranks)]

    def __iter__(self) -> TokenBudgetIterator:
        return TokenBudgetIterator(self, self.epoch, self._drawn)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator draw an epoch from its start. Epochs advance by themselves when they are exhausted."""
        self.start_at(epoch)

    def start_at(self, epoch: int, drawn: int = 0) -> None:
        """Let the next iterator go on in an epoch after `drawn` global batches."""
        self.epoch = epoch
        self._drawn = drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the position that the next iterator starts at; an iterator that is under way has its own."""
        return self.state_at(self.epoch, self._drawn)

    def state_at(self, epoch: int, drawn: int) -> dict[str, Any]:
        """Return the position after `drawn` global batches of an epoch: those of one rank times the ranks."""
        return {"epoch": epoch, "drawn": drawn, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same samples; the number of ranks is free."""
        return {
            "samples": len(self.lengths),
            "lengths": self._digest,
            "max_tokens": self.max_tokens,
            "window": self.window,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: It was saved for other data, another seed or other settings.
        """
        for key, mine in self._identity().items():
            if key not in state:
                raise DataError("the saved state is not one of a TokenBudgetSampler", hint=f"it has no {key!r}")
            if state[key] != mine:
                raise DataError(
                    f"the position was saved with {key}={state[key]}, now {key}={mine}",
                    hint="resume with the data, seed and settings of the interrupted run, or start anew",
                )
        self.start_at(state["epoch"], state["drawn"])


class TokenBudgetIterator(Iterator[list[int]]):
    """Draws the rest of one epoch for one rank; torchdata saves it through `state_dict`."""

    def __init__(self, sampler: TokenBudgetSampler, epoch: int, drawn: int) -> None:
        self.sampler = sampler
        self._go_to(epoch, drawn)

    def _go_to(self, epoch: int, drawn: int) -> None:
        self.epoch, self.start, self.taken = epoch, drawn, 0
        self._mine = self.sampler._shares(epoch, drawn)[self.sampler.rank :: self.sampler.ranks]

    def __next__(self) -> list[int]:
        if self.taken >= len(self._mine):
            self.sampler.start_at(self.epoch + 1)
            raise StopIteration
        if not self.taken:  # an iterator that is left early starts its epoch again
            self.sampler.start_at(self.epoch)
        self.taken += 1
        return list(self._mine[self.taken - 1])

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batches drawn so far; at the epoch's end, its rest is empty."""
        return self.sampler.state_at(self.epoch, self.start + self.taken * self.sampler.ranks)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned.

        Raises:
            DataError: It was saved for other data, another seed or other settings.
        """
        self.sampler.load_state_dict(state)
        self._go_to(self.sampler.epoch, self.sampler._drawn)


def check_ranks(rank: int, ranks: int) -> None:
    """Raise unless `rank` is one of `ranks`.

    Raises:
        ConfigError: It is not.
    """
    if ranks < 1 or not 0 <= rank < ranks:
        raise ConfigError(f"rank={rank} of ranks={ranks}", hint="ranks is 1 or more, rank runs from 0 to ranks - 1")
