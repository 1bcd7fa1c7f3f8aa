"""How offload's copies run: on a CUDA stream of their own, or in line with the computation.

Both have the same shape, so that what decides which tensors are where (offload_stash.py) is the same code on a GPU and
on CPU tensors that stand for one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from floatline.techniques.placement import on_host


class InLine:
    """The null object: a copy is done when its line is. For CPU tensors, and for those that stand for a GPU's."""

    def host_buffer(self, tensor: torch.Tensor, elements: int) -> torch.Tensor:
        """Return flat host memory for so many elements of a tensor's format."""
        with on_host():
            return tensor.new_empty(elements, device="cpu")

    def leaving(self) -> AbstractContextManager[Any]:
        """Context of a copy to the host, of something that was computed before."""
        return nullcontext()

    def arriving(self) -> AbstractContextManager[Any]:
        """Context of a copy to the device, which waits for earlier copies only."""
        return nullcontext()

    def mark(self) -> Any:
        """Return a mark of the copies so far; called inside one of the contexts."""
        return None

    def wait(self, mark: Any) -> None:
        """Let the computation wait for the copies up to a mark."""

    def hand_over(self, tensor: torch.Tensor) -> None:
        """Tell the allocator that the computation uses a tensor that a copy made."""


class SideStream(InLine):
    """A CUDA stream of the current device, through pinned buffers."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def host_buffer(self, tensor: torch.Tensor, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=tensor.dtype, pin_memory=True)

    def leaving(self) -> AbstractContextManager[Any]:
        self.stream.wait_stream(torch.cuda.current_stream())  # the tensor must be computed before it is copied
        return torch.cuda.stream(self.stream)

    def arriving(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(mark)

    def hand_over(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream())
