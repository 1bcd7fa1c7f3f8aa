"""Run a model's own program without its memory: floats are fake, what steers the program is real.

A FakeTensorMode alone carries most models: each tensor has shape, dtype and strides, and no data. It ends where the
program looks at values: a vision-language model counts its image tokens, a mixture of experts sorts tokens by expert, a
constructor spreads drop-path rates with `linspace(...).tolist()`. So this mode, above the fake one, decides op by op:

    no fake input, small result      runs for real (ids, masks, grids, schedules, small tables)
    anything else                    runs on fake tensors; real inputs are turned into fake ones
    boolean mask as an index         a real mask becomes integer indices first, so that the result has a known size
    integers made of fake floats     (top-k, argmax, sort) become real ones that are spread evenly: each expert gets as
                                     many tokens as the next
    a fake value that is read        gets a nominal answer: 1.0, and for a comparison what it would be for ordinary finite
                                     numbers. Every such answer is noted in `assumptions`.

Not covered: shapes that depend on fake floats through other ops than those (`unique`, custom ops without a fake
kernel): one clear error that names the op and the line.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from floatline.errors import FloatlineError, ModelError

aten = torch.ops.aten
REAL_BYTES = 2**26
"""Largest integer or boolean result that is computed for real."""
REAL_FLOATS = 2**16
"""Most elements of a float result that is computed for real."""
_VALUES_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)
_PLAIN = frozenset({torch.Tensor, nn.Parameter, FakeTensor})
_NOMINAL = "_floatline_nominal"
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts; faster than pytree, and an op's arguments hold no more."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


class Faking(TorchDispatchMode):
    """The mode. Use it inside of `with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode`.

    Args:
        fake_mode: The mode below this one.

    Attributes:
        assumptions: What the program asked of values that are not known, and what it was told; each once.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.assumptions: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _PLAIN and is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # shards and low-bit state come back as ops on the tensors that they are made of
        special = _SPECIAL.get(func)
        out = special(self, func, args, kwargs) if special else self.run(func, args, kwargs)
        self.saw(func, args, kwargs, out)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Called after each op; for observers."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on fake tensors, or for real where that is small and possible."""
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            return self.run_fake(func, args, kwargs)
        if inputs and not any(tensor.numel() for tensor in inputs if tensor.numel() > 256):
            return really(func, args, kwargs)  # nothing small grows large but by a factory
        return self._run_by_size(func, args, kwargs)

    def _run_by_size(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Ask the fake kernel how large the result will be, then run for real or keep what it gave."""
        if func._schema.is_mutable:
            return really(func, args, kwargs)
        try:
            guess = func(*args, **kwargs)
        except (*_VALUES_UNKNOWN, UnsupportedOperatorException):
            return really(func, args, kwargs)
        if all(_is_small(tensor) for tensor in tensors_in(guess)):
            return really(func, args, kwargs)
        return guess

    def run_fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op on fake tensors.

        Raises:
            ModelError: Its result depends on values, or it has no fake kernel.
        """
        try:
            return func(*args, **kwargs)
        except _VALUES_UNKNOWN:
            raise ModelError(
                f"{func} makes a result whose shape depends on values that are not known before training{_where() or ''}",
                hint="plan a variant of the model whose shapes are fixed, or give that tensor as an integer input",
            ) from None
        except UnsupportedOperatorException:
            raise ModelError(
                f"{func} has no fake kernel, so its results cannot be predicted{_where() or ''}",
                hint=f"register one: @torch.library.register_fake({func.name()!r})",
            ) from None

    def assume(self, text: str) -> None:
        """Note an answer that was given without knowing."""
        where = _where()
        if where is not None:
            self.assumptions[text + where] = None

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor as a fake one, the same one each time."""
        if isinstance(tensor, FakeTensor):
            return tensor
        return self.fake_mode.from_tensor(tensor, static_shapes=True)


def really(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op for real, below the fake mode."""
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _is_small(tensor: torch.Tensor) -> bool:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.numel() <= REAL_FLOATS
    return tensor.numel() * tensor.element_size() <= REAL_BYTES


def _where() -> str | None:
    """Return the line of the program that runs now, as " (file.py:12)"; None when it is one of Floatline's own."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and file != __file__:
            return None
        if not file.startswith((_TORCH, _OURS, "<")):
            return f" ({'/'.join(file.split('/')[-2:])}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


# What looks at values


def _item(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not isinstance(tensor, FakeTensor):
        return really(func, args, kwargs)
    if tensor.dtype == torch.bool:
        answer: Any = getattr(tensor, _NOMINAL, False)
    else:
        answer = 1.0 if tensor.is_floating_point() else 1
        mode.assume(f"a value that is read was taken to be {answer}")
    return answer


def _equal(mode: Faking, func: Any, args: Any, kwargs: Any) -> bool:
    if any(isinstance(tensor, FakeTensor) for tensor in args):
        return args[0] is args[1]
    return bool(really(func, args, kwargs))


def _truth(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """A comparison, or logic on one: the fake result remembers what it would be for ordinary numbers, here 1.0."""
    out = mode.run(func, args, kwargs)
    if isinstance(out, FakeTensor) and out.dtype == torch.bool:
        try:
            with unset_fake_temporarily():
                scalars = [_ordinary(value) for value in args]
                nominal = bool(func(*scalars, **{key: value for key, value in kwargs.items() if key != "dtype"}))
        except (RuntimeError, TypeError, IndexError):
            nominal = False
        setattr(out, _NOMINAL, nominal)
    return out


def _ordinary(value: Any) -> Any:
    """Return a number that stands for a tensor: itself where it is one real number, the nominal truth, or 1."""
    if not isinstance(value, torch.Tensor):
        return [] if isinstance(value, list) else value  # a list of dimensions to reduce
    if not isinstance(value, FakeTensor) and value.numel() == 1:
        return value.reshape(())
    return (
        torch.tensor(getattr(value, _NOMINAL, False))
        if value.dtype == torch.bool
        else torch.ones((), dtype=value.dtype)
    )


def _nonzero(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    mask = args[0]
    if not isinstance(mask, FakeTensor):
        return really(func, args, kwargs)
    with unset_fake_temporarily():
        count = max(1, mask.numel() // 2)
        mode.assume(f"half of a mask of {tuple(mask.shape)} was taken to be true")
        flat = torch.arange(count) * 2 if mask.numel() > 1 else torch.zeros(1, dtype=torch.long)
        return torch.stack(torch.unravel_index(flat, mask.shape), dim=1) if mask.dim() else flat[:, None][:, :0]


def _by_integers(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing: masks are replaced by the integers that they stand for."""
    indices = args[1]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        integers: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                integers.append(index)
            else:
                found = _nonzero(mode, aten.nonzero.default, (index,), {})
                integers += really(torch.unbind, (found, 1), {})
        args = (args[0], integers, *args[2:])
    return mode.run(func, args, kwargs)


def _masked_select(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    if not any(isinstance(tensor, FakeTensor) for tensor in args):
        return really(func, args, kwargs)
    tensor, mask = torch.broadcast_tensors(args[0], args[1])
    return _by_integers(mode, aten.index.Tensor, (tensor, [mask]), {})


def _repeat(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """`repeat_interleave` with real counts: its length is their sum."""
    if len(args) > 1 and isinstance(args[0], FakeTensor) and not isinstance(args[1], FakeTensor):
        kwargs = {**kwargs, "output_size": int(really(aten.sum.default, (args[1],), {}))}
    return mode.run(func, args, kwargs)


def _chosen(dimension: int, count: Callable[[Any, Any], int]) -> Callable[..., Any]:
    """A maker of handlers for ops that return indices along a dimension: those become real and evenly spread."""

    def handler(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
        out = mode.run(func, args, kwargs)
        indices = out if isinstance(out, torch.Tensor) else out[-1]
        if not isinstance(indices, FakeTensor) or indices.numel() * 8 > REAL_BYTES:
            return out
        length = _length(args, kwargs, dimension, count)
        with unset_fake_temporarily():
            real = (torch.arange(indices.numel()) % max(1, length)).reshape(indices.shape)
        return real if isinstance(out, torch.Tensor) else (*out[:-1], real)

    return handler


def _length(args: Any, kwargs: Any, position: int, default: Callable[[Any, Any], int]) -> int:
    tensor = args[0]
    dim = kwargs.get("dim", args[position] if len(args) > position else default(args, kwargs))
    if dim is None or not tensor.dim():
        return int(tensor.numel())
    return int(tensor.shape[dim])


def _grouped_mm(mode: Faking, func: Any, args: Any, kwargs: Any) -> Any:
    """Its fake kernel accepts bf16 on a GPU only; the shape of the result is simple."""
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args)):
        return really(func, args, kwargs)
    left, right = mode.fake(args[0]), args[1]
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    groups = (
        [] if left.dim() == 2 and right.dim() == 3 else [offsets.shape[0]] if left.dim() == right.dim() == 2 else []
    )
    if left.dim() == right.dim() == 3:
        groups = [left.shape[0]]
    return left.new_empty(*groups, left.shape[-2], right.shape[-1], dtype=kwargs.get("out_dtype"))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _item,
    aten.equal.default: _equal,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _by_integers,
    aten.index_put.default: _by_integers,
    aten.index_put_.default: _by_integers,
    aten._index_put_impl_.default: _by_integers,
    aten.masked_select.default: _masked_select,
    aten.repeat_interleave.Tensor: _repeat,
    aten.topk.default: _chosen(2, lambda args, kwargs: -1),
    aten.sort.default: _chosen(1, lambda args, kwargs: -1),
    aten.sort.stable: _chosen(2, lambda args, kwargs: -1),
    aten.argsort.default: _chosen(1, lambda args, kwargs: -1),
    aten.argsort.stable: _chosen(2, lambda args, kwargs: -1),
    aten.argmax.default: _chosen(1, lambda args, kwargs: None),  # type: ignore[arg-type,return-value]
    aten.argmin.default: _chosen(1, lambda args, kwargs: None),  # type: ignore[arg-type,return-value]
    aten.multinomial.default: _chosen(9, lambda args, kwargs: -1),
}
_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.isnan, aten.isinf, aten.logical_and,
                aten.logical_or, aten.logical_not, aten.bitwise_and, aten.bitwise_or, aten.bitwise_not, aten.mul,
                aten.any, aten.all)  # fmt: skip
