"""Put a meter on a step: names of modules, compiled parts run eager, the backward in this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from floatline.observe.error.meter import ErrorMeter
from floatline.observe.finite import plain_name


@contextmanager
def metering(model: nn.Module | None = None, *, local: bool = True) -> Iterator[ErrorMeter]:
    """Measure all ops inside, with the names of `model`'s modules.

    Args:
        model: Whose modules to name.
        local: Also what each op loses by itself; otherwise exact values and decisions only.
    """
    meter = ErrorMeter(local=local)
    names = {id(module): plain_name(name) for name, module in (model.named_modules() if model is not None else ())}

    def enter(module: nn.Module, args: Any) -> None:
        meter.modules.append(names.get(id(module), meter.modules[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if len(meter.modules) > 1:
            meter.modules.pop()

    with ExitStack() as stack:
        for module in model.modules() if model is not None else ():
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(meter)
        yield meter
