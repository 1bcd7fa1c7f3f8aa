"""Make an update or leave it, decided on the device: nothing waits for the verdict.

Fused optimizers take a tensor `found_inf`; where it is 1, the kernel leaves parameters and state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def can_select(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether the optimizer leaves everything alone on a bad verdict: fused Adam and AdamW.

    Fused SGD takes `found_inf` too, but a first update that it leaves out leaves its momentum uninitialised.
    """
    return isinstance(optimizer, torch.optim.Adam) and getattr(optimizer, "_step_supports_amp_scaling", False)


def step_by_select(
    optimizer: torch.optim.Optimizer, finite: torch.Tensor, step: Callable[[], Any] | None = None
) -> None:
    """Run `step()` of a fused optimizer, which leaves parameters and state alone on the device if not `finite`.

    Args:
        step: Another way to run it, on some of its parameters.
    """
    selecting: Any = optimizer
    selecting.grad_scale = None
    selecting.found_inf = torch.where(finite, 0.0, 1.0)
    try:
        (step or optimizer.step)()
    finally:
        del selecting.grad_scale, selecting.found_inf
