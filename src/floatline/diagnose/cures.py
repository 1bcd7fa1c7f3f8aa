"""Try the remedy: run the step again with it, and see whether loss and gradients are finite.

    island     the module in fp32, then the module around it
    edge       the op's input moved off the edge of its domain, before the op: the double `where`
    row        scores of fully masked rows set to 0 before the softmax
    attention  another attention kernel (the math one)
    sample     the bad samples replaced by a good one

What changes an op meets it again by the number of the call of torch's interface that made it, so the step must do the
same each time. Whether it does is checked: without the remedy the replay must fail as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from floatline.diagnose.causes import Cause
from floatline.diagnose.finding import Counterfactual
from floatline.observe.finite import Origin, bad_rows
from floatline.patch import ForwardPatch
from floatline.precision.islands import make_island

Replay = Callable[[Any], str]
"""(context) -> what was not finite in the step, its forward and backward run inside of the context; "" for nothing."""


def try_cures(cause: Cause, origin: Origin, model: nn.Module, replay: Replay) -> Counterfactual:
    """Return what became of the step with the first remedy that cured it, or with the last that did not.

    Args:
        cause: Its cures are tried in order.
        origin: What is to be cured.
        model: The step's.
        replay: Runs the step again.
    """
    if not cause.cures:
        return Counterfactual(remedy=cause.remedy, cured=None, why=cause.untried)
    tried: Counterfactual | None = None
    for kind in cause.cures:
        for remedy, module, context in _contexts(kind, origin, model):
            tried = _tried(kind, remedy, module, context, replay)
            if tried.cured:
                return tried
    return tried or Counterfactual(
        remedy=cause.remedy, cured=None, why=cause.untried or "it cannot be tried automatically here"
    )


def _tried(kind: str, remedy: str, module: str, context: Any, replay: Replay) -> Counterfactual:
    try:
        left = replay(context)
    except Exception as error:  # the remedy does not fit the model; the finding stands all the same
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Counterfactual(remedy=remedy, cured=None, kind=kind, module=module, why=why)
    if not left and not replay(nullcontext()):
        return Counterfactual(
            remedy=remedy, cured=None, kind=kind, module=module,
            why="the step is finite without it as well: it does not do the same each time"
        )  # fmt: skip
    return Counterfactual(remedy=remedy, cured=not left, kind=kind, module=module, why=left)


def _contexts(kind: str, origin: Origin, model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    if kind == "island":
        for name in _upward(origin.spot.module):
            yield f"{name} computed in fp32", name, island(model, name)
    elif kind == "attention":
        yield "the math attention kernel", "", sdpa_kernel(SDPBackend.MATH)
    elif kind == "edge" and origin.spot.call > 0:
        yield (
            f"the input of {origin.spot.op} moved off the edge where it lies on it",
            "",
            _Altered(origin.spot.call, _off_edge),
        )
    elif kind == "row" and origin.spot.call > 0:
        yield "scores of fully masked rows set to 0 before the softmax", "", _Altered(origin.spot.call, _unmasked)


def _upward(module: str) -> list[str]:
    """Return a module's name and those of the modules around it, two at most."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), max(0, len(parts) - 2), -1)] if module else []


@contextmanager
def island(model: nn.Module, name: str) -> Iterator[None]:
    """Compute one module in fp32 inside: its weights, its inputs, and no autocast.

    Args:
        model: The whole model.
        name: Dotted name of the module.
    """
    module = dict(model.named_modules())[name]
    halves = [p for p in [*module.parameters(), *module.buffers()] if p.dtype in (torch.float16, torch.bfloat16)]
    outer = halves[0].dtype if halves else None
    before = [(tensor, tensor.data) for tensor in halves]
    device = next((p.device.type for p in module.parameters()), "cpu")
    patch: ForwardPatch | None = None
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        patch = make_island(module, torch.float32, device_type=device, outer=outer, by_autocast=False)
        yield
    finally:
        if patch is not None:
            patch.undo()
        for tensor, data in before:
            tensor.grad = None
            tensor.data = data


class _Altered(TorchFunctionMode):
    """Change the tensors of one call of torch's interface before it runs.

    Args:
        call: Its number, counted as the watch counted.
        change: (function, tensor) -> the tensor to use instead.
    """

    def __init__(self, call: int, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        self.call = call
        self.change = change
        self._number = 0

    def __enter__(self) -> Any:
        self._number = 0
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._number += 1
        kwargs = kwargs or {}
        if self._number == self.call:
            args = _mapped(args, lambda tensor: self.change(func, tensor))
            kwargs = _mapped(kwargs, lambda tensor: self.change(func, tensor))
        return func(*args, **kwargs)


def _mapped(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return function(tree) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(item, function) for item in tree)
    return tree


_INSIDE = 0.5
"""A number that lies in the domain of every function that has an edge here."""


def _off_edge(func: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose values on or beyond an edge are replaced by a number that is inside of all domains."""
    name = getattr(func, "__name__", "")
    values = tensor.detach()
    if any(part in name for part in ("acos", "asin", "atanh", "erfinv", "arccos", "arcsin")):
        edge = values.abs() >= 1
    elif "exp" in name or "sinh" in name or "cosh" in name:
        edge = values > torch.log(torch.tensor(torch.finfo(values.dtype).max)).item() / 2
    elif "logit" in name:
        edge = (values <= 0) | (values >= 1)
    elif "log1p" in name:
        edge = values <= -1
    elif any(part in name for part in ("norm", "cdist", "std", "atan2")) or "div" in name:
        edge = values == 0
    else:
        edge = values <= 0
    return torch.where(edge | ~torch.isfinite(values), torch.full_like(values, _INSIDE), tensor)


def _unmasked(func: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Return scores in which rows that are -inf throughout are 0."""
    dead = (tensor.detach() == float("-inf")).all(dim=-1, keepdim=True)
    return torch.where(dead, torch.zeros_like(tensor), tensor)


@contextmanager
def samples_replaced(tensors: list[torch.Tensor], rows: tuple[int, ...]) -> Iterator[bool]:
    """Overwrite the bad samples of a batch by a good one, inside. Yields whether there is a good one."""
    good = _good_row(tensors, rows)
    before = [(tensor, tensor.detach().clone()) for tensor in tensors] if good is not None else []
    try:
        with torch.no_grad():
            for tensor, _ in before:
                for row in rows:
                    tensor[row] = tensor[good]
        yield good is not None
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _good_row(tensors: list[torch.Tensor], rows: tuple[int, ...]) -> int | None:
    size = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    bad = {*rows, *(row for tensor in tensors for row in bad_rows(tensor))}
    return next((row for row in range(size) if row not in bad), None)
