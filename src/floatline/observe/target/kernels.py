"""Put kernels of our own under operators of torch, and take them off again.

The dispatcher keeps, for each operator and dispatch key, a pile of kernels of which the last one registered counts. A
`torch.library.Library` puts kernels on top, and destroying it removes exactly those, so that contexts nest, and what
was there before comes back (an exception or an inner context that ends later changes nothing about it).

Two keys are used. `AutocastCPU` runs where autocast is on, above autograd: what a kernel there does with its inputs is
recorded for backward. `CompositeImplicitAutograd` is the body of operators that are made of others; autograd records
what the body calls, so a body that calls another kernel saves that kernel's tensors.

Kernels belong to the process, not to a thread: while a context is open, every thread computes by its rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses import FakeTensor

Kernel = Callable[..., Any]


@contextmanager
def kernels_on(dispatch_key: str, table: Mapping[str, Kernel]) -> Iterator[None]:
    """Have operators of the aten namespace run `table`'s kernels for one dispatch key while the context is open.

    Args:
        dispatch_key: "AutocastCPU" or "CompositeImplicitAutograd".
        table: Operator with overload ("softmax.int", "exp") -> kernel, called with the operator's arguments;
            `torch.library.fallthrough_kernel` makes the key do nothing.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells once that a kernel is replaced: that is what we are here for
            for name, kernel in table.items():
                library.impl(name, kernel, dispatch_key)
        yield
    finally:
        library._destroy()


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
    """Return the operator's body as it is now, for tensors that a rule does not concern.

    Taken before the rule's kernel is put on, or it would return that one.
    """
    kernel = torch.library.get_kernel(operator(name), "AutogradCPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)

    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel.call_boxed(keys, *args, **kwargs)

    return call


def is_fake_cpu(*tensors: Any) -> bool:
    """Say whether all of these are fake tensors that stand for tensors of the target, i.e. on the CPU."""
    return all(isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cpu" for tensor in tensors)
