"""Length bucketing: samples of like length in one batch, so that little of it is padding.

A batch is as wide as its longest row, so a random batch of instruction data is mostly padding. The order here keeps
training random and batches even:

    shuffle the epoch  ->  sort by length inside windows of some updates  ->  cut into updates  ->  shuffle the updates

and inside an update, rows are cut into micro-batches by a budget of padded tokens (rows times width), longest first.
All of it is computed from (seed, epoch), so every rank knows the whole order and takes its part, and a position in it
is two numbers.

The price: samples of one update are of like length, so their gradients are less independent than those of random
samples. A window of 1 keeps every update's samples exactly as random, and only sorts inside it.

Not covered: weighted sampling; lengths that change from epoch to epoch (random augmentation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from floatline.errors import ConfigError, DataError

STREAM_HINT = "give the number of tokens of each sample, or sort inside each batch only: techniques=['batching(...)']"


def mix_seed(seed: int, epoch: int) -> int:
    """One seed of two numbers; with their sum, run 1 would draw its epoch 0 as run 0 draws its epoch 1."""
    digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """Return the random numbers of one epoch; torch's global ones stay as they are."""
    return torch.Generator().manual_seed(mix_seed(seed, epoch))


def checked_lengths(lengths: Any, *, size: int | None = None) -> list[int]:
    """Return the lengths of all samples as whole numbers from 1.

    Args:
        lengths: Tokens of each sample: a list, an array or a 1-d tensor.
        size: Number of samples there must be; None takes any.

    Raises:
        DataError: No lengths, a stream whose end is not known, a wrong number of them, or one that is no length.
    """
    if lengths is None:
        raise DataError("length bucketing needs the length of every sample, lengths is None", hint=STREAM_HINT)
    if not hasattr(lengths, "__len__") or isinstance(lengths, str | bytes | dict):
        raise DataError(
            f"length bucketing needs the length of every sample, but {type(lengths).__name__} is a stream without "
            "lengths",
            hint=STREAM_HINT,
        )
    values = lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)
    if size is not None and len(values) != size:
        raise DataError(f"{len(values)} lengths for {size} samples", hint="give one length for each sample")
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"the length of sample {index} is {value!r}", hint="allowed: whole numbers from 1")
    return values


def check_budget(lengths: Sequence[int], max_tokens: int, *, setting: str = "max_tokens") -> None:
    """Raise unless each sample fits a micro-batch of its own.

    Raises:
        ConfigError: `max_tokens` is below 1.
        DataError: A sample is longer; it is named by index and length.
    """
    if max_tokens < 1:
        raise ConfigError(f"{setting} is {max_tokens}", hint="give 1 or more: the padded tokens of a micro-batch")
    longest = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if longest is not None and lengths[longest] > max_tokens:
        raise DataError(
            f"sample {longest} has {lengths[longest]} tokens, more than {setting}={max_tokens}",
            hint=f"set {setting}={lengths[longest]} or more, or shorten the sample",
        )


def digest_of(lengths: Iterable[int]) -> str:
    """Return a short fingerprint of all lengths, to tell whether a saved position is one in the same data."""
    return hashlib.sha256(",".join(map(str, lengths)).encode()).hexdigest()[:16]


def bucketed_updates(
    lengths: Sequence[int],
    *,
    batch_size: int,
    window: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = False,
) -> list[list[int]]:
    """Return an epoch's updates: lists of sample indices, of like length.

    Args:
        lengths: Tokens of each sample.
        batch_size: Samples an update.
        window: Updates whose samples are sorted together; 1 leaves every update's samples random.
        seed: Of all orders.
        epoch: Which of them.
        shuffle: False keeps the file's order of windows and the order of updates inside each.
        drop_last: Leave out the samples, another few each epoch, that fill no update; else they are the last update.
    """
    generator = generator_of(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist() if shuffle else list(range(len(lengths)))
    whole = len(order) - len(order) % batch_size
    updates: list[list[int]] = []
    for start in range(0, whole, window * batch_size):
        part = order[start : min(start + window * batch_size, whole)]
        if window > 1:
            part.sort(key=lengths.__getitem__)
        updates += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    if shuffle and window > 1:
        updates = [updates[at] for at in torch.randperm(len(updates), generator=generator).tolist()]
    return updates if drop_last or whole == len(order) else [*updates, order[whole:]]


def cut_by_tokens(indices: Iterable[int], lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Cut samples into micro-batches of at most `max_tokens` padded tokens, the longest samples first.

    Longest first makes each micro-batch's width known when it is begun, needs the fewest micro-batches, and shows at
    once whether the largest fits the memory.

    Args:
        indices: Samples of one update.
        lengths: Tokens of every sample.
        max_tokens: Rows times width of a micro-batch; a longer sample is alone. None makes one micro-batch.

    >>> cut_by_tokens([0, 1, 2, 3], [2, 8, 3, 4], 8)
    [[1], [3, 2], [0]]
    """
    ordered = sorted(indices, key=lambda index: -lengths[index])
    if max_tokens is None:
        return [ordered] if ordered else []
    groups = []
    start = 0
    while start < len(ordered):
        rows = max(1, max_tokens // lengths[ordered[start]])
        groups.append(ordered[start : start + rows])
        start += rows
    return groups


def split_to_multiple(groups: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Split the largest micro-batches until their number is a multiple of `ranks`, so that every rank has as many.

    Ranks that share a model wait for each other in every forward; one with a micro-batch less would have to run one for
    nothing (step/exchange.py).

    Raises:
        DataError: There are not enough samples.
    """
    groups = list(groups)
    while len(groups) % ranks:
        at = max(range(len(groups)), key=lambda g: (len(groups[g]) > 1, len(groups[g]) * lengths[groups[g][0]]))
        group = groups[at]
        if len(group) < 2:
            raise DataError(
                f"{len(groups)} samples cannot be shared out to {ranks} ranks",
                hint="choose a train.batch_size that the number of ranks divides",
            )
        half = (len(group) + 1) // 2
        groups[at : at + 1] = [group[:half], group[half:]]
    return groups
