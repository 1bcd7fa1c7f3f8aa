"""Where a program is: the user's own line, and the line of a library below it.

A person who gets an error wants the line that is theirs to change. That is the innermost frame whose file is neither
torch's, nor the standard library's, nor an installed package's, nor ours. Where a fault lies inside a library module,
its own innermost line is worth telling as well.
"""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import FrameType

import torch

from floatline.observe.finite.numbers import storage_of

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep
_MODELS = os.path.join(_OURS, "models") + os.sep
_INSTALLED = tuple({os.path.realpath(sysconfig.get_paths()[name]) + os.sep
                    for name in ("stdlib", "platstdlib", "purelib", "platlib")})  # fmt: skip
_OPTIMIZERS = os.path.join(_TORCH, "optim") + os.sep
_ENGINE = os.path.join(_TORCH, "autograd", "graph.py")


@dataclass(frozen=True)
class Place:
    """One line of a program.

    Attributes:
        file: Its path.
        line: Its number, from 1.
        code: Its text, "" where the file is not at hand.
        function: The function that it stands in.
    """

    file: str
    line: int
    code: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f"  {self.code}" if self.code else "")


@cache
def _owner(file: str) -> str:
    """Return whose a file is: "torch", "ours", "library" or "user"."""
    if file.startswith((_TORCH, "<eval_with_key>")):  # the latter is what torch.fx writes
        return "torch"
    if file.startswith(_OURS) and not file.startswith(_MODELS):
        return "ours"
    if file.startswith(_MODELS):
        return "library"
    installed = os.path.realpath(file).startswith(_INSTALLED) or f"{os.sep}site-packages{os.sep}" in file
    return "library" if installed or file.startswith("<frozen") else "user"


def places(root: FrameType | None = None) -> tuple[Place | None, Place | None]:
    """Return the user's innermost line, and the innermost line of a library if it lies further in.

    Args:
        root: Frames from here on outward are not looked at.
    """
    library: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not root:
        owner = _owner(frame.f_code.co_filename)
        if owner == "user":
            return _place(frame), _place(library)
        if owner == "library" and library is None:
            library = frame
        frame = frame.f_back
    return None, _place(library)


def place_in_backward() -> Place | None:
    """Return the line of a user or of a library that runs inside of autograd's engine.

    A derivative's formula has none. A backward that somebody has written, a hook on a gradient and a forward that is
    computed again (checkpointing) have one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _ENGINE:
        if _owner(frame.f_code.co_filename) in ("user", "library"):
            return _place(frame)
        frame = frame.f_back
    return None


def place_of_optimizer(root: FrameType | None) -> Place | None:
    """Return the innermost line inside of `root` of an optimizer: the user's, or else a library's or torch's."""
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    while frame is not None and frame is not root:
        file = frame.f_code.co_filename
        if _owner(file) == "user":
            return _place(frame)
        if found is None and (_owner(file) == "library" or file.startswith(_OPTIMIZERS)):
            found = frame
        frame = frame.f_back
    return _place(found)


def nearest_line() -> tuple[str, int] | None:
    """Return file and line of the innermost frame that is neither torch's nor ours: whose call this is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _owner(frame.f_code.co_filename) in ("user", "library"):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def place_of_error(error: BaseException) -> Place | None:
    """Return the innermost line of a user or of a library that an exception went through."""
    found: Place | None = None
    trace = error.__traceback__
    while trace is not None:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if _owner(file) in ("user", "library"):
            code = linecache.getline(file, line).strip()
            found = Place(file, line, code, trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return found


def variable_of(tensor: torch.Tensor) -> str:
    """Return what the innermost function of the user's that runs and knows a tensor calls it; "" where none does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _owner(frame.f_code.co_filename) == "user":
            for name, value in frame.f_locals.items():
                if not name.isidentifier():  # made by a rewriter of code, as pytest is one
                    continue
                for path, other in _tensors_of(name, value):
                    if storage_of(other) is not None and storage_of(other) == storage_of(tensor):
                        return path
        frame = frame.f_back
    return ""


def _tensors_of(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a variable's tensors, in containers one level deep as well."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", item) for key, item in value.items() if isinstance(item, torch.Tensor))
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, torch.Tensor))


def _place(frame: FrameType | None) -> Place | None:
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Place(file, line, linecache.getline(file, line).strip(), frame.f_code.co_name)
