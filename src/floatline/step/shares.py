"""How much each micro-batch of an update counts, so that they add up to the full batch.

A micro-batch with n of an update's N targets weighs n / N: its loss is a mean over n, theirs together must be one over
N. `loss / number of micro-batches` would not be, where they hold different numbers of targets (transformers#34191).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from floatline.step.batch import Batch
from floatline.step.exchange import share_out
from floatline.techniques import OneRank


def weighted(micro_batches: list[Batch], count: Callable[[Batch], Any], ranks: OneRank) -> list[tuple[Batch, Any]]:
    """Return the micro-batches that are to be run, each with its share of the targets.

    A single one needs no counting. One without targets is left out: its loss is 0/0 and would make the others' NaN.

    Args:
        micro_batches: Of one update, on this rank.
        count: Number of targets of one.
        ranks: Who trains together.
    """
    if ranks.size > 1:
        return share_out(micro_batches, [count(micro_batch) for micro_batch in micro_batches], ranks)
    if len(micro_batches) < 2:
        return [(micro_batch, None) for micro_batch in micro_batches]
    counts = [count(micro_batch) for micro_batch in micro_batches]
    total = sum(counts)
    if _is_zero(total):  # nothing to learn from: one of them shows it, and the guard skips the update
        return [(micro_batches[0], None)]
    return [(m, number / total) for m, number in zip(micro_batches, counts, strict=True) if not _is_zero(number)]


def _is_zero(count: Any) -> bool:
    """Say whether a count is 0, where that can be read without waiting for a device."""
    if isinstance(count, torch.Tensor) and count.device.type != "cpu":
        return False
    return count is not None and float(count) == 0.0
