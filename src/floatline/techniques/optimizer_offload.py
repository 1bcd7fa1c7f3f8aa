"""Optimizer state in host memory: the device holds it for a few parameters at a time, only while they are stepped.

Adam keeps 8 bytes a parameter that are read once an update. Here they lie in pinned host memory; the step goes through
the parameters bucket by bucket: state in, the optimizer's own step on these parameters, state out. On CUDA the copies
run on a stream of their own, the next bucket's state travels while this one is stepped. The step is the optimizer's
own, so the numbers are bit for bit the plain ones, whichever optimizer of torch.optim it is, and gradients are
clipped, unscaled and judged as always (torchao's CPUOffloadOptimizer steps on the host, and cannot clip).

Costs the bus twice the state an update: 16 bytes a parameter with Adam, 0.7 s a billion at 24 GB/s each way.
Pieces under 4 KiB stay on the device: a transfer costs more than they hold.

Not covered: weights and gradients stay on the device; sharded state, which sharding moves itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from floatline.hardware import Hardware
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.optim_steps.partial_step import Chunk, chunks, state_bytes, step_only, tensor_parts
from floatline.techniques.optim_steps.wrapped import WrappedOptimizer, saved_state_of
from floatline.techniques.placement import on_host, stands_in

SMALLEST = 4096
"""Bytes below which a piece of state is not worth a transfer."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOffload(Technique):
    """Keep optimizer state in host memory between updates, and most of it during them.

    Args:
        bucket_bytes: State that is stepped at once; the device holds at most two buckets of it, or the largest
            parameter's state where that is more.

    Raises:
        ConfigError: A bucket below 1 byte.
    """

    name = "optimizer_offload"
    stage = Stage.OPTIMIZER
    order = 1
    exact = True
    conflicts: ClassVar = {"sharding": "FSDP2 keeps shards on the host itself; use sharding's own offload to CPU"}

    bucket_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("bucket_bytes", 1)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        made: list[OffloadedOptimizer] = []
        planned = stands_in(model, hardware)
        smallest = SMALLEST if planned else 0  # there all is on a CPU, and the small pieces stand for a GPU's

        def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            store = HostStore(always=planned)
            made.append(OffloadedOptimizer(optimizer, self.bucket_bytes, store))
            return made[-1]

        def undo() -> None:
            for optimizer in made:
                optimizer.bring_back()
            made.clear()

        def facts() -> dict[str, float]:
            return {"host_bytes": float(sum(state_bytes(optimizer, "cpu", smallest) for optimizer in made))}

        touched = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        notes = () if hardware.kind != "cpu" else ("saves nothing here: on a CPU the state is in host memory already",)
        return Applied(technique=self, touched=touched, undo=undo, notes=notes, optimizer=convert, facts=facts)


