"""Activation offload: what autograd saves for the backward waits in host memory or on disk.

Autograd hands every tensor that it saves to a pair of hooks (`saved_tensors_hooks`). Here the first copies it away and
the second fetches it back; in between the device has room. `x.cpu(); del x` does not do that: autograd keeps the
original. What is not worth the way stays: weights and buffers (they are there anyway), small tensors, expanded ones,
and everything beyond `max_bytes`. A tensor that several ops save goes once.

The result is bit for bit the plain step's. The price is the transfer, both ways; on CUDA it overlaps with the compute
(offload_stash.py). After checkpointing only the layers' inputs are left to move, which is where offload costs least.

On a CPU the host's memory is the device's: nothing moves to the host there (a note says so); offload to disk saves.
Where CPU tensors stand for a GPU's (a plan), they leave and return as those would.
Not covered: outputs that op-selective checkpointing keeps (they lie in its own cache), tensor subclasses.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.offload_stash import DiskStash, HostStash, Stash, Stashed, span
from floatline.techniques.placement import holds_fakes, is_fake, stands_in


@dataclass(frozen=True, kw_only=True)
class Offload(Technique):
    """Keep saved activations off the device.

    Args:
        to: "host" memory or "disk".
        min_bytes: Smaller tensors stay on the device.
        max_bytes: Most bytes that are away at a time; the rest stays on the device. None sets no limit.
        in_flight: On CUDA, most copies under way in each direction.
        directory: For "disk": where the file lies; None is the system's temporary directory.

    Raises:
        ConfigError: A setting out of range, or a directory that is not there.
    """

    name = "offload"
    stage = Stage.SAVE
    exact = True

    to: Literal["host", "disk"] = "host"
    min_bytes: int = 2**16
    max_bytes: int | None = None
    in_flight: int = 4
    directory: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, smallest in (("min_bytes", 0), ("max_bytes", 0), ("in_flight", 1)):
            self.at_least(setting, smallest)
        if self.directory is not None and self.to == "host":
            raise self.bad("directory", "offload to the host uses no directory: set offload.to=disk, or leave it out")
        if self.directory is not None and not os.path.isdir(self.directory):
            raise self.bad("directory", "name a directory that exists")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        stash: Stash = HostStash(self.in_flight) if self.to == "host" else DiskStash(self.directory)
        hooks = _Hooks(self, model, stash, stands_in=stands_in(model, hardware))
        on_cpu = next((p.device.type for p in model.parameters()), "cpu") == "cpu" and not hooks.stands_in
        notes = ("on a CPU the host's memory is the device's, so nothing moves: to=disk is what saves there",)
        return Applied(
            technique=self,
            touched=("",),
            undo=stash.close,
            notes=notes if self.to == "host" and on_cpu else (),
            around=hooks.active,
            facts=lambda: {
                "live_bytes": stash.live_bytes,
                "peak_bytes": stash.peak_bytes,
                "tensors": stash.tensors,
                "kept_bytes": hooks.kept_bytes,
            },
        )


def _on_host(tensor: torch.Tensor) -> bool:
    """Say whether a tensor lies in host memory already."""
    return tensor.device.type == "cpu"


class _Hooks:
    """Decides what goes away, and sees to it that nothing goes twice.

    Args:
        technique: The settings.
        model: Whose weights and buffers stay.
        stash: Where things go.
        stands_in: Whether CPU tensors stand for those of a GPU, so that they go to the host as those do.

    Attributes:
        kept_bytes: Of the last forward, what was large enough to go but stayed: for `max_bytes`.
    """

    def __init__(self, technique: Offload, model: nn.Module, stash: Stash, *, stands_in: bool) -> None:
        self.technique = technique
        self.stands_in = stands_in
        self.fakes = holds_fakes(model)
        self.model = weakref.ref(model)  # a copy of the model must not drag this one along
        self.stash = stash
        self.kept_bytes = 0
        self._resident: set[int] = set()
        self._away: dict[Any, weakref.ref[Stashed]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """The context of one forward and its loss."""
        model = self.model()
        tensors = [*model.parameters(), *model.buffers()] if model is not None else []
        self._resident = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._away = {}
        self.kept_bytes = 0
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._away = {}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Stashed:
        if not self._worth_it(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, tensor._version)
        known = self._away.get(key)
        entry = known() if known is not None else None
        if entry is not None and not entry.origin.expired():
            return entry
        limit = self.technique.max_bytes
        if limit is not None and self.stash.live_bytes + span(tensor) * tensor.element_size() > limit:
            self.kept_bytes += tensor.nbytes
            return tensor
        entry = Stashed(self.stash, tensor)
        self._away[key] = weakref.ref(entry)
        return entry

    def _worth_it(self, tensor: torch.Tensor) -> bool:
        if not (type(tensor) is torch.Tensor or is_fake(tensor)) or tensor.layout is not torch.strided:
            return False  # a subclass whose parts only it knows
        if isinstance(tensor, nn.Parameter):
            return False
        if isinstance(tensor._base, nn.Parameter):
            return False  # a view of a weight; a sharded model's are gathered only now, so `active` has not seen them
        if self.technique.to == "host" and not self.stands_in and _on_host(tensor):
            return False
        if self.technique.to == "disk" and self.fakes and not is_fake(tensor):
            return False  # a file's bytes need a real tensor to come back into, and new ones are fake now
        if tensor.nbytes < max(1, self.technique.min_bytes) or tensor.is_inference():
            return False
        if span(tensor) < tensor.numel():  # expanded: it would grow on the way
            return False
        return tensor.untyped_storage()._cdata not in self._resident

    @staticmethod
    def _unpack(packed: torch.Tensor | Stashed) -> torch.Tensor:
        return packed.fetch() if isinstance(packed, Stashed) else packed
