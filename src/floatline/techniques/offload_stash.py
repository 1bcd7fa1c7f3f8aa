"""Where offloaded tensors wait: in host memory or in a file.

A stashed tensor comes back with the size, strides and bits it left with, so whatever is computed from it is bit for bit
the same. On CUDA, copies run on a stream of their own through pinned buffers (offload_streams.py). A tensor's device
memory is given back once its copy is done; at most `in_flight` copies are under way, so the device never holds more
than that many tensors that are on their way out. Coming back, the next tensors in line are fetched ahead, as many
again.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections import deque
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from floatline.errors import MemoryExceededError
from floatline.techniques.offload_streams import InLine, SideStream
from floatline.techniques.placement import is_fake


class Stashed:
    """One tensor that is away. It is forgotten, and its place free, when nothing refers to it any more.

    Args:
        stash: Its keeper.
        tensor: What goes away.

    Attributes:
        origin: Weak reference to the storage that it was copied from.
        position: Its place in the order in which tensors left.
    """

    def __init__(self, stash: Stash, tensor: torch.Tensor) -> None:
        self.stash = stash
        self.origin = StorageWeakRef(tensor.untyped_storage())
        self.position = 0
        self.device, self.dtype = tensor.device, tensor.dtype
        self.size, self.stride = tensor.size(), tensor.stride()
        self.elements = span(tensor)
        self.nbytes = self.elements * tensor.element_size()
        self.place = stash.put(self, tensor)

    def fetch(self) -> torch.Tensor:
        """Return the tensor on the device it came from."""
        return self.stash.get(self)

    def shape_of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a flat buffer as a tensor of the size and strides that left."""
        return flat.as_strided(self.size, self.stride)

    def __del__(self) -> None:
        if hasattr(self, "place"):
            self.stash.forget(self)


def span(tensor: torch.Tensor) -> int:
    """Return how many elements of its storage a tensor reaches over, gaps between strides included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride()))


class Stash:
    """Base of the two kinds: counts what is away.

    Attributes:
        live_bytes: What is away now.
        peak_bytes: The most that was.
        tensors: How many were put away in all.
    """

    def __init__(self) -> None:
        self.live_bytes = self.peak_bytes = self.tensors = 0

    def put(self, entry: Stashed, tensor: torch.Tensor) -> Any:
        """Copy a tensor away; returns where it lies."""
        self.tensors += 1
        self.live_bytes += entry.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return None

    def get(self, entry: Stashed) -> torch.Tensor:
        raise NotImplementedError

    def forget(self, entry: Stashed) -> None:
        """Free an entry's place."""
        self.live_bytes -= entry.nbytes

    def close(self) -> None:
        """Give up files and buffers."""


class HostStash(Stash):
    """Host memory: for CUDA tensors pinned and copied on a side stream, else copied in line with the computation.

    Args:
        in_flight: Most copies under way in each direction.
    """

    def __init__(self, in_flight: int) -> None:
        super().__init__()
        self.in_flight = in_flight
        self._streams: InLine | None = None
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()
        self._order: list[weakref.ref[Stashed]] = []  # in the order in which they left
        self._arriving: dict[int, tuple[Any, torch.Tensor]] = {}

    def put(self, entry: Stashed, tensor: torch.Tensor) -> torch.Tensor:
        super().put(entry, tensor)
        if self._streams is None:
            self._streams = SideStream() if tensor.is_cuda else InLine()
        flat = self._streams.host_buffer(tensor, entry.elements)
        with self._streams.leaving():
            entry.shape_of(flat).copy_(tensor, non_blocking=True)
            self._leaving.append((self._streams.mark(), tensor.detach()))  # the memory, not the graph behind it
        while len(self._leaving) > self.in_flight:  # memory freed on this stream is reused on it: wait, then let go
            self._streams.wait(self._leaving.popleft()[0])
        entry.position = len(self._order)
        self._order.append(weakref.ref(entry))
        return flat

    def get(self, entry: Stashed) -> torch.Tensor:
        assert self._streams is not None
        while self._leaving:  # the backward has begun: nothing leaves any more
            self._streams.wait(self._leaving.popleft()[0])
        for waiting in reversed(self._order[max(0, entry.position - self.in_flight) : entry.position + 1]):
            other = waiting()
            if other is not None and id(other) not in self._arriving:
                self._arriving[id(other)] = self._begin_arrival(other, self._streams)
        done, flat = self._arriving.pop(id(entry))
        self._streams.wait(done)
        self._streams.hand_over(flat)
        return entry.shape_of(flat)

    @staticmethod
    def _begin_arrival(entry: Stashed, streams: InLine) -> tuple[Any, torch.Tensor]:
        """Copy back: on a side stream that comes after the copy out, and does not wait for the compute."""
        with streams.arriving():
            flat = entry.place.to(entry.device, non_blocking=True, copy=True)
            return streams.mark(), flat

    def forget(self, entry: Stashed) -> None:
        super().forget(entry)
        self._arriving.pop(id(entry), None)
        if not self.live_bytes:
            self._order.clear()
            self._leaving.clear()


