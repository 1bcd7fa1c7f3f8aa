"""The processes that train one model together, and an object for training alone.

Verdicts, losses and target counts are summed over all ranks, so that every rank makes the same update or none does
(a rank that skips alone leaves the others waiting in a collective).
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class OneRank:
    """The null object: this process trains alone."""

    rank = 0
    size = 1

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return `value` summed over all ranks."""
        return value


class RankGroup(OneRank):
    """The ranks of a process group.

    Args:
        group: A torch process group whose members hold shards of one model and see different data.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total
