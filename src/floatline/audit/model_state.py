"""What a forward may leave in a model, put back after each run, so that every run starts from the same model.

    weights and buffers     get their values back in place; rebound, grown, added and deleted ones too
    tensors in attributes   likewise: `self.state.mul_(0.9)`, a tensor in a list or dict
    other attributes        are replaced by copies of what they were: counters, lists of activations, caches, generators
    submodules and hooks    that a forward has added go again

Not covered: state outside of the model (globals, what a hook's or a loss's closure holds), and attributes that cannot
be copied, which stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

_REGISTRIES = frozenset(vars(nn.Module()))
"""What torch keeps of a module itself: dicts of parameters, buffers, submodules and hooks, which stay the same objects
because the handles of hooks refer to them."""


class ModelState:
    """A model as it is now.

    Args:
        model: It stays the user's own object; its parts are remembered.

    Attributes:
        values: Parameter or buffer -> a copy of its values, by dotted name.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.values = {name: tensor.detach().clone() for name, tensor in named.items()}
        self._modules = list(model.modules())
        known = {id(tensor): (tensor, self.values[name]) for name, tensor in named.items()}
        for tensor in (tensor for module in self._modules for tensor in tensors_held(module)):
            if id(tensor) not in known:
                known[id(tensor)] = tensor, tensor.detach().clone()
        self._tensors = list(known.values())
        self._leaves = [
            (tensor, tensor.requires_grad, dict(tensor._backward_hooks or {}))
            for tensor, _ in self._tensors
            if tensor.is_leaf
        ]
        self._pinned: dict[int, Any] = {id(thing): thing for thing in self._stay()}
        self._registries = [
            {name: copy.copy(value) for name, value in vars(module).items() if name in _REGISTRIES}
            for module in self._modules
        ]
        copies = dict(self._pinned)
        self._attributes = [
            {name: self._copied(value, copies) for name, value in vars(module).items() if name not in _REGISTRIES}
            for module in self._modules
        ]

    def _stay(self) -> Iterator[Any]:
        """Yield what is the same object after each run: copies of attributes refer to it."""
        yield from (tensor for tensor, _ in self._tensors)
        for module in self._modules:
            yield module
            yield from (value for name, value in vars(module).items() if name in _REGISTRIES)

    def _copied(self, value: Any, copies: dict[int, Any]) -> Any:
        tried = dict(copies)
        try:
            made = copy.deepcopy(value, tried)
        except Exception:  # whatever a class raises that cannot be copied
            self._pinned[id(value)] = value
            return value
        copies.update(tried)
        return made

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context after which the model is as it was."""
        before = [_stamp(tensor) for tensor, _ in self._tensors]
        try:
            yield
        finally:
            self._put_back_objects()
            with torch.no_grad():
                for (tensor, values), stamp in zip(self._tensors, before):
                    if not (_is_as_stamped(tensor, stamp) and _is_equal(tensor, values)):
                        _put_back(tensor, values)
            for tensor, takes, hooks in self._leaves:
                tensor.grad = None
                tensor.requires_grad_(takes)
                if tensor._backward_hooks is not None:
                    tensor._backward_hooks.clear()
                    tensor._backward_hooks.update(hooks)

    def _put_back_objects(self) -> None:
        attributes = copy.deepcopy(self._attributes, dict(self._pinned))
        for module, registries, own in zip(self._modules, self._registries, attributes):
            now = vars(module)
            for name, value in registries.items():
                if isinstance(value, (dict, set)):
                    now[name].clear()
                    now[name].update(value)
                else:
                    now[name] = value
            for name in [name for name in now if name not in registries and name not in own]:
                del now[name]
            now.update(own)


def tensors_held(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that a module's attributes hold, also in lists, tuples and dicts."""
    for name, value in vars(module).items():
        if name not in _REGISTRIES:
            yield from _tensors_in(value, set())


def _tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, seen)


def _stamp(tensor: torch.Tensor) -> tuple[int, StorageWeakRef | None]:
    """Return what changes when a tensor is written, or gets other memory: a cast there and back frees the first one.

    The address of memory would not do, for what was freed is given out again; that of a storage is not, while a weak
    reference is held.
    """
    return tensor._version, StorageWeakRef(tensor.untyped_storage()) if tensor.layout == torch.strided else None


def _is_as_stamped(tensor: torch.Tensor, stamp: tuple[int, StorageWeakRef | None]) -> bool:
    version, storage = _stamp(tensor)
    was = stamp[1]
    return version == stamp[0] and (was is None or storage is None or storage.cdata == was.cdata)


def _is_equal(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """Say whether no element differs: a write through `tensor.data` counts up no version."""
    return tensor.layout != torch.strided or torch.equal(tensor, values)


def _put_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.shape != values.shape or tensor.dtype != values.dtype:
        tensor.data = values.clone()
    else:
        tensor.copy_(values)
