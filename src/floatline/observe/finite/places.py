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
from dataclasses import dataclass
from functools import cache
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep
_INSTALLED = tuple({os.path.realpath(sysconfig.get_paths()[name]) + os.sep
                    for name in ("stdlib", "platstdlib", "purelib", "platlib")})  # fmt: skip
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
    if file.startswith(_TORCH):
        return "torch"
    if file.startswith(_OURS):
        return "ours"
    installed = os.path.realpath(file).startswith(_INSTALLED) or f"{os.sep}site-packages{os.sep}" in file
    return "library" if installed or file.startswith("<frozen") else "user"


def places() -> tuple[Place | None, Place | None]:
    """Return the user's innermost line, and the innermost line of a library if it lies further in."""
    library: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = _owner(frame.f_code.co_filename)
        if owner == "user":
            return _place(frame), _place(library)
        if owner == "library" and library is None:
            library = frame
        frame = frame.f_back
    return None, _place(library)


def place_in_backward() -> Place | None:
    """Return the user's line that runs inside of autograd's engine: in a backward that the user has written."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _ENGINE:
        if _owner(frame.f_code.co_filename) == "user":
            return _place(frame)
        frame = frame.f_back
    return None


def _place(frame: FrameType | None) -> Place | None:
    if frame is None:
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Place(file, line, linecache.getline(file, line).strip(), frame.f_code.co_name)
