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
_Kept = tuple[torch.Tensor, torch.Tensor] | None


class LiveBuffers:
    """The buffers of a model that its forwards write.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._live: list[_Place] = []
        self._quiet: list[tuple[_Place, torch.Tensor, int, torch.Tensor | None]] | None = None
        self._kept: list[_Kept] = []  # the buffer's object and its value, before the update
        self._open = False  # an update has begun and is not settled
        self._marked: list[_Kept] = []  # the same, before the last forward of several

    def keep(self) -> None:
        """Copy what the update's forwards may write. Call it before the first of them."""
        if self._quiet is None:
            self._begin()
        self._marked = []
        self._kept = self._copied(self._kept)
        self._open = True

    def mark(self) -> None:
        """Copy the buffers before a further forward of the update, which may be left out alone."""
        if self._quiet:
            self._learn()
        self._marked = self._copied(self._marked)

    def _begin(self) -> None:
        """All are kept once, before the first forward, for it is not known yet which are written."""
        self._quiet = []
        for owner, key, buffer in _buffers(self._model):
            if isinstance(owner, _STATISTICS) and owner.track_running_stats:
                self._live.append((owner, key))
            else:
                self._quiet.append(((owner, key), buffer, buffer._version, buffer.detach().clone()))

    def _copied(self, before: list[_Kept]) -> list[_Kept]:
        """Return the live buffers with copies of their values, into the copies of `before` where they still fit."""
        now = [owner._buffers[key] for owner, key in self._live]
        pairs = [pair for pair in before if pair is not None]
        same = len(now) == len(pairs) and all(a is b for a, (b, _) in zip(now, pairs, strict=True))
        if not same:
            return [(buffer, buffer.detach().clone()) if buffer is not None else None for buffer in now]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([value for _, value in pairs], [buffer for buffer, _ in pairs])
        return before

    def leave_out_last(self) -> None:
        """Put back what the last forward has written; the buffers stay as the forwards before it left them."""
        if self._quiet:
            self._learn()
        self._put_back(self._marked or self._kept, False)

    def settle(self, finite: torch.Tensor | bool) -> None:
        """Put back what was kept unless `finite`; on CUDA by select, without waiting. Call it after the verdict."""
        self._open = False
        if self._quiet:
            self._learn()
        waits = isinstance(finite, torch.Tensor) and finite.is_cuda
        if self._kept and (waits or not finite):
            self._put_back(self._kept, finite if waits else False)

    def give_up(self) -> None:
        """Put back what an update has written that an exception has ended, if it had begun to write."""
        if self._open:
            self.settle(False)

    @torch.no_grad()
    def _put_back(self, kept: list[_Kept], finite: torch.Tensor | bool) -> None:
        for (owner, key), pair in zip(self._live, kept, strict=False):  # those learnt since the mark come last
            now = owner._buffers[key]
            if pair is None:  # there was none
                continue
            buffer, value = pair
            if not isinstance(finite, torch.Tensor) or now is None:
                buffer.copy_(value)
                owner._buffers[key] = buffer
            elif now.shape == value.shape:  # else it has grown, and what was kept cannot be selected
                now.copy_(torch.where(finite, now, value))

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

    def fault(self) -> torch.Tensor | None:
        """Say whether the live buffers are as they may be, for the verdict.

        NaN is a fault, and so is an infinity, unless the buffer held one before or has another shape now: a mask that
        grows with the sequence. Running statistics must be finite, whatever they were.

        Returns:
            0-d fp32: 0, or NaN for a fault; None where no buffer is live.
        """
        found = []
        for (owner, key), pair in zip(self._live, self._kept, strict=False):
            now = owner._buffers[key]
            if now is not None and now.is_floating_point() and now.numel():
                if isinstance(owner, _STATISTICS):
                    found.append((now, torch.zeros_like(now)))
                elif pair is not None and pair[1].shape == now.shape:
                    found.append((now, pair[1]))
                else:
                    found.append((now, torch.full_like(now, float("inf"))))
        if not found:
            return None
        # the largest magnitude and not the 2-norm, which overflows for buffers that are finite
        after = _largest([now for now, _ in found])
        before = _largest([value for _, value in found])
        allowed = after.isinf() & ~before.isfinite()
        return torch.where(allowed, 0.0, after - after).sum()

    def bad(self) -> list[str]:
        """Return the dotted names of all buffers of floats that hold a NaN; reading them waits for a device."""
        return [name for name, buffer in self._model.named_buffers()
                if buffer.is_floating_point() and bool(torch.isnan(buffer).any())]  # fmt: skip


def _largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude of each tensor, NaN where it holds one."""
    return torch.stack(torch._foreach_norm(tensors, float("inf"), dtype=torch.float32))


def masks(model: nn.Module) -> set[str]:
    """Return the names of the buffers that may hold infinities: all but running statistics."""
    return {f"{prefix}{'.' if prefix else ''}{key}" for prefix, owner in model.named_modules()
            if not isinstance(owner, _STATISTICS) for key in owner._buffers}  # fmt: skip


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    seen: set[int] = set()
    for owner in model.modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield owner, key, buffer
