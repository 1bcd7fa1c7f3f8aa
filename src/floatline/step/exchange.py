"""What the ranks of a step tell each other before an update: their numbers of targets, and which modules they will run.

Gradients of N ranks are averaged, so a micro-batch of n targets weighs n N / (all ranks' targets), and the sum over the
ranks is the loss of all data together. FSDP's collectives meet only if every rank makes the same forwards and
backwards. So a rank with fewer micro-batches repeats its last one with weight 0, and one without targets runs with
made-up targets and weight 0; neither changes anything. Batches of different kinds (one rank shows the model an image,
another does not) run different modules and are refused.

Where all ranks have equally many micro-batches, which is the rule, one message tells all of this.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.step.batch import Batch
from floatline.techniques import OneRank


def share_out(micro_batches: Sequence[Batch], counts: Sequence[Any], ranks: OneRank) -> list[tuple[Batch, Any]]:
    """Return the micro-batches that this rank runs, as many as any other, each with its weight.

    Args:
        micro_batches: This rank's.
        counts: Their numbers of targets.
        ranks: Who trains together.

    Raises:
        ConfigError: A rank has no micro-batch, or the ranks' micro-batches are of different kinds.
    """
    kinds = [_kind(micro_batch) for micro_batch in micro_batches]
    told = ranks.tell([len(micro_batches), float(sum(counts)), _digest(kinds)])
    numbers, totals, digests = zip(*told, strict=True)
    number, total = int(max(numbers)), sum(totals)
    if min(numbers) == 0:
        raise ConfigError(
            "an update needs at least one micro-batch on every rank, one has none",
            hint="share out samples so that every rank gets some; a micro-batch whose labels are all -100 will do",
        )
    filled = [*micro_batches, *[micro_batches[-1]] * (number - len(micro_batches))]
    if min(numbers) < number:  # the repeated ones count as well
        kinds += [kinds[-1]] * (number - len(kinds))
        digests = tuple(digest for (digest,) in ranks.tell([_digest(kinds)]))
    _refuse_other_kinds(kinds, digests)
    if total == 0:  # nothing to learn from: it shows in the loss, and the guard skips the update
        return [(filled[0], None)]
    weights = [float(count) * ranks.size / total for count in counts]
    weights += [0.0] * (number - len(weights))
    return [(m if weight else with_some_target(m), weight) for m, weight in zip(filled, weights, strict=True)]


def with_some_target(batch: Batch) -> Batch:
    """Return a batch whose integer `labels` are all 0, a class that exists, so that its loss is finite."""
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return batch
    return {**dict(batch.items()), "labels": torch.zeros_like(labels)}


def _refuse_other_kinds(kinds: list[list[str]], digests: Sequence[float]) -> None:
    if all(other == digests[0] for other in digests):
        return
    raise ConfigError(
        f"the ranks' micro-batches are of different kinds, on this rank: {kinds}; such ranks would wait for each other",
        hint="give every rank the same kinds in the same order: samples with images on all ranks, or on none",
    )


def _digest(kinds: list[list[str]]) -> int:
    """Return a number of 48 bits for kinds, which a float64 holds exactly."""
    return int.from_bytes(hashlib.sha256(repr(kinds).encode()).digest()[:6], "little")


def _kind(batch: Batch) -> list[str]:
    """Return the names of what is in a batch: they decide which modules run.

    Positions do not: a token budget writes them into micro-batches whose padding it cut off on the left, no others.
    """
    if not isinstance(batch, Mapping) and not hasattr(batch, "items"):
        return [type(batch).__name__]
    found = {str(key) for key, value in dict(batch.items()).items() if value is not None}
    return sorted(found - {"position_ids"})
