"""Batches in a resumable order: torchdata's StatefulDataLoader over an EpochSampler, shared out to the ranks.

    for epoch in range(epoch, epochs):
        for batch in loader:            # one epoch; after a resume the rest of it
            ...
            save(epoch=epoch, data=loader.state_dict())

What `state_dict` holds is the position of the batch that was handed out last, however far worker processes have read
ahead. Saved after the last batch of an epoch and before its loop has ended, the rest of the epoch is empty and the
next loop starts the next one; saved after its loop has ended, the first loop starts the next epoch.

torchdata restores its own state only with the same number of workers. Here the position alone is taken out of it and
given to the sampler, so a run may resume with more workers, or none, and on more ranks or fewer.

With several ranks each has a loader of its own over the same order. It loads its share of every update and never
touches the others' samples; all ranks have equally many micro-batches, for they wait for each other in each.

Worker processes come from a fork server, which has imported what they need and done nothing else. Forked from the
training process itself they would begin with its threads' locks and half-collected compiled code; some crash on that.

Not covered: random augmentation (workers are not reseeded to where they were). An epoch ends by
exhausting the loader: one that is left by `break` is begun again without workers, but with workers may be skipped, for
they have read ahead.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from floatline.errors import ConfigError, DataError
from floatline.techniques.batches.buckets import STREAM_HINT, check_budget, checked_lengths
from floatline.techniques.batches.sampler import check_ranks
from floatline.techniques.batching import Batching
from floatline.train.data.dataset import SampleDataset
from floatline.train.data.micro import MicroBatches
from floatline.train.data.sampler import EpochSampler, UpdateSampler, mix_seed

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

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
    bucketing: Batching | None = None,
    lengths: Sequence[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> StatefulDataLoader:
    """Return a resumable loader of `dataset`.

    Args:
        dataset: What to load; any map-style data set will do.
        batch_size: Samples a batch, over all ranks.
        collate: Makes a batch of a list of samples; with `bucketing.max_tokens`, of the samples of one micro-batch.
        shuffle: A new order each epoch.
        seed: Of the orders.
        num_workers: Processes that prepare batches; 0 prepares them in this one. They get `dataset` and `collate`
            pickled, so a script that starts them needs `if __name__ == "__main__":`.
        drop_last: Leave out the tail of an epoch that fills no batch.
        pin_memory: Copy batches to pinned memory, for CUDA.
        bucketing: Its `window` batches' samples are sorted together by length; with its `max_tokens`, each batch is cut
            into micro-batches of at most so many padded tokens.
        lengths: Tokens of each sample, which bucketing needs (lengths.py).
        rank: This process's number, from 0.
        ranks: Number of processes; each gets its share of every batch.

    Returns:
        A StatefulDataLoader. It draws nothing from torch's global random numbers. It yields what `collate` makes of
        this rank's share of a batch; with `max_tokens`, always a list of micro-batches.

    Raises:
        DataError: No samples, or with `drop_last` fewer than one batch; bucketing without lengths; a sample longer than
            `max_tokens`.
        ConfigError: A number out of range, a batch that cannot be shared out evenly, or torchdata is not installed.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"batch_size={batch_size}, num_workers={num_workers}", hint="allowed: from 1, from 0")
    size = _size_of(dataset, bucketing)
    _check_size(size, batch_size, drop_last)
    _check_shares(batch_size, rank, ranks, drop_last)
    max_tokens = bucketing.max_tokens if bucketing else None
    known = _lengths(lengths, size, max_tokens) if bucketing else None
    if max_tokens is not None and isinstance(collate, MicroBatches):
        raise ConfigError(
            f"batches are cut twice: by {bucketing} and by MicroBatches",
            hint="pass the collator that MicroBatches wraps",
        )
    if num_workers:
        # The tokenizers library warns at each fork unless told so; a worker encodes one sample at a time anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    order = EpochSampler(
        size,
        shuffle=shuffle,
        seed=seed,
        batch_size=batch_size,
        drop_last=drop_last,
        lengths=known,
        window=bucketing.window if bucketing else 1,
    )
    loader_class = _loader_class()
    with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.13 deprecates
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        loader: StatefulDataLoader = loader_class(
            dataset if max_tokens is None else _Groups(dataset),
            batch_sampler=UpdateSampler(order, max_tokens=max_tokens, rank=rank, ranks=ranks),
            num_workers=num_workers,
            multiprocessing_context=_fork_server() if num_workers else None,
            worker_init_fn=_end_with_parent,
            collate_fn=collate if max_tokens is None else _CollateGroups(collate),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,  # they keep their caches from epoch to epoch
            generator=torch.Generator().manual_seed(mix_seed(seed, -1)),  # else the global generator would move
        )
    return loader


