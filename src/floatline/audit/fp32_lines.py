"""Run chosen lines of a program in fp32 and all others in a lower format, from outside of the program.

A line that is chosen gets its half-precision tensors in fp32, makes new tensors in fp32, and runs with autocast off.
What it returns stays fp32 and is remembered as wide. Where everything is cast (mode "true") a line that is not chosen
gets wide tensors in the lower format again: so one fp32 line hands its result to the next one without rounding, as it
does where a person writes `x.float()` at the first of them and `.to(dtype)` after the last.

    y = x * scale          lowered: x is cast to bf16 here
    s = y.cumsum(-1)       chosen: y in fp32, s is fp32 and wide
    t = s[:, -1:]          a view: t is wide too
    return s / t           chosen: in fp32;   not chosen: s and t are rounded to bf16 first

Views are left as they are, and what a line writes in place is copied back into the tensor that it was given.

Not covered: code that hides from `__torch_function__` (TorchScript, extensions that take tensors in C++), and a line
that casts to a half format by name: it still does. Two statements in one line are one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from floatline.observe.finite.places import places
from floatline.observe.real import tensors_in

Line = tuple[str, int]
BUILT_IN: Line = ("", 0)
"""The line of a function that has none: one of torch's own."""
_ASKS = frozenset({"shape", "device", "ndim", "layout", "requires_grad", "is_cuda", "size", "dim", "numel", "stride"})
"""What only asks about a tensor, and not about its format: no reason to cast it."""


class FP32Lines(TorchFunctionMode):
    """The mode.

    Args:
        lines: (file, number) of the lines that run in fp32.
        lower: Format of all others; None where autocast decides.
        root: Frames from here on outward are not the program's.
        device: Type of the device whose autocast is turned off.
    """

    def __init__(self, lines: frozenset[Line], lower: torch.dtype | None, root: FrameType, device: str) -> None:
        super().__init__()
        self._lines = lines
        self._lower = lower
        self._root = root
        self._device = device
        self._wide = WeakIdKeyDictionary()

    def widen(self, tensor: torch.Tensor) -> None:
        """Let a tensor be wide: lines that are not chosen get it in the lower format."""
        self._wide[tensor] = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _name(func) in _ASKS:
            return func(*args, **kwargs)
        chosen = self._line() in self._lines
        if not chosen and self._lower is None:
            return func(*args, **kwargs)
        change = self._widened if chosen else self._narrowed
        changed = _Changed(change)
        given, named = changed.tree(args), changed.tree(kwargs)
        with _in_fp32(self._device) if chosen else nullcontext():
            out = func(*given, **named)
            if changed.is_viewed_by(out):
                out = func(*args, **kwargs)
                self._inherit((args, kwargs), out)
            elif chosen:
                self._remember(out)
        changed.write_back()
        return changed.given(out)

    def _line(self) -> Line:
        user, library = places(self._root)
        place = library or user
        return (place.file, place.line) if place is not None else BUILT_IN

    @staticmethod
    def _widened(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor

    def _narrowed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._lower) if tensor in self._wide else tensor

    def _remember(self, out: Any) -> None:
        for tensor in tensors_in(out):
            if tensor.dtype == torch.float32:
                self.widen(tensor)

    def _inherit(self, given: Any, out: Any) -> None:
        """A view of a wide tensor is wide."""
        if any(tensor in self._wide for tensor in tensors_in(given)):
            self._remember(out)


class _Changed:
    """The tensors that were replaced in the arguments of a call."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._change = change
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def tree(self, value: Any) -> Any:
        """Return arguments with the replacements."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return {key: self.tree(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.tree(item) for item in value)
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self._made:
            return self._made[id(tensor)][1]
        other = self._change(tensor)
        if other is not tensor:
            self._made[id(tensor)] = (tensor, other, other._version)
        return other

    def is_viewed_by(self, out: Any) -> bool:
        """Say whether the call gave a view of a replacement, and wrote nothing."""
        if any(other._version != before for _, other, before in self._made.values()):
            return False
        memory = {other.untyped_storage()._cdata for _, other, _ in self._made.values()}
        return any(t.layout == torch.strided and t.untyped_storage()._cdata in memory for t in tensors_in(out))

    def write_back(self) -> None:
        """Copy what was written into replacements into the tensors that they stood for."""
        for tensor, other, before in self._made.values():
            if other._version != before:
                tensor.copy_(other)

    def given(self, out: Any) -> Any:
        """Return the result of the call; of an operation in place the tensor that was given."""
        for tensor, other, _ in self._made.values():
            if out is other:
                return tensor
        return out


def _name(func: Any) -> str:
    """Return a function's name; of a property's getter that of the property."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


@contextmanager
def _in_fp32(device: str) -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
