"""Which forward op a derivative belongs to.

Each autograd node has a sequence number. The first op that runs after a node was made is the op that it is the
derivative of: autograd makes the node and then calls the op. So the ops of a backward, which belong to the node that
runs, are tied to a line and a module of the forward.

Inside of a backward other things run as well: a backward that a user has written (its line is the one to mend), hooks
on gradients, and forwards computed again by checkpointing. They have Python lines inside of autograd's engine; the
formulas of torch have none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from floatline.observe.finite.numbers import Numbers, numbers, storage_of
from floatline.observe.finite.origins import Spot
from floatline.observe.finite.places import place_in_backward


@dataclass(frozen=True)
class Blame:
    """Where a derivative's fault lies.

    Attributes:
        spot: The forward op.
        custom: The derivative is that of a user-written autograd Function, whose name is the spot's op then.
        saved: What the forward had kept for it.
    """

    spot: Spot
    custom: bool
    saved: tuple[Numbers, ...]


class Nodes:
    """The forward ops of autograd's nodes."""

    def __init__(self) -> None:
        self._spots: dict[int, Spot] = {}

    def newest(self) -> int | None:
        """Return the newest node's number if no op has been noted for it, else None."""
        number = torch.autograd._get_sequence_nr() - 1
        return None if number in self._spots else number

    def note(self, number: int, spot: Spot) -> None:
        """Note the op that a node is the derivative of."""
        self._spots[number] = spot

    def spot(self, node: Any, ran: str) -> Spot:
        """Return the forward op of a node; of one that nobody noted, the op that was noted before it."""
        number = node._sequence_nr()
        return self._spots.get(number) or self._before(number) or Spot(op=ran, module="", user=None, library=None)

    def blame(self, node: Any, ran: str) -> Blame:
        """Return what a fault in a node's derivative is to be blamed on.

        Args:
            node: The autograd node that runs.
            ran: The op that runs in it.
        """
        spot, saved = self.spot(node, ran), _saved(node)
        if not is_custom(node):
            return Blame(spot, False, saved)
        name = type(node).__name__.removesuffix("Backward")
        return Blame(replace(spot, op=name, user=place_in_backward() or spot.user), True, saved)

    def _before(self, number: int) -> Spot | None:
        earlier = [known for known in self._spots if known < number]
        return self._spots[max(earlier)] if earlier else None


def is_custom(node: Any) -> bool:
    """Say whether a node is of an autograd Function that torch does not bring with it."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return not type(node)._forward_cls.__module__.startswith("torch.")  # type: ignore[attr-defined]


def derivative_that_runs() -> Any:
    """Return the autograd node whose formula runs now; None where none does, or code of others runs inside of it."""
    node = torch._C._current_autograd_node()
    if node is None or (not is_custom(node) and place_in_backward() is not None):
        return None
    return node


def _saved(node: Any) -> tuple[Numbers, ...]:
    """Return what a forward op kept for its derivative, as far as it still has it."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    found = [(name.removeprefix("_saved_"), _get(node, name)) for name in names]
    if not names and isinstance(node, torch.autograd.function.BackwardCFunction):
        found += [(f"saved[{place}]", tensor) for place, tensor in enumerate(_get(node, "saved_tensors") or ())]
    return tuple(said for name, tensor in found if (said := _numbers(tensor, name)) is not None)


def _numbers(value: Any, name: str) -> Numbers | None:
    """Sum up what was kept, where it is a tensor that can be asked (a number may look like one)."""
    if not isinstance(value, torch.Tensor) or storage_of(value) is None:
        return None
    try:
        return numbers(value, name)
    except RuntimeError:
        return None


def _get(node: Any, name: str) -> Any:
    try:
        return getattr(node, name)
    except RuntimeError:  # freed already
        return None
