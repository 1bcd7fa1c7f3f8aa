"""What the micro-batches of an update add up to, when some of them may have to be left out.

Each loss counts by its share of the targets (shares.py). Where the loss is read before its backward, a micro-batch
whose loss is not finite has no backward: it is as if it had never been there. The others then hold a share of 1 - lost,
so both the total and the gradients are divided by that.

Not covered: a micro-batch whose loss is finite and whose gradient is not. It is mixed with the others by then, and the
whole update is condemned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.step.agreement import Agreement
from floatline.step.live_buffers import LiveBuffers
from floatline.step.sentinel import Rerun


@dataclass(frozen=True)
class Accumulated:
    """What the forwards and backwards of an update gave.

    Attributes:
        loss: 0-d, weighted over the micro-batches that count; of all ranks together.
        left_out: Index and loss of those that do not.
        lost: Their share of the targets.
        none: There is no gradient to update with.
        reruns: The micro-batches, where somebody asks for them.
        buffers: What `LiveBuffers.fault` says, of all ranks.
    """

    loss: torch.Tensor
    left_out: tuple[tuple[int, float], ...] = ()
    lost: float = 0.0
    none: bool = False
    reruns: tuple[Rerun, ...] = ()
    buffers: torch.Tensor | None = None

    def make_up_for_lost(self, parameters: Iterable[torch.Tensor]) -> None:
        """Weigh the gradients of the micro-batches that are left as if the others had never been there."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.lost and gradients:
            torch._foreach_mul_(gradients, 1.0 / (1.0 - self.lost))


class Accumulation:
    """The sum over the micro-batches of one update, as it grows.

    Args:
        buffers: What the forwards may write is kept before each, and put back where one is left out.
        early: Losses are read before their backward. On CUDA that waits for the device.
        stops: The first loss that is not finite ends the update, with the weights as they were.

    Attributes:
        stopped: It has ended so.
    """

    def __init__(self, buffers: LiveBuffers, early: bool, stops: bool) -> None:
        self.stopped = False
        self._buffers = buffers
        self._early = early
        self._stops = stops
        self._begun = 0
        self._total: torch.Tensor | None = None
        self._bad: torch.Tensor | None = None  # the last loss that was left out
        self._left_out: list[tuple[int, float]] = []
        self._reruns: list[Rerun] = []
        self._lost = 0.0

    def begin(self, rerun: Rerun | None) -> None:
        """Get ready for the next micro-batch's forward.

        Args:
            rerun: What it takes to run it again, where somebody asks for that.
        """
        if not self._begun:
            self._buffers.keep()
        elif self._early:
            self._buffers.mark()
        self._begun += 1
        if rerun is not None:
            self._reruns.append(rerun)

    def share(self, loss: torch.Tensor, weight: Any) -> torch.Tensor | None:
        """Return what a loss adds to the update's, for its backward; None where the micro-batch is left out.

        Args:
            loss: 0-d, a mean over the micro-batch's targets.
            weight: Its share of the targets; None for a single micro-batch.
        """
        value = loss.item() if self._early else 0.0
        if value - value != 0.0:
            self._leave_out(loss, value, weight)
            return None
        return loss if weight is None else loss.float() * weight

    def _leave_out(self, loss: torch.Tensor, value: float, weight: Any) -> None:
        self._bad = loss.detach()
        self._buffers.leave_out_last()
        self._left_out.append((self._begun - 1, value))
        self._lost += 1.0 if weight is None else float(weight)
        self.stopped = self._stops

    def add(self, share: torch.Tensor) -> None:
        """Count a micro-batch whose backward has run."""
        self._total = share.detach() if self._total is None else self._total + share.detach()

    def end(self, agreement: Agreement) -> Accumulated:
        """Return the sum.

        Args:
            agreement: Of the ranks, which judge one loss.

        Raises:
            ConfigError: There was no micro-batch.
        """
        if not self._begun:
            raise ConfigError(
                "an update needs at least one micro-batch, the list is empty", hint="leave out updates without data"
            )
        left_out, reruns = tuple(self._left_out), tuple(self._reruns)
        if self._bad is not None and (self._total is None or self.stopped):
            return Accumulated(self._bad, left_out, self._lost, True, reruns)
        assert self._total is not None
        total = self._total / (1.0 - self._lost) if self._lost else self._total
        total, buffers = agreement.numbers(total, self._buffers.fault())
        return Accumulated(total, left_out, self._lost, False, reruns, buffers)
