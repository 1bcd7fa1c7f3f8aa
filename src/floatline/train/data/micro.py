"""Split the samples of one update into collated micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from floatline.train.data.collate import Collator, Encoded


@dataclass(frozen=True)
class MicroBatches:
    """Collates the samples of one update.

    Args:
        collate: Makes one batch of samples.
        size: Samples per micro-batch.

    Returns a batch where one micro-batch holds all samples, else a list of batches, as `TrainStep` takes them. Samples
    of like length are put together, which saves padding and changes nothing else: micro-batches weigh by their targets.
    """

    collate: Collator
    size: int

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if len(samples) <= self.size:
            return self.collate(samples)
        ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
        return [self.collate(ordered[start : start + self.size]) for start in range(0, len(ordered), self.size)]
