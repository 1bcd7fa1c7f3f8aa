"""What the micro-batches of an update add up to, when some of them may have to be left out.

Each loss counts by its share of the targets (shares.py). Where the loss is read before its backward, a micro-batch
whose loss is not finite has no backward: it is as if it had never been there. The others then hold a share of 1 - lost,
so both the total and the gradients are divided by that.

Not covered: a micro-batch whose loss is finite and whose gradient is not. It is mixed with the others by then, and the
whole update is condemned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.step.agreement import Agreement
from floatline.step.live_buffers import LiveBuffers
from floatline.step.sentinel import Rerun


class Accumulation:
    """The sum over the micro-batches of one update, as it grows.

    Args:
        live: What the forwards may write is kept before each, and put back where one is left out.
        early: Losses are read before their backward. On CUDA that waits for the device.
        stops: The first loss that is not finite ends the update, with the weights as they were.

    Attributes:
        loss: 0-d, weighted over the micro-batches that count; after `end` of all ranks together.
        left_out: Index and loss of those that do not count.
        lost: Their share of the targets.
        stopped: The update has ended at one of them.
        reruns: The micro-batches, where somebody asks for them.
        buffers: After `end`: what `LiveBuffers.fault` says, of all ranks.
        none: After `end`: there is no gradient to update with.
    """

    def __init__(self, live: LiveBuffers, early: bool, stops: bool) -> None:
        self.loss: torch.Tensor
        self.left_out: list[tuple[int, float]] = []
        self.lost = 0.0
        self.stopped = False
        self.reruns: list[Rerun] = []
        self.buffers: torch.Tensor | None = None
        self.none = True
        self._live = live
        self._early = early
        self._stops = stops
        self._begun = 0

    def begin(self, rerun: Rerun | None) -> None:
        """Get ready for the next micro-batch's forward.

        Args:
            rerun: What it takes to run it again, where somebody asks for that.
        """
        if not self._begun:
            self._live.keep()
        elif self._early:
            self._live.mark()
        self._begun += 1
        if rerun is not None:
            self.reruns.append(rerun)

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
        self._live.leave_out_last()
        self.left_out.append((self._begun - 1, value))
        self.lost += 1.0 if weight is None else float(weight)
        self.stopped = self._stops
        if self.none or self.stopped:  # it is all there is to tell
            self.loss = loss.detach()

    def add(self, share: torch.Tensor) -> None:
        """Count a micro-batch whose backward has run."""
        self.loss = share.detach() if self.none else self.loss + share.detach()
        self.none = False

    def end(self, agreement: Agreement) -> None:
        """Complete the sum.

        Args:
            agreement: Of the ranks, which judge one loss.

        Raises:
            ConfigError: There was no micro-batch.
        """
        if not self._begun:
            raise ConfigError(
                "an update needs at least one micro-batch, the list is empty", hint="leave out updates without data"
            )
        self.none = self.none or self.stopped
        if self.none:
            return
        if self.lost:
            self.loss = self.loss / (1.0 - self.lost)
        self.loss, self.buffers = agreement.numbers(self.loss, self._live.fault())

    def make_up_for_lost(self, parameters: Iterable[torch.Tensor]) -> None:
        """Weigh the gradients of the micro-batches that are left as if the others had never been there."""
        gradients = [p.grad for p in parameters if p.grad is not None] if self.lost else []
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / (1.0 - self.lost))
