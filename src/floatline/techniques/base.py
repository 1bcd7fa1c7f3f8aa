"""The shape of a technique: applied from outside, returns what it touched, can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn


@dataclass(frozen=True)
class Applied:
    """What a technique did to a model.

    Args:
        touched: Dotted names of the modules or parameters it changed.
        undo: Takes the change back, exactly.
    """

    touched: tuple[str, ...]
    undo: Callable[[], None]


class Technique(Protocol):
    """A part that changes how the one step runs, not what is trained. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """The technique's name in recipes and tables."""

    def apply(self, model: nn.Module) -> Applied:
        """Apply to `model` in place."""
