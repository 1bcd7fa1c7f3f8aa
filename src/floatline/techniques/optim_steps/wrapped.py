"""An optimizer around another: the same parameter groups, the same state, another way to step.

Groups and state are the inner optimizer's own objects. So learning-rate schedules, GradScaler and whoever else writes
to `param_groups` reach both, state dicts keep the inner optimizer's format, and when a technique is taken off the
inner optimizer goes on from where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from floatline.errors import ConfigError


class WrappedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that step another one.

    Args:
        inner: Any optimizer with its state by parameter.
        name: The technique, for errors.

    Raises:
        ConfigError: LBFGS, which needs the whole gradient at once.
    """

    def __init__(self, inner: torch.optim.Optimizer, name: str) -> None:
        if isinstance(inner, torch.optim.LBFGS):
            raise ConfigError(
                f"{name} steps some parameters at a time, which {type(inner).__name__} cannot",
                hint=f"use another optimizer, e.g. torch.optim.AdamW, or drop {name}",
            )
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        share(self, inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_in_place(self.inner, state_dict, self.inner.load_state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


def share(optimizer: torch.optim.Optimizer, source: torch.optim.Optimizer) -> None:
    """Make `optimizer` use the groups and the state of `source`, the very objects."""
    optimizer.param_groups = source.param_groups
    optimizer.state = source.state


def load_in_place(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Load a state dict and keep the group and state objects, which torch replaces by new ones.

    Args:
        optimizer: Whose objects others hold.
        state_dict: As torch optimizers return it.
        load: The optimizer's own way to load it.
    """
    groups, state = optimizer.param_groups, optimizer.state
    load(state_dict)
    for group, loaded in zip(groups, list(optimizer.param_groups), strict=True):
        if loaded is not group:
            group.clear()
            group.update(loaded)
    loaded_state = optimizer.state
    if loaded_state is not state:
        state.clear()
        state.update(loaded_state)
    optimizer.param_groups, optimizer.state = groups, state


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer at the bottom of the wrappers."""
    while isinstance(optimizer, WrappedOptimizer):
        optimizer = optimizer.inner
    return optimizer


def saved_state_of(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> list[tuple[Any, torch.Tensor, dict[str, Any]]]:
    """Pair a state dict with the parameters it is for: (key in the dict, parameter, saved state), in order."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = state_dict["state"]
    return [(key, parameter, saved[key]) for key, parameter in zip(keys, parameters, strict=False) if key in saved]
