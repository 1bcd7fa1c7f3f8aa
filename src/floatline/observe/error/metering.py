"""Put a meter on a step: names of modules, compiled parts run eager, the backward in this thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from floatline.observe.error.meter import ErrorMeter
from floatline.observe.module_stack import followed


@contextmanager
def metering(model: nn.Module | None = None, *, local: bool = True) -> Iterator[ErrorMeter]:
    """Measure all ops inside, with the names of `model`'s modules.

    Args:
        model: Whose modules to name.
        local: Also what each op loses by itself; otherwise exact values and decisions only.
    """
    meter = ErrorMeter(local=local)
    with followed(model, meter.modules), meter:
        yield meter
