"""The buffers that a forward changes, so that a recomputation meets them as the forward did and leaves them alone.

A forward may put a new tensor in a buffer's place (`self.mean = ...`) or write into the one there (batch norm, spectral
norm, counters). The recomputation gets stand-ins that hold the old values; what it does to them is thrown away.

Old values of a buffer that was replaced are in the tensor that left, at no cost. Those of one that is written into must
be copied beforehand; which ones these are, a layer's first forward tells: there all its buffers are copied for its
time, later only those. Batch norm needs no copy: in training it writes its statistics and does not read them.

Not covered: tensors and numbers that a module keeps outside of its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError

Place = tuple[nn.Module, str, torch.Tensor | None]


@dataclass
class Written:
    """What is known of a layer from its calls so far.

    Attributes:
        buffers: Those that were written into, as (dotted name of their module, own name).
        modes: Whether it was called in training, in evaluation, or both.
    """

    buffers: set[tuple[str, str]] = field(default_factory=set)
    modes: set[bool] = field(default_factory=set)


class ChangedBuffers:
    """The buffers of one call of a layer, made before its forward.

    Args:
        name: The layer's, for the error.
        layer: Any module.
        written: What its calls before have told; this one adds to it.
        copying: Context in which buffers are copied.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        written: Written,
        copying: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.name = name
        self.written = written
        self.copying = copying
        self._before: list[tuple[tuple[str, str], Place, int, torch.Tensor | None]] = []
        self._stand_ins: list[Place] = []
        unknown = layer.training not in written.modes
        written.modes.add(layer.training)
        for path, owner in layer.named_modules():
            for key, buffer in owner._buffers.items():
                copied = (unknown or (path, key) in written.buffers) and not _is_running_norm(owner)
                old = self._copy(buffer) if copied else None
                self._before.append(((path, key), (owner, key, buffer), version_of(buffer), old))

    def _copy(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        with self.copying():
            return None if buffer is None else buffer.detach().clone()

    def note_changes(self) -> None:
        """After the forward: keep the old values of what it has changed, and nothing else.

        Raises:
            ConfigError: A buffer was written into for the first time in a later call, so there is no copy of it.
        """
        late = []
        for at, (owner, key, buffer), version, old in self._before:
            written = version_of(buffer) != version
            if _is_running_norm(owner):  # torch's kernels write the statistics without counting versions up
                self._stand_ins.append((owner, key, buffer))
            elif written:
                self.written.buffers.add(at)
                late += [".".join(filter(None, at))] if old is None else []
                self._stand_ins.append((owner, key, old))
            elif owner._buffers.get(key) is not buffer:
                self._stand_ins.append((owner, key, buffer))
        self._before.clear()
        if late:
            raise self._too_late(late[0])

    def _too_late(self, buffer: str) -> ConfigError:
        return ConfigError(
            f"checkpointing {self.name}: its forward changes the buffer {buffer} in place, which it did not in its "
            "first call, and would be recomputed from the changed values",
            hint="leave it out with checkpointing.layers",
        )

    @contextmanager
    def as_before(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        """Context of a recomputation: buffers have the values that the forward found."""
        now = [(owner, key, owner._buffers.get(key)) for owner, key, _ in self._stand_ins]
        copies: dict[int, torch.Tensor | None] = {}  # a buffer that several modules share stays one
        try:
            for owner, key, old in self._stand_ins:
                if id(old) not in copies:
                    copies[id(old)] = self._copy(old)
                owner._buffers[key] = copies[id(old)]
            with inner:
                yield
        finally:
            for owner, key, buffer in now:
                owner._buffers[key] = buffer


def version_of(tensor: torch.Tensor | None) -> int:
    """Return how often a tensor was written into, 0 where that is not counted."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _is_running_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.training
