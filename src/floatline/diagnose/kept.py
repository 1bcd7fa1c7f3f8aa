"""Leave a training job as it was: weights, buffers, gradients, optimizer state and random numbers are put back.

Parameters are copied at once where an optimizer will change them, and otherwise only when an op is about to write one:
an embedding with `max_norm` does that in its forward.

Not covered: Python attributes that a model sets, and an optimizer's own attributes beside its state and groups.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from floatline.observe.finite import storage_of
from floatline.observe.finite.ran import written
from floatline.step.random_state import python_random_kept
from floatline.step.undisturbed import gradients_aside, undisturbed


@contextmanager
def everything_kept(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, others: Iterable[torch.Tensor] = ()
) -> Iterator[Written]:
    """Context after which model and optimizer are bit for bit as before.

    Args:
        model: Its buffers, gradients and modes, and the random state of torch, Python and numpy.
        optimizer: If its step is run inside: its state, groups and parameters.
        others: Tensors whose gradients a backward may change as well.

    Yields:
        What is to be told of writes into parameters: by the watch, or by `SavingWrites`.
    """
    weights = [(p, p.detach().clone()) for p in _parameters(model, optimizer)] if optimizer is not None else []
    copies = Written(_parameters(model, None) if optimizer is None else [])
    state = _copied(optimizer) if optimizer is not None else None
    training = [(module, module.training) for module in model.modules()]
    try:
        leaves = [*_parameters(model, optimizer), *others]
        with undisturbed(model), gradients_aside(leaves), python_random_kept():
            yield copies
    finally:
        copies.restore()
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
        if optimizer is not None and state is not None:
            _restore(optimizer, state)
        for module, mode in training:
            module.training = mode


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {id(p): p for p in model.parameters()}
    for group in optimizer.param_groups if optimizer is not None else ():
        found.update({id(p): p for p in group["params"]})
    return list(found.values())


class Written:
    """Copies of the parameters that a forward writes, each made before the first write.

    Args:
        parameters: All that may be written.
    """

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._by_storage = {key: p for p in parameters if (key := storage_of(p)) is not None}
        self._before: dict[int, torch.Tensor] = {}

    def save(self, tensor: torch.Tensor) -> None:
        """Copy the parameter that a tensor is (a view of), if it is one; an op is about to write it."""
        key = storage_of(tensor)
        if key in self._by_storage and key not in self._before:
            self._before[key] = self._by_storage[key].detach().clone()

    def restore(self) -> None:
        """Put the copies back."""
        with torch.no_grad():
            for key, value in self._before.items():
                self._by_storage[key].copy_(value)


class SavingWrites(TorchDispatchMode):
    """Tells `Written` of each write, where no watch does."""

    supports_higher_order_operators = True

    def __init__(self, copies: Written) -> None:
        super().__init__()
        self._copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            for tensor in written(func, args, kwargs):
                self._copies.save(tensor)
        return func(*args, **kwargs)


def _copied(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of what a step changes; parameters stay the keys that they are."""
    state = {key: {name: _copy(value) for name, value in values.items()} for key, values in optimizer.state.items()}
    groups = [{key: value if key == "params" else copy.copy(value) for key, value in group.items()}
              for group in optimizer.param_groups]  # fmt: skip
    return {"state": state, "groups": groups}


def _copy(value: Any) -> Any:
    """Copy a value; a tensor that is made of others (8-bit state, shards) by its parts."""
    if is_traceable_wrapper_subclass(value):
        parts, context = value.__tensor_flatten__()
        copies = {name: _copy(getattr(value, name)) for name in parts}
        return type(value).__tensor_unflatten__(copies, context, value.size(), value.stride())
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _write(there: Any, value: Any) -> None:
    """Give a tensor the values of its copy."""
    if is_traceable_wrapper_subclass(there):
        for name in there.__tensor_flatten__()[0]:
            _write(getattr(there, name), getattr(value, name))
    else:
        there.copy_(value)


def _restore(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    for parameter in [key for key in optimizer.state if key not in kept["state"]]:
        del optimizer.state[parameter]
    for parameter, values in kept["state"].items():
        _restore_state(optimizer.state[parameter], values)
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=True):
        for key in [key for key in group if key not in values]:
            del group[key]
        group.update(values)


def _restore_state(now: dict[str, Any], values: dict[str, Any]) -> None:
    """Give a parameter's state its values back, into the same tensors: others may hold them."""
    for name, value in values.items():
        there = now.get(name)
        if isinstance(value, torch.Tensor) and isinstance(there, torch.Tensor) and there.shape == value.shape:
            with torch.no_grad():
                _write(there, value)
        else:
            now[name] = value
    for name in [name for name in now if name not in values]:
        del now[name]
