"""Batches in a resumable order: torchdata's StatefulDataLoader over an EpochSampler.

    for epoch in range(epoch, epochs):
        for batch in loader:            # one epoch; after a resume the rest of it
            ...
            save(epoch=epoch, data=loader.state_dict())

What `state_dict` holds is the position of the batch that was handed out last, however far worker processes have read
ahead. Saved after the last batch of an epoch and before its loop has ended, the rest of the epoch is empty and the
next loop starts the next one; saved after its loop has ended, the first loop starts the next epoch.

torchdata restores its own state only with the same number of workers. Here the position alone is taken out of it and
given to the sampler, so a run may resume with more workers, or none.

Not covered: several ranks; random augmentation (workers are not reseeded to where they were). An epoch ends by
exhausting the loader: one that is left by `break` is begun again without workers, but with workers may be skipped, for
they have read ahead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from floatline.errors import ConfigError, DataError
from floatline.train.data.dataset import SampleDataset
from floatline.train.data.sampler import EpochSampler, mix_seed

if TYPE_CHECKING:
    from torchdata.stateful_dataloader import StatefulDataLoader


def make_loader(
    dataset: SampleDataset,
    *,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = True,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """Return a resumable loader of `dataset`.

    Args:
        dataset: What to load; any map-style data set will do.
        batch_size: Samples a batch.
        collate: Makes a batch of a list of samples.
        shuffle: A new order each epoch.
        seed: Of the orders.
        num_workers: Processes that prepare batches; 0 prepares them in this one.
        drop_last: Leave out the tail of an epoch that fills no batch.
        pin_memory: Copy batches to pinned memory, for CUDA.

    Returns:
        A StatefulDataLoader. It draws nothing from torch's global random numbers.

    Raises:
        DataError: No samples, or with `drop_last` fewer than one batch.
        ConfigError: A number out of range, or torchdata is not installed.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"batch_size={batch_size}, num_workers={num_workers}", hint="allowed: from 1, from 0")
    _check_size(len(dataset), batch_size, drop_last)
    if num_workers:
        # The tokenizers library warns at each fork unless told so; a worker encodes one sample at a time anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sampler = EpochSampler(len(dataset), shuffle=shuffle, seed=seed, batch_size=batch_size, drop_last=drop_last)
    loader_class = _loader_class()
    with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.13 deprecates
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        loader: StatefulDataLoader = loader_class(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,  # they keep their caches from epoch to epoch
            generator=torch.Generator().manual_seed(mix_seed(seed, -1)),  # else the global generator would move
        )
    return loader


def _check_size(size: int, batch_size: int, drop_last: bool) -> None:
    if not size:
        raise DataError("the data set is empty", hint="name a file with samples in data.train")
    if drop_last and size < batch_size:
        raise DataError(
            f"{size} sample{'s' * (size > 1)} cannot fill one batch of {batch_size}",
            hint=f"set train.batch_size={size} or less, or add samples",
        )


@cache
def _loader_class() -> type:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        raise ConfigError(
            "training needs torchdata, which is not installed", hint='pip install "floatline[train]"'
        ) from None

    class ResumableLoader(StatefulDataLoader):
        """Resumes from the sampler's position, so that the number of workers may differ."""

        def __iter__(self) -> Iterator[Any]:
            return _relay(super().__iter__())

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({})
            position = _find(state_dict, "position")
            if position is None:
                raise DataError("the saved data position is not one of this loader", hint="start a new run directory")
            self.sampler.check_state(position)
            if state_dict["_iterator_finished"]:
                self.sampler.start_at(position["epoch"] + 1)
            else:
                self.sampler.start_at(position["epoch"], position["drawn"])

    return ResumableLoader


def _relay(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass batches on; a worker's DataError arrives as the text of its traceback, here it becomes itself again."""
    try:
        yield from batches
    except DataError as error:
        marker = f"{DataError.__module__}.{DataError.__qualname__}: "
        message, _, hint = error.message.rpartition(marker)[2].strip().partition("\nhint: ")
        raise DataError(message, hint=hint or error.hint) from None


def _find(tree: Any, key: str) -> dict[str, int] | None:
    """The value of `key` anywhere in nested dicts: it lies at different depths with and without workers."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return dict(tree[key])
    return next((found for value in tree.values() if (found := _find(value, key))), None)
