"""Change what an op is given, from outside of the program: the double `where`, fp32 for one op, unmasked rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from floatline.observe.finite import Spot
from floatline.observe.finite.places import nearest_line
from floatline.observe.real import tensors_in

_INSIDE = 0.5
"""A number that lies in the domain of every function that has an edge here."""
_SOFTMAX = frozenset({"_softmax", "_log_softmax", "_safe_softmax"})


class Altered(TorchFunctionMode):
    """Changes the tensors that the function of a spot is given, each time its line is run.

    Args:
        spot: Whose function, and on which line.
        change: (function's name, tensor) -> the tensor to use instead, the same object where nothing is to be changed.
        by_autocast: Leave autocast on for the call.

    Attributes:
        changed: Whether any tensor was changed.
    """

    def __init__(
        self, spot: Spot, change: Callable[[str, torch.Tensor], torch.Tensor], *, by_autocast: bool = True
    ) -> None:
        self.spot = spot
        self.change = change
        self.by_autocast = by_autocast
        self.changed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name != self.spot.function or nearest_line() != self.spot.line:
            return func(*args, **kwargs)
        device = next((t.device.type for t in tensors_in([args, kwargs])), "cpu")
        with nullcontext() if self.by_autocast else torch.autocast(device, enabled=False):
            return func(*self._mapped(name, args), **self._mapped(name, kwargs))

    def _mapped(self, name: str, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            if not tree.is_floating_point():
                return tree
            other = self.change(name, tree)
            self.changed |= other is not tree
            return other
        if isinstance(tree, dict):
            return {key: self._mapped(name, value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._mapped(name, item) for item in tree)
        return tree


def widened(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in fp32 at least."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def off_edge(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose values on or beyond an edge are replaced by a number that is inside of all domains."""
    values = tensor.detach()
    edge = _on_edge(name.removeprefix("special_").strip("_"), values) | ~torch.isfinite(values)
    return torch.where(edge, torch.full_like(values, _INSIDE), tensor) if bool(edge.any()) else tensor


def _on_edge(name: str, values: torch.Tensor) -> torch.Tensor:
    if name in ("acos", "asin", "atanh", "erfinv", "arccos", "arcsin", "arctanh"):
        return values.abs() >= 1
    if name in ("acosh", "arccosh"):
        return values <= 1
    if name in ("exp", "exp2", "expm1", "sinh", "cosh"):
        return values > math.log(torch.finfo(values.dtype).max) / 2
    if name in ("logit", "ndtri"):
        return (values <= 0) | (values >= 1)
    if name in ("log1p", "xlog1py"):
        return values <= -1
    if name in (
        "log",
        "log2",
        "log10",
        "sqrt",
        "rsqrt",
        "pow",
        "rpow",
        "float_power",
        "digamma",
        "lgamma",
        "xlogy",
        "entr",
    ):
        return values <= 0
    if "div" in name or name in ("norm", "vector_norm", "reciprocal", "atan2", "arctan2", "hypot", "fmod", "remainder",
                                 "abs", "sgn", "normalize", "addcdiv", "mod"):  # fmt: skip
        return values == 0
    return torch.zeros_like(values, dtype=torch.bool)


class RowsUnmasked(TorchDispatchMode):
    """Sets the scores of rows that are -inf throughout to 0 before each softmax, inside of library modules as well.

    Attributes:
        changed: Whether there was such a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[-1] in _SOFTMAX:
            dead = (args[0] == float("-inf")).all(dim=args[1], keepdim=True)
            if bool(dead.any()):
                self.changed = True
                args = (torch.where(dead, torch.zeros_like(args[0]), args[0]), *args[1:])
        return func(*args, **(kwargs or {}))
