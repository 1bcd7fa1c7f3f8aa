"""Gradients that meet: autograd adds the later one into the earlier one, unless someone watches.

Where two paths of the backward join, the engine holds one gradient and gets another. If nothing else holds the first,
it is added to in place; under a dispatch mode, such as the recorder, the engine asks for a new tensor instead. The
recorder tells such a sum from any other by who holds its first operand, and lets the result take over its memory.

How many holders "nothing else" is depends on torch's bindings, so a sum that is known to be of this kind is looked at
once. A formula of a backward that adds two of its own temporaries in C++ cannot be told apart: it is taken for one.

Source: torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace` and `accumulate`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Holders = tuple[int, int, int]
_SUM = torch.ops.aten.add.Tensor


def grows_in_place(func: Any, args: Any, kwargs: Any, alone: Holders) -> bool:
    """Return whether an op, just run under a dispatch mode, would be a sum into its first operand without the mode.

    Args:
        func: The op.
        args: Its arguments.
        kwargs: Its keyword arguments.
        alone: From `engine_alone`.
    """
    return (
        func is _SUM
        and not kwargs
        and torch._C._current_autograd_node() is not None
        and not torch.is_grad_enabled()
        and isinstance(args[1], torch.Tensor)
        and args[0].dim() > 0
        and args[0].shape == args[1].shape
        and args[0].dtype == args[1].dtype
        and args[0].untyped_storage().nbytes() == args[0].numel() * args[0].element_size()  # dense
        and _holders(args[0]) == alone
    )


def _holders(tensor: torch.Tensor) -> Holders:
    """Return how many hold a tensor in C++, in Python, and how many hold its storage."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), sys.getrefcount(tensor), storage  # type: ignore[attr-defined]


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Holders] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.saw(func, args)
        return out

    def saw(self, func: Any, args: Any) -> None:
        if func is _SUM and torch._C._current_autograd_node() is not None:
            self.seen.append(_holders(args[0]))


@functools.cache
def engine_alone() -> Holders:
    """Return the holders of a gradient that only the engine and the running op hold; to be called outside of any op."""
    with _disable_current_modes(), torch.enable_grad(), FakeTensorMode(), _Watch() as watch:
        x = torch.ones(2, requires_grad=True)
        y = x.exp()
        (y.sin() + y.cos()).sum().backward()
    return watch.seen[0]
