"""Split the samples of one update into collated micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from floatline.errors import ConfigError
from floatline.techniques.batches.buckets import check_budget, cut_by_tokens
from floatline.train.data.collate import Collator, Encoded


@dataclass(frozen=True)
class MicroBatches:
    """Collates the samples of one update.

    Args:
        collate: Makes one batch of samples.
        size: Samples per micro-batch; None where `max_tokens` says how many.
        max_tokens: Most padded tokens (rows times width, as `collate` pads) per micro-batch. For one rank: of
            several each would find its own number of micro-batches, `make_loader(bucketing=...)` gives all as many.

    Returns a batch where one micro-batch holds all samples, else a list of batches, as `TrainStep` takes them. Samples
    of like length are put together, which saves padding and changes nothing else: micro-batches weigh by their targets.

    Raises:
        ConfigError: Neither or both limits are given.
        DataError: When called: a sample longer than `max_tokens`.
    """

    collate: Collator
    size: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.max_tokens is None):
            raise ConfigError(
                f"micro-batches of size={self.size} and max_tokens={self.max_tokens}", hint="give one of the two"
            )

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        groups = self._by_size(samples) if self.size is not None else self._by_tokens(samples)
        return self.collate(groups[0]) if len(groups) == 1 else [self.collate(group) for group in groups]

    def _by_size(self, samples: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        size = self.size or 1
        if len(samples) <= size:
            return [samples]
        ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _by_tokens(self, samples: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        widths = [self.collate.padded_length(len(sample["input_ids"])) for sample in samples]
        check_budget(widths, self.max_tokens or 0)
        return [[samples[at] for at in group] for group in cut_by_tokens(range(len(samples)), widths, self.max_tokens)]