class DiskStash(Stash):
    """A temporary file without a name, so that a killed process leaves nothing behind.

    Places are given out one after the other and all taken back when the last tensor has returned, which is after each
    backward. Written with `pwrite`: a full disk is an error with a name, where a memory-mapped file would kill the
    process. CUDA tensors are copied to the host first; the step waits for copies and writes. Fake tensors have nothing
    to write: they are counted, and others of their kind come back.

    Args:
        directory: Where the file lies; None is the system's temporary directory.
    """

    def __init__(self, directory: str | None) -> None:
        super().__init__()
        self.directory = directory or tempfile.gettempdir()
        self._file: Any = None
        self._end = 0

    def put(self, entry: Stashed, tensor: torch.Tensor) -> int | torch.Tensor:
        """Write a tensor into the file; returns where it begins, of a fake one an empty tensor of its kind.

        Raises:
            MemoryExceededError: The disk is full or cannot be written.
        """
        if is_fake(tensor):
            super().put(entry, tensor)
            return tensor.new_empty(0)
        flat = _flat_on_host(tensor, entry)
        offset = self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115
            _write_all(self._file.fileno(), _bytes_of(flat), offset)
        except OSError as error:
            raise self._explain(error, entry) from None
        super().put(entry, tensor)
        self._end += entry.nbytes
        return offset

    def _explain(self, error: OSError, entry: Stashed) -> MemoryExceededError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if full else f"cannot be written ({error.strerror})"
        return MemoryExceededError(
            f"offload: the disk of {self.directory} {what}, with {self.live_bytes / 2**20:.1f} MiB of activations on "
            f"it and {entry.nbytes / 2**20:.1f} MiB to go",
            hint="set offload.directory to a disk with more room, or offload.max_bytes to what this one holds; "
            "the weights are as before this update",
        )

    def get(self, entry: Stashed) -> torch.Tensor:
        if isinstance(entry.place, torch.Tensor):
            return entry.shape_of(entry.place.new_empty(entry.elements))
        flat = torch.empty(entry.elements, dtype=entry.dtype, pin_memory=entry.device.type == "cuda")
        _read_all(self._file.fileno(), _bytes_of(flat), entry.place)
        return entry.shape_of(flat.to(entry.device))

    def forget(self, entry: Stashed) -> None:
        super().forget(entry)
        if not self.live_bytes:
            self._end = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _flat_on_host(tensor: torch.Tensor, entry: Stashed) -> torch.Tensor:
    if entry.elements == tensor.numel() and tensor.device.type == "cpu":
        return tensor.as_strided((entry.elements,), (1,))
    flat = torch.empty(entry.elements, dtype=tensor.dtype)
    entry.shape_of(flat).copy_(tensor)
    return flat


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.detach().view(torch.uint8).numpy().data)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        read = os.preadv(descriptor, [data], offset)
        if not read:
            raise OSError(errno.EIO, "the file of offloaded activations is shorter than what was written")
        data, offset = data[read:], offset + read
