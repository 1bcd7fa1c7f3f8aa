"""Put kernels of our own under operators of torch, and take them off again.

Two keys of the dispatcher are used. `AutocastCPU` runs where autocast is on, above autograd: what a kernel there does
with its inputs is recorded for backward. `CompositeImplicitAutograd` is the body of operators that are made of others;
autograd records what the body calls, so a body that calls another kernel saves that kernel's tensors.

Contexts nest, and the last one that is still open counts. The dispatcher itself does not give an earlier Python
kernel back when a later one is removed (seen on torch 2.13: the later one stays), so each operator gets one kernel of
ours, which calls the last of a list; when the list is empty, the kernel is removed and torch's own is back.

Kernels belong to the process, not to a thread: while a context is open, every thread computes by its rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.library import fallthrough_kernel

Kernel = Callable[..., Any]


class _Place:
    """One operator's kernel for one dispatch key: ours, while any context has put one there."""

    def __init__(self, dispatch_key: str, name: str) -> None:
        self._key, self._name = dispatch_key, name
        self._kernels: list[Kernel] = []
        self._library: Any = None
        self.own: Kernel | None = None

    def put(self, kernel: Kernel) -> None:
        self._kernels.append(kernel)
        if self._library is None:
            self.own = _body_of(self._name) if self._key == "CompositeImplicitAutograd" else None
            self._library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch tells once that a kernel is replaced: that is the purpose
                ours = fallthrough_kernel if kernel is fallthrough_kernel else self._call
                self._library.impl(self._name, ours, self._key)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self._kernels[-1](*args, **kwargs)

    def take(self, kernel: Kernel) -> None:
        self._kernels.remove(kernel)
        if not self._kernels:
            self._library._destroy()
            self._library = self.own = None


_PLACES: dict[tuple[str, str], _Place] = {}


@contextmanager
def kernels_on(dispatch_key: str, table: Mapping[str, Kernel]) -> Iterator[None]:
    """Have operators of the aten namespace run `table`'s kernels for one dispatch key while the context is open.

    Args:
        dispatch_key: "AutocastCPU" or "CompositeImplicitAutograd".
        table: Operator with overload ("softmax.int", "exp") -> kernel, called with the operator's arguments;
            `torch.library.fallthrough_kernel` makes the key do nothing.
    """
    put: list[tuple[_Place, Kernel]] = []
    try:
        for name, kernel in table.items():
            place = _PLACES.setdefault((dispatch_key, name), _Place(dispatch_key, name))
            place.put(kernel)
            put.append((place, kernel))
        yield
    finally:
        for place, kernel in put:
            place.take(kernel)


def operator(name: str) -> Any:
    """Return aten's operator of that name, e.g. `torch.ops.aten.softmax.int` for "softmax.int"."""
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def exists(name: str) -> bool:
    """Say whether this torch has the operator."""
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return packet is not None and (overload or "default") in packet.overloads()


def own_body(name: str) -> Kernel:
    """Return torch's own body of a composite operator, for tensors that a rule does not concern."""
    place = _PLACES.get(("CompositeImplicitAutograd", name))
    return place.own if place is not None and place.own is not None else _body_of(name)


def _body_of(name: str) -> Kernel:
    kernel = torch.library.get_kernel(operator(name), "AutogradCPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)

    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel.call_boxed(keys, *args, **kwargs)

    return call


def is_fake_cpu(*tensors: Any) -> bool:
    """Say whether all of these are fake tensors that stand for tensors of the target, i.e. on the CPU."""
    return all(isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cpu" for tensor in tensors)
