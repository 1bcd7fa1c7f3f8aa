"""Leave a training job as it was: weights, buffers, gradients, optimizer state and random numbers are put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from floatline.step.undisturbed import undisturbed


@contextmanager
def everything_kept(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Context after which model and optimizer are bit for bit as before.

    Parameters are copied only where an optimizer may change them.
    """
    weights = [(p, p.detach().clone()) for p in _parameters(model, optimizer)] if optimizer is not None else []
    state = _copied(optimizer) if optimizer is not None else None
    training = [(module, module.training) for module in model.modules()]
    try:
        with undisturbed(model):
            yield
    finally:
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        if optimizer is not None and state is not None:
            _restore(optimizer, state)
        for module, mode in training:
            module.training = mode


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    found = {id(p): p for p in model.parameters()}
    for group in optimizer.param_groups if optimizer is not None else ():
        found.update({id(p): p for p in group["params"]})
    return list(found.values())


def _copied(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of what a step changes; parameters stay the keys that they are."""
    return {
        "state": {key: {name: _copy(value) for name, value in state.items()} for key, state in optimizer.state.items()},
        "groups": [{k: v if k == "params" else copy.copy(v) for k, v in group.items()} for group in optimizer.param_groups],
        "grads": [(p, p.grad) for group in optimizer.param_groups for p in group["params"]],
    }  # fmt: skip


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _restore(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    for parameter in list(optimizer.state):
        if parameter not in kept["state"]:
            del optimizer.state[parameter]
    for parameter, values in kept["state"].items():
        now = optimizer.state[parameter]
        for name, value in values.items():
            same = isinstance(value, torch.Tensor) and isinstance(now.get(name), torch.Tensor)
            if same and now[name].shape == value.shape:
                with torch.no_grad():
                    now[name].copy_(value)  # the same object: others may hold it
            else:
                now[name] = value
        for name in [name for name in now if name not in values]:
            del now[name]
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update(values)
    for parameter, gradient in kept["grads"]:
        parameter.grad = gradient
