"""Buffers that a forward changes, put back where its update is condemned.

A batch norm writes its running statistics in the forward, long before anybody knows that the loss is NaN. A skipped
update would leave the NaN in them: training goes on well, evaluation is ruined (pytorch#88474). So a copy is kept from
before the forward, of the buffers that forwards are seen to write, and goes back by select.

Which ones those are is learnt: batch and instance norms with running statistics, whose kernels write without counting
up the version of the tensor, and every other buffer whose version or object has changed after a forward. Most models
have none, and cost nothing.

Not covered: a buffer that is written for the first time after the first update is spoilt once, if that very forward is
the condemned one, and kept from then on; Python attributes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_STATISTICS = (nn.modules.batchnorm._NormBase,)
_Place = tuple[nn.Module, str]


class LiveBuffers:
    """The buffers of a model that its forwards write.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._live: list[_Place] = []
        self._quiet: list[tuple[_Place, torch.Tensor, int, torch.Tensor | None]] | None = None
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # the buffer's object, and its value before

    def keep(self) -> None:
        """Copy what the next forward may write. Call it before each forward."""
        if self._quiet is None:
            self._begin()
        if self._live:
            self._refresh()

    def _begin(self) -> None:
        """All are kept once, before the first forward, for it is not known yet which are written."""
        self._quiet = []
        for owner, key, buffer in _buffers(self._model):
            if isinstance(owner, _STATISTICS) and owner.track_running_stats:
                self._live.append((owner, key))
            else:
                self._quiet.append(((owner, key), buffer, buffer._version, buffer.detach().clone()))

    def _refresh(self) -> None:
        now = [owner._buffers[key] for owner, key in self._live]
        same = len(now) == len(self._kept) and all(
            buffer is before for buffer, (before, _) in zip(now, self._kept, strict=True)
        )
        with torch.no_grad():
            if same:
                torch._foreach_copy_([value for _, value in self._kept], [before for before, _ in self._kept])
            else:
                self._kept = [(buffer, buffer.detach().clone()) for buffer in now if buffer is not None]

    def settle(self, finite: torch.Tensor | bool) -> None:
        """Put back what was kept unless `finite`; on CUDA by select, without waiting. Call it after the verdict."""
        if self._quiet:
            self._learn()
        if not self._kept:
            return
        waits = isinstance(finite, torch.Tensor) and finite.is_cuda
        if not waits and finite:
            return
        with torch.no_grad():
            for (owner, key), (buffer, value) in zip(self._live, self._kept, strict=True):
                now = owner._buffers[key]
                if waits and now is buffer:
                    buffer.copy_(torch.where(finite, buffer, value))  # type: ignore[arg-type]
                elif not waits or now is None:
                    buffer.copy_(value)
                    owner._buffers[key] = buffer
                else:  # the forward put another object there
                    now.copy_(torch.where(finite, now, value))  # type: ignore[arg-type]

    def _learn(self) -> None:
        """Find buffers that were written although they were not known to be."""
        assert self._quiet is not None
        written = [entry for entry in self._quiet if entry[0][0]._buffers.get(entry[0][1]) is not entry[1]
                   or entry[1]._version != entry[2]]  # fmt: skip
        for place, buffer, _, value in written:
            self._live.append(place)
            self._kept.append((buffer, value if value is not None else buffer.detach().clone()))
        gone = {id(entry[1]) for entry in written}
        self._quiet = [(place, buffer, version, None) for place, buffer, version, _ in self._quiet
                       if id(buffer) not in gone]  # fmt: skip

    def norm(self) -> torch.Tensor | None:
        """Return the 2-norm of the live buffers together, 0-d fp32, for the verdict; None where there are none."""
        floats = [b for owner, key in self._live if (b := owner._buffers[key]) is not None and b.is_floating_point()]
        if not floats:
            return None
        norms = torch._foreach_norm(floats, 2, dtype=torch.float32)
        return torch.stack(norms).sum()

    def bad(self) -> list[str]:
        """Return the dotted names of all buffers of floats that hold a NaN; reading them waits for a device."""
        return [name for name, buffer in self._model.named_buffers()
                if buffer.is_floating_point() and bool(torch.isnan(buffer).any())]  # fmt: skip


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    seen: set[int] = set()
    for owner in model.modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield owner, key, buffer
