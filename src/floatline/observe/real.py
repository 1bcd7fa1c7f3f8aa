"""What of a traced program runs for real: the limits, and the way down below the fake mode."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

REAL_BYTES = 2**26
"""Largest integer or boolean result that is computed for real."""
REAL_FLOATS = 2**16
"""Most elements of a float result that is computed for real."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_HERE = os.path.dirname(__file__) + os.sep


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


def really(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an op for real, below the fake mode."""
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def is_small(tensor: torch.Tensor) -> bool:
    """Say whether a result of this size is computed for real."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.numel() <= REAL_FLOATS
    return tensor.numel() * tensor.element_size() <= REAL_BYTES


def is_torch(file: str) -> bool:
    """Say whether a file is torch's."""
    return file.startswith(_TORCH)


def is_ours(file: str) -> bool:
    """Say whether a file is Floatline's."""
    return file.startswith(_OURS)


def short_place(file: str, line: int | None) -> str:
    """Return a line of a program as "folder/file.py:12".

    >>> short_place("/home/me/project/models/net.py", 12)
    'models/net.py:12'
    """
    return f"{'/'.join(file.split('/')[-2:])}:{line}"


def where() -> str | None:
    """Return the line of the program that runs now, as " (file.py:12)"; None when it is one of Floatline's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_HERE):
            return None
        if not file.startswith((_TORCH, _OURS, "<")):
            return f" ({short_place(file, frame.f_lineno)})"
        frame = frame.f_back
    return ""


_PLUMBING = (_HERE, *(_TORCH + path for path in ("_compile.py", "_dynamo", "_tensor.py", "_ops.py", "_subclasses")))


def program_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame that is not plumbing between a program and this mode; of torch or of the user."""
    while frame is not None and frame.f_code.co_filename.startswith(_PLUMBING):
        frame = frame.f_back
    return frame


def asking() -> tuple[int, int]:
    """Return what tells one place in a running function from another: the frame's address and the instruction."""
    frame = program_frame(sys._getframe(1))
    return (id(frame), frame.f_lasti) if frame is not None else (0, 0)