_SPECIAL |= {getattr(packet, name): _truth for packet in _COMPARISONS for name in packet.overloads()}
if hasattr(aten, "_grouped_mm"):
    _SPECIAL[aten._grouped_mm.default] = _grouped_mm


# Models and batches


@contextmanager
def faking(make: Callable[[FakeTensorMode], Faking] = Faking) -> Iterator[Faking]:
    """Enter the fake mode and the mode above it; random numbers of the process are as before afterwards."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
        with make(fake_mode) as mode:
            yield mode


def fake_model(model: nn.Module | Callable[[], nn.Module], mode: Faking) -> nn.Module:
    """Return a model with fake parameters; one that exists already is copied without its data.

    Raises:
        ModelError: The factory fails on fake tensors.
    """
    if isinstance(model, nn.Module):
        with FakeCopyMode(mode.fake_mode):
            made = copy.deepcopy(model)
        _restore_small(model, made)
    else:
        made = _built(model)
    fake_parameters(made, mode)
    return made


def _built(factory: Callable[[], nn.Module]) -> nn.Module:
    try:
        return factory()
    except (FloatlineError, TypeError, NameError, AttributeError):
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be built without its memory: {str(error).splitlines()[0]}",
            hint="build it on the CPU, from its config, without loading weights or moving it to a GPU",
        ) from error


def _restore_small(model: nn.Module, made: nn.Module) -> None:
    """Give small integer and boolean buffers of the copy their values back: programs branch on them."""
    for module, other in zip(model.modules(), made.modules(), strict=True):
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_floating_point() and _is_small(buffer):
                with unset_fake_temporarily():
                    other._buffers[name] = buffer.detach().clone()


def fake_parameters(model: nn.Module, mode: Faking) -> None:
    """Turn the parameters that were small enough to be real, and large float buffers, into fake ones, in place."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                if id(parameter) not in known:
                    fake = nn.Parameter(mode.fake(parameter.detach()), requires_grad=parameter.requires_grad)
                    fake.__dict__.update(parameter.__dict__)
                    known[id(parameter)] = fake
                module._parameters[name] = known[id(parameter)]


def fake_batch(batch: Any, mode: Faking) -> Any:
    """Return a batch with fake floats; integers and booleans stay real, the program may look at them."""
    if isinstance(batch, torch.Tensor):
        return mode.fake(batch) if batch.is_floating_point() or not _is_small(batch) else batch
    if isinstance(batch, dict):
        values = {key: fake_batch(value, mode) for key, value in batch.items()}
        return type(batch)(values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(fake_batch(value, mode) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(fake_batch(value, mode) for value in batch)
    return batch
