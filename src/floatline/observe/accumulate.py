"""Gradients that meet: autograd adds the later one into the earlier one, unless someone watches.

Where two paths of the backward join, the engine holds one gradient and gets another. If nothing else holds the first,
it is added to in place; under a dispatch mode, such as the recorder, the engine asks for a new tensor instead. The
recorder tells such a sum from any other by who holds its first operand, and lets the result take over its memory.

The backwards of indexing, `gather`, `index_select`, `max(dim)` and `topk` do the same: they write the
gradient into a tensor of zeros, and under a mode they ask for a new tensor beside the zeros.

How many holders "nothing else" is depends on torch's bindings, so for each op one call that is known to be of this
kind is looked at once. A formula of a backward that adds two of its own temporaries in C++ cannot be told apart: it is
taken for one.

Source: torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace` and `accumulate`; `areAnyTensorSubclassLike` in
torch/csrc/autograd/FunctionsManual.cpp and in aten/src/ATen/native/TensorAdvancedIndexing.cpp.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
Holders = tuple[int, int, int]
_SUM = aten.add.Tensor
_INTO_ZEROS = (aten.index_put.default, aten.index_add.default, aten.scatter_add.default, aten.scatter.src)


def grows_in_place(func: Any, args: Any, kwargs: Any, alone: Mapping[Any, Holders]) -> bool:
    """Return whether an op, just run under a dispatch mode, would write into its first operand without the mode.

    Args:
        func: The op.
        args: Its arguments.
        kwargs: Its keyword arguments.
        alone: From `engine_alone`.
    """
    return (
        func in alone
        and not kwargs
        and torch._C._current_autograd_node() is not None
        and not torch.is_grad_enabled()
        and args[0].dim() > 0
        and (func is not _SUM or _alike(*args[:2]))
        and args[0].layout is torch.strided
        and args[0].untyped_storage().nbytes() == args[0].numel() * args[0].element_size()  # dense
        and _holders(args[0]) == alone[func]
    )


def _alike(one: Any, other: Any) -> bool:
    return isinstance(other, torch.Tensor) and one.shape == other.shape and one.dtype == other.dtype


def _holders(tensor: torch.Tensor) -> Holders:
    """Return how many hold a tensor in C++, in Python, and how many hold its storage."""
    storage = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return tensor._use_count(), sys.getrefcount(tensor), storage  # type: ignore[attr-defined]


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, Holders] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.saw(func, args)
        return out

    def saw(self, func: Any, args: Any) -> None:
        if (func is _SUM or func in _INTO_ZEROS) and torch._C._current_autograd_node() is not None:
            self.seen.setdefault(func, _holders(args[0]))


@functools.cache
def engine_alone() -> Mapping[Any, Holders]:
    """Return, by op, the holders of a tensor that only a backward in C++ and the running op hold.

    To be called outside of any op.
    """
    with _disable_current_modes(), torch.enable_grad(), FakeTensorMode(), _Watch() as watch:
        x, where = torch.ones(2, 2, requires_grad=True), torch.zeros(1, dtype=torch.long)
        y = x.exp()
        (y.sin() + y.cos()).sum().backward()
        for taken in (
            x[where],
            x.index_select(0, where),
            x.gather(0, where[:, None]),
            x.max(dim=0).values,
        ):
            taken.sum().backward()
    return watch.seen
