"""Exceptions in the middle of an update: the next update finds nothing of it.

A forward or backward that raises (out of memory, a Ctrl-C, a bad sample) leaves gradients of half an update behind,
which the next backward would add to, and running statistics that have seen half a batch. The gradients are forgotten on
the way out, and buffers are put back as a condemned update's are. Of a sharded model FSDP2 is told to forget the
iteration as well; before torch 2.13 it cannot, and would reduce no gradients any more, so the step refuses to go on.
"""

from __future__ import annotations

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.step.live_buffers import LiveBuffers
from floatline.techniques.distributed.shards import forget_iteration


class Interruption:
    """A context around an update's forwards and backwards. The exception goes on its way.

    Args:
        model: The model.
        optimizer: The optimizer, whose parameters may be others (masters).
        buffers: What the forwards have written.
        sharded: FSDP2 has sharded the model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, buffers: LiveBuffers, sharded: bool) -> None:
        self._model = model
        self._optimizer = optimizer
        self._buffers = buffers
        self._sharded = sharded
        self._torn = False

    def __enter__(self) -> None:
        """Begin an update.

        Raises:
            ConfigError: An exception has ended an earlier one, from which the model cannot recover.
        """
        if self._torn:
            raise ConfigError(
                f"an exception has ended an earlier update, from which FSDP2 of torch {torch.__version__} has not "
                "recovered: it would reduce no gradients any more",
                hint="make model and step anew and load the newest checkpoint; torch 2.13 and newer recover",
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self._model.zero_grad(set_to_none=True)  # of shards: those that are gathered just now
        self._torn = self._sharded and not forget_iteration(self._model)
        self._optimizer.zero_grad(set_to_none=True)
        self._buffers.give_up()
