"""Replace `module.forward` on the instance, in a way that can be taken off again.

Precision islands and techniques change what a module does from outside. The replacement is a bound method, so a
`copy.deepcopy` of the model is bound to the copied module and not to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn


@dataclass
class ForwardPatch:
    """An instance-level replacement of `module.forward` that can be undone."""

    module: nn.Module
    previous: Any = None

    def install(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> ForwardPatch:
        """Replace forward by `wrap(forward)`, where both take the module as first argument."""
        self.previous = self.module.__dict__.get("forward")
        inner = self.previous.__func__ if isinstance(self.previous, MethodType) else type(self.module).forward
        if self.previous is not None and not isinstance(self.previous, MethodType):
            function = self.previous

            def inner(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        self.module.forward = MethodType(wraps(inner)(wrap(inner)), self.module)
        return self

    def undo(self) -> None:
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous
