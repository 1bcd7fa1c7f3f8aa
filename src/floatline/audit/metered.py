"""A step with a meter on it, and what crosses the borders of its modules.

Ops say what a module loses by itself. At its borders it shows what has come together: whether its inputs arrive in a
half format, and how far the gradients that it passes on to them are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from floatline.observe.error import ErrorMeter, Reading
from floatline.observe.error.measures import HALVES
from floatline.observe.finite import plain_name
from floatline.observe.real import tensors_in


@dataclass(kw_only=True)
class Borders:
    """What was seen at the borders of modules.

    Attributes:
        half_inputs: Modules that were given floating tensors of a half format.
        input_gradients: Module -> largest relative error of a gradient of its inputs.
    """

    half_inputs: set[str] = field(default_factory=set)
    input_gradients: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metered:
    """A step with a meter on it.

    Attributes:
        readings: Every op that has to do with the lower format.
        gradient_errors: Parameter -> relative error that its gradient has come to.
        stalled_buffers: Running average -> share of it that should move and does not.
        unmeasured: Ops without an exact result, and how often they ran.
        borders: What was seen at the borders of modules.
    """

    readings: tuple[Reading, ...]
    gradient_errors: Mapping[str, float]
    stalled_buffers: Mapping[str, float]
    unmeasured: Mapping[str, int]
    borders: Borders


@contextmanager
def borders_watched(model: nn.Module, meter: ErrorMeter) -> Iterator[Borders]:
    """Look at the inputs of all modules inside, and at their gradients."""
    seen = Borders()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = _Border(plain_name(name), seen, meter)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


class _Border:
    """The hook of one module: notes its inputs, and asks for their gradients.

    Inside of torch.func a tensor is a wrapper without a storage, so nobody knows its exact value: none is asked for.
    """

    def __init__(self, name: str, seen: Borders, meter: ErrorMeter) -> None:
        self._name = name
        self._seen = seen
        self._meter = meter

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in([args, kwargs]):
            if tensor.is_floating_point():
                if tensor.dtype in HALVES:
                    self._seen.half_inputs.add(self._name)
                if tensor.requires_grad and torch.is_grad_enabled() and not is_functorch_wrapped_tensor(tensor):
                    tensor.register_hook(self._gradient)

    def _gradient(self, gradient: torch.Tensor) -> None:
        with _disable_current_modes():  # looking is no part of the step
            if not self._meter.shadows.is_noise(gradient):
                error = self._meter.reached(gradient)
                self._seen.input_gradients[self._name] = max(error, self._seen.input_gradients.get(self._name, 0.0))


@contextmanager
def inputs_rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hand a module its floating inputs in a half format, as its neighbours would if they were lowered too."""

    def cast(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _cast(args, dtype), _cast(kwargs, dtype)

    hook = module.register_forward_pre_hook(cast, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.dtype == torch.float32 else tree
    if isinstance(tree, dict):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    return type(tree)(_cast(value, dtype) for value in tree) if type(tree) in (list, tuple) else tree
