"""How much of the batches is padding, and how much of it bucketing removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from floatline.errors import DataError
from floatline.techniques.batches.buckets import checked_lengths, generator_of


@dataclass(frozen=True)
class PaddingReport:
    """Tokens of an epoch's batches, and of the batches they are compared with.

    Attributes:
        tokens: Tokens of the samples.
        padded_tokens: Tokens that the batches compute: rows times width, summed.
        baseline_padded_tokens: The same for the batches they are compared with.
    """

    tokens: int
    padded_tokens: int
    baseline_padded_tokens: int

    @property
    def padding(self) -> int:
        """Tokens of padding."""
        return self.padded_tokens - self.tokens

    @property
    def baseline_padding(self) -> int:
        """Tokens of padding in the batches compared with."""
        return self.baseline_padded_tokens - self.tokens

    @property
    def removed(self) -> float:
        """Share of the baseline's padding that is gone; 0 where there was none."""
        return 1 - self.padding / self.baseline_padding if self.baseline_padding else 0.0

    def __str__(self) -> str:
        return (
            f"padding {self.padding:,} of {self.padded_tokens:,} tokens ({self.padding / self.padded_tokens:.1%}), "
            f"unbucketed {self.baseline_padding:,} of {self.baseline_padded_tokens:,} "
            f"({self.baseline_padding / self.baseline_padded_tokens:.1%}): {self.removed:.1%} of the padding removed"
        )


def padding_report(
    lengths: Any, batches: Sequence[Sequence[int]], *, baseline: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> PaddingReport:
    """Return what is padding in batches, beside random batches of the same sizes.

    Args:
        lengths: Tokens of each sample of the data.
        batches: Indices of each batch (micro-batch), padded to its longest sample.
        baseline: Batches of the same samples to compare with; None shuffles them into batches of the same sizes.
        seed: Of that shuffle.

    Raises:
        DataError: Lengths that are missing, no batches, an empty one, or a baseline of other samples.

    >>> report = padding_report([1, 9, 1, 9], [[0, 2], [1, 3]], baseline=[[0, 1], [2, 3]])
    >>> report.padding, report.baseline_padding, report.removed
    (0, 16, 1.0)
    """
    lengths = checked_lengths(lengths)
    if not batches or not all(len(batch) for batch in batches):
        raise DataError("there are no batches, or an empty one", hint="give lists of sample indices")
    drawn = [index for batch in batches for index in batch]
    if baseline is None:
        order = [drawn[at] for at in torch.randperm(len(drawn), generator=generator_of(seed, 0)).tolist()]
        baseline = _cut_like(order, batches)
    elif sorted(drawn) != sorted(index for batch in baseline for index in batch):
        raise DataError("the baseline holds other samples than the batches", hint="compare batches of one epoch")
    return PaddingReport(sum(lengths[i] for i in drawn), _area(batches, lengths), _area(baseline, lengths))


def _cut_like(order: list[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    taken = iter(order)
    return [[next(taken) for _ in batch] for batch in batches]


def _area(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
