"""Several techniques on one model: checked against each other, applied in the order of their stages, undone in reverse.

Precision is a stage among the others: weights are cast after adapters were added and before anything is recomputed,
compiled or sharded. `TrainStep` hands its own precision in, so the stack only has to leave room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.precision import Policy
from floatline.techniques.base import Applied, Stage, Technique, refuse_conflict
from floatline.techniques.distributed.ranks import OneRank
from floatline.techniques.registry import make_technique

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Stack:
    """The techniques of one step.

    Args:
        techniques: Techniques or their texts ("checkpointing(every=2)"), in any order.

    Raises:
        ConfigError: A text that names no technique, one technique twice, or two that exclude each other.

    Attributes:
        techniques: Them, in the order in which they are applied.
        applied: What each did, once `apply` has run.
    """

    def __init__(self, techniques: Iterable[Technique | str] = ()) -> None:
        self.techniques = sorted(map(make_technique, techniques), key=lambda t: (t.stage, t.order))
        self.applied: list[Applied] = []
        self._undos: list[Callable[[], None]] = []
        for index, one in enumerate(self.techniques):
            for other in self.techniques[:index]:
                if one.name == other.name:
                    raise ConfigError(f"{one.name} is given twice: {other} and {one}", hint="keep one of them")
                refuse_conflict(one, other)
        for one in self.techniques:
            for name, reason in one.needs().items():
                if self.find(name) is None:
                    raise ConfigError(f"{one} needs {name}: {reason}", hint=f"add the technique {name}")

    def find(self, name: str) -> Technique | None:
        """Return the technique of that name, None where there is none."""
        return next((technique for technique in self.techniques if technique.name == name), None)

    def refuse(self, policy: Policy, max_grad_norm: float | None) -> None:
        """Raise if one of them cannot run in a step of that precision and clipping.

        Raises:
            ConfigError: It says which, why and what to do.
        """
        for technique in self.techniques:
            reason = technique.refuses(policy, max_grad_norm)
            if reason:
                raise ConfigError(
                    f"{technique} cannot be used in this step: {reason}", hint=f"or drop {technique.name}"
                )

    def apply(
        self,
        model: nn.Module,
        hardware: Hardware,
        precision: Callable[[], Callable[[], None]],
        policy: Policy | None = None,
    ) -> None:
        """Apply all of them.

        Args:
            model: Changed in place.
            hardware: Whose rules apply.
            precision: Called in the precision stage; applies a policy and returns its undo.
            policy: That policy, for techniques that must know it.

        Raises:
            ConfigError: One of them cannot be applied; those before it are taken off again.
        """
        try:
            for technique in (t for t in self.techniques if t.stage < Stage.PRECISION):
                self._add(technique.apply(model, hardware, policy))
            self._undos.append(precision())
            for technique in (t for t in self.techniques if t.stage > Stage.PRECISION):
                self._add(technique.apply(model, hardware, policy))
        except BaseException:
            self.undo()
            raise

    def _add(self, applied: Applied) -> None:
        self.applied.append(applied)
        self._undos.append(applied.undo)

    def undo(self) -> None:
        """Take all of them off again, precision included; the latest first."""
        while self._undos:
            self._undos.pop()()
        self.applied.clear()

    def around(self) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch's forward and loss."""
        return _entered([applied.around for applied in self.applied])

    def during(self) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch's forward, loss and backward."""
        return _entered([applied.during for applied in self.applied])

    def update(self) -> AbstractContextManager[Any]:
        """Return the context of what follows an update's last backward."""
        return _entered([applied.update for applied in self.applied])

    def split(self, batch: Any) -> list[Any]:
        """Return the micro-batches of a batch; each technique splits what the one before it made."""
        parts = [batch]
        for applied in self.applied:
            if applied.split is not None:
                parts = [piece for part in parts for piece in applied.split(part)]
        return parts

    def convert(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to use in place of `optimizer`."""
        for applied in self.applied:
            if applied.optimizer is not None:
                optimizer = applied.optimizer(optimizer)
        return optimizer

    @property
    def ranks(self) -> OneRank:
        """The processes that train together."""
        return next((applied.ranks for applied in self.applied if applied.ranks is not None), OneRank())

    @property
    def notes(self) -> list[str]:
        """Automatic choices and fallbacks of all techniques, each with its reason."""
        return [f"{applied.technique.name}: {note}" for applied in self.applied for note in applied.notes]

    def facts(self) -> dict[str, float]:
        """Return what the techniques counted so far, as `name.what`."""
        return {
            f"{applied.technique.name}.{key}": value
            for applied in self.applied
            for key, value in applied.facts().items()
        }


def _entered(makers: list[Callable[[], AbstractContextManager[Any]]]) -> AbstractContextManager[Any]:
    if not makers:  # asked for three times an update
        return _NOTHING
    contexts = [maker() for maker in makers if maker is not nullcontext]
    if len(contexts) < 2:
        return contexts[0] if contexts else nullcontext()
    return _nested(contexts)


@contextmanager
def _nested(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
