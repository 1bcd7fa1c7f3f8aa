"""Snapshots: what a rollback goes back to, in host memory.

A snapshot holds parameters, buffers, optimizer, loss scale, schedule, random numbers, and whatever else the caller
registers (an EMA, a data loader's position): anything with `state_dict` and `load_state_dict`. It is verified before
it counts: one that is not finite is dropped, and the last good one stays. Of shards each rank keeps its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from floatline.step import random_state
from floatline.step.live_buffers import masks

_BUFFER = "buffer "


class Stateful(Protocol):
    """What can be put back: torch's own protocol."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Snapshot:
    """A copy of a training job.

    Args:
        model: Its parameters and buffers.
        step: Its optimizer, loss scale and schedule.
        extras: Name -> further state.

    Attributes:
        updates: The number of updates made then.
    """

    def __init__(self, model: nn.Module, step: Stateful, extras: Mapping[str, Stateful]) -> None:
        self._tensors = {name: _to_host(tensor) for name, tensor in _tensors(model)}
        self._masks = {_BUFFER + name for name in masks(model)} & self._tensors.keys()
        self._step = _copied(step.state_dict())
        self._extras = {name: _copied(extra.state_dict()) for name, extra in extras.items()}
        self._random = random_state.capture()
        self.updates: int = self._step["updates"]

    def is_finite(self) -> bool:
        """Say whether all of its floats are; a buffer may hold infinities, for it may be a mask."""
        may = [self._tensors[name] for name in self._masks]
        strict = [t for name, t in self._tensors.items() if name not in self._masks]
        return all(
            bool(torch.isfinite(t).all()) for t in (*strict, *_leaves(self._step)) if t.is_floating_point()
        ) and not any(bool(torch.isnan(t).any()) for t in may if t.is_floating_point())

    def restore(self, model: nn.Module, step: Stateful, extras: Mapping[str, Stateful]) -> None:
        """Put everything back; random numbers last, for loading may draw some."""
        with torch.no_grad():
            for name, tensor in _tensors(model):
                saved = self._tensors.get(name, tensor)
                if _is_buffer(name) and saved.shape != tensor.shape:  # a mask that has grown since
                    owner, _, key = name.removeprefix(_BUFFER).rpartition(".")
                    model.get_submodule(owner)._buffers[key] = saved.to(tensor.device, copy=True)
                elif saved is not tensor:
                    _local(tensor).copy_(saved)
        step.load_state_dict(_copied(self._step))
        for name, extra in extras.items():
            if name in self._extras:
                extra.load_state_dict(_copied(self._extras[name]))
        random_state.restore(self._random)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *((_BUFFER + name, buffer) for name, buffer in model.named_buffers())]


def _is_buffer(name: str) -> bool:
    return name.startswith(_BUFFER)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return _local(tensor).detach().to("cpu", copy=True)


def _copied(tree: Any) -> Any:
    """Return a copy of nested state with its tensors copied to the host; shards and low-bit state are cloned."""
    if isinstance(tree, torch.Tensor):
        return _to_host(tree) if type(tree) in (torch.Tensor, nn.Parameter) else tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_copied, tree))
    return copy.deepcopy(tree)


def _leaves(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree] if type(tree) in (torch.Tensor, nn.Parameter) else []
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [leaf for value in values for leaf in _leaves(value)]
