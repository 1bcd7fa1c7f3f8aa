"""Read numbers from a device a step later: they are copied while the device goes on, and nothing waits for them now."""

from __future__ import annotations

import torch


class Reading:
    """0-d tensors on their way to the host.

    Args:
        tensors: On one device, any float dtype.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            values = torch.stack([tensor.float() for tensor in tensors])
            self._host = torch.empty(len(tensors), pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = [tensor.item() for tensor in tensors]

    @property
    def waits(self) -> bool:
        """Whether reading now would wait for a device."""
        return self._event is not None

    def values(self) -> list[float]:
        """Return the numbers, waiting for the device if they are not there yet."""
        if self._event is None:
            return self._values
        self._event.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers
