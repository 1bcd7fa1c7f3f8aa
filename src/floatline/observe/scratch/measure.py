"""Measure on this machine what one op allocates: the scratch of libraries that choose their kernel by processor.

oneDNN, MKL and LAPACK pick a kernel by instruction set, shape and thread count, and each brings its own buffers; no
formula holds for the next processor. But an op that takes milliseconds can simply be run: on twins of its fake inputs
(same shape, dtype and strides, filled with one number), with torch's allocator reporting every allocation in its order.
What was alive at the most beyond what is left at the end is the op's scratch.

Not covered: memory that a library takes by `malloc` behind torch's back, and what worker threads allocate for
themselves; `record_allocations` does not see them either; ops on sparse tensors; ops whose scratch depends on values
(`matrix_exp` of a matrix of small norm takes less than is measured). While a profiler runs nothing can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import ProfilerConfig, ProfilerState
from torch.utils._python_dispatch import _disable_current_modes

from floatline.observe.real import tensors_in


@dataclass(frozen=True)
class Measured:
    """What one run of an op allocated.

    Attributes:
        extra: Most bytes alive at once beyond those alive when it returned.
        kept: Bytes it left alive, its results.
        storages: Bytes of the storage of each result tensor, in order.
    """

    extra: int
    kept: int
    storages: tuple[int, ...]


def measure(func: Any, args: Any, kwargs: Any) -> Measured | None:
    """Run an op once on twins of its inputs and return what it allocated; None where it cannot be run so.

    Args:
        func: An op overload.
        args: Its arguments; fake tensors stand for their shapes, real integers keep their values.
        kwargs: Its keyword arguments.

    >>> import torch
    >>> bits = torch.ones(4, 256, dtype=torch.bool)
    >>> measure(torch.ops.aten.sum.default, (bits,), {})  # it adds up a copy in int64
    Measured(extra=8192, kept=8, storages=(8,))
    """
    if _any_sparse((args, kwargs)) or torch.autograd._profiler_enabled():
        return None
    with _disable_current_modes(), unset_fake_temporarily(), torch.random.fork_rng(devices=()):
        try:
            args, kwargs = _twins(args), _twins(kwargs)
            with _reporting() as events:
                out = func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            return None  # values matter to it
    if _any_sparse(out):
        return None
    live = most = 0
    for nbytes in events:
        live += nbytes
        most = max(most, live)
    return Measured(most - max(live, 0), live, tuple(t.untyped_storage().nbytes() for t in tensors_in(out)))


def _any_sparse(tree: Any) -> bool:
    return any(tensor.layout is not torch.strided for tensor in tensors_in(tree))


class Like:
    """The shape, strides and dtype of a dense tensor that does not exist."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...] | None = None) -> None:
        """Args:
        shape: Its sizes.
        dtype: Its dtype.
        order: Dimensions from the innermost to the outermost; None is contiguous.
        """
        self.shape, self.dtype = shape, dtype
        strides, step = [0] * len(shape), 1
        for dim in order or reversed(range(len(shape))):
            strides[dim], step = step, step * shape[dim]
        self._strides = tuple(strides)

    @classmethod
    def of(cls, tensor: Any, shape: tuple[int, ...]) -> Like:
        """Return a tensor like another, of another shape, its dimensions in memory in the same order."""
        strides = tensor.stride()
        order = sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim))
        return cls(shape, tensor.dtype, tuple(order))

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


@contextmanager
def _reporting() -> Iterator[list[int]]:
    """Yield a list that holds, after the block, the allocator's signed bytes in their order.

    The older profiler is used: it starts in microseconds, keeps order, and prints nothing.
    """
    events: list[int] = []
    plain = torch._C._profiler._ExperimentalConfig()
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, plain))
    records: Any = []
    try:
        yield events
    finally:
        records = _disable_profiler_legacy()
    events += [e.cpu_memory_usage() for thread in records for e in thread if e.kind() == "memory_alloc"]


def _twins(tree: Any) -> Any:
    if isinstance(tree, (torch.Tensor, Like)):
        return _twin(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_twins(item) for item in tree) if type(tree) in (list, tuple) else tuple(map(_twins, tree))
    if isinstance(tree, dict):
        return {key: _twins(value) for key, value in tree.items()}
    return tree


def _twin(tensor: torch.Tensor | Like) -> torch.Tensor:
    """Return a real tensor like a fake one; a copy of a real one, for the op may write into it."""
    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor):
        return tensor.clone()
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return twin.fill_(0.5 if tensor.dtype.is_floating_point else 0)  # never denormal, which would be slow
