"""Ranks that train together judge the same numbers: what they tell each other about a verdict.

Ranks of a sharded model tell through the techniques' ranks; those of a model that the caller has wrapped in
DistributedDataParallel through the default process group. Alone, nothing is sent.
"""

from __future__ import annotations

import torch
from torch import nn

from floatline.techniques import OneRank


class Agreement:
    """Makes one verdict of all ranks' numbers.

    Args:
        model: It may be wrapped in DistributedDataParallel.
        ranks: Who trains together by a technique.
        device: Of the numbers.
    """

    def __init__(self, model: nn.Module, ranks: OneRank, device: torch.device) -> None:
        self._model = model
        self._ranks = ranks
        self._device = device

    @property
    def wrapped(self) -> bool:
        """Whether the caller's DistributedDataParallel averages gradients over processes."""
        return isinstance(self._model, nn.parallel.DistributedDataParallel) and torch.distributed.is_initialized()

    def numbers(self, loss: torch.Tensor, fault: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return loss and buffer fault of all ranks' data.

        Args:
            loss: 0-d, of this rank.
            fault: 0-d, what `LiveBuffers.fault` returned; None without live buffers.
        """
        if self._ranks.size == 1 and not self.wrapped:
            return loss, fault.to(loss.device) if fault is not None else None
        other = torch.zeros_like(loss, dtype=torch.float32) if fault is None else fault.to(loss.device)
        both = torch.stack([loss.float(), other])
        if self._ranks.size > 1:
            both = self._ranks.sum(both)
            return both[0] / self._ranks.size, both[1]
        torch.distributed.all_reduce(both)
        return both[0] / torch.distributed.get_world_size(), both[1]

    def any(self, flag: bool) -> bool:
        """Say whether `flag` is set on any rank."""
        if self._ranks.size == 1 and self.wrapped:
            flags = torch.tensor(float(flag), device=self._device)
            torch.distributed.all_reduce(flags)
            return bool(flags)
        return self._ranks.any(flag)
