"""Put a watch on a step: names of modules, functions of torch's interface, compiled parts run eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from floatline.observe.finite.watch import Watch
from floatline.observe.module_stack import followed


class _Calls(TorchFunctionMode):
    """Tells the watch which function of torch's Python interface runs, so that a remedy can meet it again."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watch.function = getattr(func, "__name__", "")
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: nn.Module | None = None) -> Iterator[Watch]:
    """Watch all ops inside, in eager mode, with the names of `model`'s modules."""
    watch = Watch()
    with followed(model, watch.modules), watch, _Calls(watch):
        yield watch


def backward(loss: torch.Tensor) -> None:
    """Run a scalar's backward so that modes see what the program does in it: hooks, forwards that are computed again.

    `Tensor.backward` is itself a function of torch's interface. While a mode handles one, the mode is off.
    """
    seed = torch.ones_like(loss)
    _engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)
