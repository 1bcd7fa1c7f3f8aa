"""Where autograd adds gradients in place, although a trace sees it make a new tensor.

A tensor that is used twice gets its gradient in two parts. The engine writes the sum into the first part when nobody
else holds that; it refrains while a dispatch mode is active, and the trace is one. So the recorder asks here whether an
addition is one of the engine's, and if the first part is dead as soon as the sum is there, takes the two for one storage.
A first part that is a view holds on to the tensor it was made from, so somebody else holds its memory.

Not covered: sums that a derivative's own C++ formula makes are taken for the engine's.
Source: torch/csrc/autograd/input_buffer.cpp, `accumulate`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from floatline.observe.real import program_frame

_ENGINE = torch.autograd.graph._engine_run_backward.__code__


def adds_gradients(func: Any, args: Any) -> bool:
    """Say whether the op that runs now is the engine's sum of two gradients, one that could be made in place."""
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled() or not isinstance(args[1], torch.Tensor):
        return False
    if args[0].shape != args[1].shape or args[0]._is_view() or not _is_dense(args[0]):
        return False
    frame = program_frame(sys._getframe(1))
    return frame is not None and frame.f_code is _ENGINE


def _is_dense(tensor: torch.Tensor) -> bool:
    """Say whether each element has a place of its own and no place lies between them."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