def _fork_server() -> ForkServerContext:
    """Where workers come from: it imports what they need once, each worker is then forked from it in no time."""
    context = multiprocessing.get_context("forkserver")
    modules = ["floatline.train.hub", "floatline.train.data", "torchdata.stateful_dataloader"]
    context.set_forkserver_preload([*modules, *({"transformers.modeling_utils"} & set(sys.modules))])
    return context


def _end_with_parent(worker: int) -> None:
    """Make this worker end when the training process is gone, killed or not.

    Torch's own watch looks at the parent of the process, which here is the fork server; and that one stays as long as
    a worker does.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name=f"parent watch of worker {worker}", daemon=True).start()


def _size_of(dataset: Any, bucketing: Batching | None) -> int:
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return len(dataset)
    what = f"{type(dataset).__name__} is a stream without lengths"
    if bucketing:
        raise DataError(f"{bucketing} needs the length of every sample, but {what}", hint=STREAM_HINT)
    raise DataError(f"{what}, so its position cannot be saved", hint="give a data set with __len__ and __getitem__")


def _lengths(lengths: Sequence[int] | None, size: int, max_tokens: int | None) -> list[int]:
    known = checked_lengths(lengths, size=size)
    if max_tokens is not None:
        check_budget(known, max_tokens, setting="batching.max_tokens")
    return known


def _check_shares(batch_size: int, rank: int, ranks: int, drop_last: bool) -> None:
    check_ranks(rank, ranks)
    if batch_size % ranks:
        raise ConfigError(
            f"a batch of {batch_size} samples cannot be shared out evenly to {ranks} ranks",
            hint=f"set train.batch_size={-(-batch_size // ranks) * ranks}, or train on another number of processes",
        )
    if ranks > 1 and not drop_last:
        raise ConfigError(
            "the last batch of an epoch may be too small for all ranks", hint="several ranks need drop_last=True"
        )


class _Groups(Dataset[list[Any]]):
    """A data set whose items are micro-batches: lists of samples, asked for by a tuple of indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, group: tuple[int, ...]) -> list[Any]:
        return [self.dataset[index] for index in group]


class _CollateGroups:
    """Collates each micro-batch; also of a single one a list, which the step leaves as it is.

    A class, so that workers may be spawned.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, groups: list[list[Any]]) -> list[Any]:
        return [self.collate(group) for group in groups]


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
            try:
                return _relay(super().__iter__())
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                if "pickle" not in str(error):
                    raise
                raise ConfigError(
                    f"the data set or its collator cannot be sent to {self.num_workers} worker processes: {error}",
                    hint="define their classes and functions at the top of a module, or set data.num_workers=0",
                ) from None

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict({})
            position = _find(state_dict, "position")
            if position is None:
                raise DataError("the saved data position is not one of this loader", hint="start a new run directory")
            order: EpochSampler = self.batch_sampler.samples
            order.check_state(position)
            if state_dict["_iterator_finished"]:
                order.start_at(position["epoch"] + 1)
            else:
                order.start_at(position["epoch"], position["drawn"])

    return ResumableLoader


def _relay(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass batches on; a worker's DataError arrives as the text of its traceback, here it becomes itself again."""
    try:
        yield from batches
    except DataError as error:
        marker = f"{DataError.__module__}.{DataError.__qualname__}: "
        message, _, hint = error.message.rpartition(marker)[2].strip().partition("\nhint: ")
        raise DataError(message, hint=hint or error.hint) from None


def _find(tree: Any, key: str) -> dict[str, Any] | None:
    """The value of `key` anywhere in nested dicts: it lies at different depths with and without workers."""
    if not isinstance(tree, dict):
        return None
    if key in tree:
        return dict(tree[key])
    return next((found for value in tree.values() if (found := _find(value, key))), None)
