"""One op that has run: its tensors as they were before it wrote, what it wrote, and what it should have given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from floatline.observe.finite.meant import OVERWRITING
from floatline.observe.finite.numbers import Numbers, numbers, storage_of
from floatline.observe.real import tensors_in

_STATISTICS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
"""Ops that write their arguments 3 and 4 without their schema saying so."""
LARGE = 2**24
"""Elements from which an op is not run again in fp64."""


class Given(NamedTuple):
    """A tensor that an op was given.

    Attributes:
        label: Its name in the op's schema.
        before: What it was before the op ran: a copy where the op writes it.
        tensor: The tensor itself.
    """

    label: str
    before: torch.Tensor
    tensor: torch.Tensor


class Opaque:
    """A higher-order operator (cond, flex_attention) in the clothes of an op: it has no schema, and takes functions.

    Args:
        func: The operator.
    """

    is_view = False
    tags = (torch.Tag.nondeterministic_seeded,)  # not to be run again

    def __init__(self, func: Any) -> None:
        self._func = func
        self._schema = SimpleNamespace(name=func.name(), arguments=(), is_mutable=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._func(*args, **kwargs)


@dataclass(frozen=True)
class Ran:
    """One op that has run.

    Attributes:
        func: The op.
        name: Its aten name.
        args: As it was given them.
        kwargs: Likewise.
        inputs: The tensors that it reads.
    """

    func: Any
    name: str
    args: Any
    kwargs: Any
    inputs: list[Given]

    @cached_property
    def scalars(self) -> dict[str, Any]:
        """Its numbers, booleans and texts by the names of its schema."""
        schema = self.func._schema.arguments
        named = {argument.name: self.args[i] for i, argument in enumerate(schema) if i < len(self.args)}
        named.update(self.kwargs)
        return {name: value for name, value in named.items() if _is_plain(value)}

    def results(self, out: Any) -> list[torch.Tensor]:
        """Return what it gave and what it wrote, each memory once."""
        return _distinct([*tensors_in(out), *written(self.func, self.args, self.kwargs)])

    def exact(self) -> tuple[Numbers, ...] | None:
        """Return its result on the same inputs in fp64, None where it draws random numbers or will not run so.

        Large half-precision inputs are widened to fp32 only, which shows as well whether the format is to blame.
        """
        dtype = self._wider()
        if torch.Tag.nondeterministic_seeded in self.func.tags or dtype is None:
            return None
        kept = {id(given.tensor): given.before for given in self.inputs}

        def widen(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                value = kept.get(id(value), value).detach()
                return value.to(dtype, copy=True) if value.is_floating_point() else value
            if isinstance(value, torch.dtype):
                return dtype if value.is_floating_point else value
            return type(value)(map(widen, value)) if isinstance(value, (list, tuple)) else value

        try:
            positions = [widen(value) for value in self.args]
            result = self.func(*positions, **{key: widen(value) for key, value in self.kwargs.items()})
        except Exception:  # no kernel for it, or no memory: nothing can be said
            return None
        wanted = list(tensors_in(result)) or list(tensors_in(positions[:1]))
        wanted += written(self.func, positions, {}) if self.name in _STATISTICS else []
        return tuple(numbers(tensor, "result") for tensor in wanted if tensor.is_floating_point())

    def _wider(self) -> torch.dtype | None:
        """Return the format to run it again in, None where that would take too much."""
        floats = [given.before for given in self.inputs if given.before.is_floating_point()]
        if not floats:
            return None
        if sum(tensor.numel() for tensor in floats) <= LARGE:
            return torch.float64
        return torch.float32 if all(tensor.element_size() < 4 for tensor in floats) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, (int, float)) for item in value)
    return isinstance(value, (bool, int, float, complex, str))


def inputs_of(func: Any, name: str, args: Any, kwargs: Any) -> list[Given]:
    """Return the tensors that an op reads, with the names of its schema; those that it writes over are copied."""
    if isinstance(func, Opaque):
        return [Given(f"args[{place}]", tensor, tensor) for place, tensor in enumerate(tensors_in([args, kwargs]))]
    named = _named(func, args, kwargs, first=name not in OVERWRITING)
    if not func._schema.is_mutable and name not in _STATISTICS:
        return [Given(label, tensor, tensor) for label, tensor in named]
    over = {id(tensor) for tensor in written(func, args, kwargs)}
    return [Given(label, t.detach().clone() if id(t) in over else t, t) for label, t in named]


def _named(func: Any, args: Any, kwargs: Any, first: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.is_out or (not first and place == 0):
            continue
        if isinstance(value, torch.Tensor):
            yield argument.name, value
        elif isinstance(value, (list, tuple)):
            for number, tensor in enumerate(tensors_in(value)):
                yield f"{argument.name}[{number}]", tensor


def written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that an op writes into."""
    if func._schema.name.split("::")[-1] in _STATISTICS:
        return [tensor for tensor in args[3:5] if isinstance(tensor, torch.Tensor)]
    if not func._schema.is_mutable:
        return []
    taken = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return list(tensors_in(taken))


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors without those that are the same memory: an in-place op returns what it wrote."""
    if len(tensors) < 2:
        return tensors
    return list({(key, t.storage_offset()) if (key := storage_of(t)) is not None else id(t): t
                 for t in tensors}.values())  # fmt: skip
