"""The learning-rate schedule of a step: one move an update, made or not, so that it ends with the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch


class Schedule(Protocol):
    """Torch's learning-rate schedulers, or anything of their shape."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_schedule(
    schedule: Schedule | Callable[[torch.optim.Optimizer], Schedule] | None, optimizer: torch.optim.Optimizer
) -> Schedule | None:
    """Return the schedule of the optimizer that steps.

    Args:
        schedule: Made already, or a factory.
        optimizer: With the techniques on it. A schedule that was made for the one they replaced moves to it.
    """
    made: Any = schedule(optimizer) if callable(schedule) else schedule
    if getattr(made, "optimizer", optimizer) is not optimizer:
        made.optimizer = optimizer
    return made


def advance(schedule: Schedule | None, first: bool) -> None:
    """Move a schedule on by one update.

    Args:
        schedule: None does nothing.
        first: It is the first update. Torch takes one that was skipped, or a replaced optimizer, for a wrong order.
    """
    if schedule is None:
        return
    with warnings.catch_warnings() if first else nullcontext():
        if first:
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            warnings.filterwarnings("ignore", message=r"Seems like `optimizer.step\(\)` has been overridden")
        schedule.step()
