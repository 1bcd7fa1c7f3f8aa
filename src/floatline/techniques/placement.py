"""Where tensors lie when a step runs on behalf of a GPU that is not there.

A planner runs the step on CPU tensors, most of them fake, under a GPU's rules, and watches what is allocated. Every
tensor is a CPU tensor then, so a technique that would keep one in host memory has to say so:

    with on_host():                       # what is allocated inside would lie in host memory
        buffer = torch.empty_like(state)
    moved_to_host(shard)                  # this one, wherever it was allocated

What a GPU would compute in one compiled kernel, and is computed operation by operation here, is put in
`within_kernel()`: its intermediates have no memory. Memory that changes without an operation, which no dispatch mode
can see, is told by `resized`. Whoever watches asks `allocates_on_host()` and `allocates_within_kernel()` at each
allocation and hears of the rest through `watching`. Without a watcher nothing happens.

Not covered: streams. Copies that a GPU makes beside the computation are made in line with it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from floatline.hardware import Hardware


class Watcher(Protocol):
    """Who wants to know where memory lies."""

    def moved_to_host(self, tensor: torch.Tensor) -> None:
        """A tensor's storage would lie in host memory from now on."""

    def resized(self, tensor: torch.Tensor) -> None:
        """A tensor's storage has another size than before, without an operation."""


_on_host: ContextVar[bool] = ContextVar("_on_host", default=False)
_within_kernel: ContextVar[bool] = ContextVar("_within_kernel", default=False)
_watcher: ContextVar[Watcher | None] = ContextVar("_watcher", default=None)


def on_host() -> AbstractContextManager[None]:
    """Context whose allocations would lie in host memory.

    >>> with on_host():
    ...     allocates_on_host()
    True
    """
    return _as(_on_host, True)


def allocates_on_host() -> bool:
    """Say whether what is allocated now would lie in host memory."""
    return _on_host.get()


def within_kernel(inside: bool = True) -> AbstractContextManager[None]:
    """Context whose allocations would be values inside of one kernel; False for what leaves it.

    >>> with within_kernel(), within_kernel(False):
    ...     allocates_within_kernel()
    False
    """
    return _as(_within_kernel, inside)


def allocates_within_kernel() -> bool:
    """Say whether what is allocated now would have no memory of its own."""
    return _within_kernel.get()


def watching(watcher: Watcher) -> AbstractContextManager[None]:
    """Context in which `watcher` hears of what no operation shows."""
    return _as(_watcher, watcher)


@contextmanager
def _as(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def moved_to_host(tensor: torch.Tensor) -> None:
    """Tell the watcher that a tensor would lie in host memory."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.moved_to_host(tensor)


def resized(tensor: torch.Tensor) -> None:
    """Tell the watcher that a tensor's storage has changed its size."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.resized(tensor)


def stands_in(model: nn.Module, hardware: Hardware) -> bool:
    """Say whether a model's CPU tensors stand for those of a GPU.

    Args:
        model: Any module.
        hardware: Whose rules apply to it.
    """
    return hardware.kind == "cuda" and all(parameter.device.type == "cpu" for parameter in model.parameters())


def is_fake(tensor: torch.Tensor) -> bool:
    """Say whether a tensor has a shape, a format and a device, but no values.

    >>> is_fake(torch.ones(1))
    False
    """
    return isinstance(tensor, FakeTensor)


@contextmanager
def fakes_change_in_place() -> Iterator[None]:
    """Context in which `Module.to`, `.half()`, `.to_empty()` and so on work on fake parameters.

    torch swaps those for new ones, and fails as soon as a weak reference to one exists; its cache of fake operations
    holds such.
    """
    swap = torch.utils.swap_tensors

    def change(tensor: torch.Tensor, other: torch.Tensor) -> None:
        if is_fake(tensor):
            tensor.data = other.data
        else:
            swap(tensor, other)

    torch.utils.swap_tensors = change
    try:
        yield
    finally:
        torch.utils.swap_tensors = swap


def holds_fakes(model: nn.Module) -> bool:
    """Say whether a model's parameters are fake."""
    return any(is_fake(parameter) for parameter in model.parameters())