class HostStore:
    """Moves state between its device and host buffers that are kept.

    Args:
        always: Copy even where the state is on the host already: where CPU tensors stand for a GPU's, and in tests.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Return the stream that copies to and from `device`; None where there are none."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def beside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which copies run beside the computation."""
        stream = self.stream(device)
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def fetch(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Put a parameter's state on its device, in place; the host buffers stay for `park`."""
        with self.beside(parameter.device):
            for key, value in state.items():
                if self._moves(value):
                    self._buffers[id(parameter), key] = value
                    state[key] = _map_parts(value, lambda part: self._to_device(part, parameter.device))

    def park(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Put a parameter's state on the host, in place, when the work before this has used it."""
        stream = self.stream(parameter.device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(parameter.device))
        with self.beside(parameter.device):
            for key, value in state.items():
                if self._moves(value):
                    state[key] = self._to_host(value, self._buffers.pop((id(parameter), key), None), stream)

    def wait(self) -> None:
        """Wait until every copy has arrived."""
        for stream in self._streams.values():
            stream.synchronize()

    def forget(self) -> None:
        """Wait, then let go of the host buffers."""
        self.wait()
        self._buffers.clear()

    def _moves(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        return any(self._worthwhile(part) for part in tensor_parts(value))

    def _worthwhile(self, part: torch.Tensor) -> bool:
        return part.numel() * part.element_size() >= SMALLEST

    def _to_device(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not self._worthwhile(part) or (part.device == device and not self.always):
            return part
        return part.to(device, non_blocking=True, copy=True)

    def _to_host(
        self, value: torch.Tensor, buffer: torch.Tensor | None, stream: torch.cuda.Stream | None
    ) -> torch.Tensor:
        if buffer is None or type(buffer) is not type(value) or not _alike(buffer, value):
            return _map_parts(value, lambda part: self._copied(part, self._new_buffer(part), stream))
        for part, kept in zip(tensor_parts(value), tensor_parts(buffer), strict=True):
            self._copied(part, kept, stream)
        return buffer

    def _new_buffer(self, part: torch.Tensor) -> torch.Tensor:
        if not self._worthwhile(part) or (part.device.type == "cpu" and not self.always):
            return part
        with on_host():
            return torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)

    @staticmethod
    def _copied(part: torch.Tensor, buffer: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
        if buffer is not part:
            buffer.copy_(part, non_blocking=True)
            if stream is not None and part.is_cuda:
                part.record_stream(stream)  # made on the computing stream: not to be used again before this copy
        return buffer


def _map_parts(value: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `value` with each plain tensor in it changed; subclasses are taken apart and put together."""
    if not is_traceable_wrapper_subclass(value):
        return change(value)
    return transform_subclass(value, lambda _, part: _map_parts(part, change))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    parts = zip(tensor_parts(one), tensor_parts(other), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in parts)


class OffloadedOptimizer(WrappedOptimizer):
    """Steps another optimizer bucket by bucket, with only one bucket's state on the device.

    Args:
        inner: Any optimizer of torch.optim, LBFGS excepted. State that it has already goes to the host.
        bucket_bytes: State of one bucket.
        store: Moves it.
    """

    def __init__(self, inner: torch.optim.Optimizer, bucket_bytes: int, store: HostStore) -> None:
        super().__init__(inner, OptimizerOffload.name)
        self.bucket_bytes = bucket_bytes
        self.store = store
        self._park([(group, group["params"]) for group in self.param_groups])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = chunks(self, self.bucket_bytes, self._bytes_of)
        arrived = self._fetch(buckets[0]) if buckets else []
        for index, bucket in enumerate(buckets):
            for device, event in arrived:
                torch.cuda.current_stream(device).wait_event(event)
            arrived = self._fetch(buckets[index + 1]) if index + 1 < len(buckets) else []
            try:
                step_only(self.inner, bucket)
            finally:
                self._park(bucket)
        return loss

    def _bytes_of(self, parameter: torch.Tensor) -> int:
        """Bytes of a parameter's state; before its first step, what Adam would have."""
        values = self.state[parameter].values() if parameter in self.state else (parameter, parameter)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return sum(part.numel() * part.element_size() for value in tensors for part in tensor_parts(value))

    def _fetch(self, bucket: Chunk) -> list[tuple[torch.device, torch.cuda.Event]]:
        devices = set()
        for parameter in _parameters(bucket):
            if parameter in self.state:
                self.store.fetch(parameter, self.state[parameter])
            devices.add(parameter.device)
        streams = {device: self.store.stream(device) for device in devices}
        return [(device, stream.record_event()) for device, stream in streams.items() if stream is not None]

    def _park(self, bucket: Chunk) -> None:
        for parameter in _parameters(bucket):
            if parameter in self.state:
                self.store.park(parameter, self.state[parameter])

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict; its tensors are the host's own."""
        self.store.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of the plain optimizer, parameter by parameter.

        torch puts a loaded state on the device whole, which may not have the room.
        """
        self.store.wait()
        saved = saved_state_of(self, state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        loaded = {}
        for key, parameter, state in saved:
            super().load_state_dict({**state_dict, "state": {key: state}})
            self._park([({}, [parameter])])
            loaded[parameter] = self.state[parameter]
        self.state.update(loaded)

    def bring_back(self) -> None:
        """Put all state on its device, where the inner optimizer alone expects it."""
        for parameter in list(self.state):
            self.store.fetch(parameter, self.state[parameter])
        self.store.forget()


def _parameters(chunk: Chunk) -> list[torch.Tensor]:
    return [parameter for _, parameters in chunk for parameter in parameters]
