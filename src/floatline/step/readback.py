"""Numbers on their way from the device to the host, without making the host wait for them.

On CUDA the copy goes to pinned memory behind the kernels that compute the numbers; whoever reads it an update later
finds it done. On a CPU the numbers are there at once.
"""

from __future__ import annotations

import torch


class Readback:
    """Starts to read a tensor.

    Args:
        values: On any device; it may be overwritten afterwards.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    @classmethod
    def of(cls, tensors: list[torch.Tensor]) -> Readback:
        """Start to read several 0-d tensors of one device together."""
        return cls(torch.stack([tensor.float() for tensor in tensors]))

    @property
    def waits(self) -> bool:
        """Whether reading now would wait for a device."""
        return self._done is not None

    def tolist(self) -> list[float]:
        """Return the numbers, waiting for them where they are still on their way."""
        if self._done is not None:
            self._done.synchronize()
        return [float(value) for value in self._host.tolist()]
