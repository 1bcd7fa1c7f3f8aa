"""Loss scaling: torch's GradScaler where fp16 needs it, and an object that does nothing elsewhere.

fp16 gradients below 6e-8 vanish; multiplying the loss by 2^16 lifts them into range, and the gradients are divided by
it before they are judged, clipped and used. The scale halves when a scaled gradient overflows and doubles after 2000
good updates; one that was set to 1 or less only halves. bf16 has fp32's exponent range and needs none of it.
"""

from __future__ import annotations

from typing import Any

import torch

_NEVER = 2**31 - 1
"""Good updates before a scale grows that is not to grow."""


class NoLossScaling:
    """The null object: losses and gradients pass through."""

    active = False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def update(self, loss: torch.Tensor) -> None:
        pass

    def current(self) -> float | None:
        """Return the loss scale (on CUDA reading it waits for the device), None without scaling."""
        return None

    def set(self, scale: float) -> None:
        """Start from another scale; nothing without scaling."""

    def tensor(self) -> torch.Tensor | None:
        """Return the loss scale as a tensor on its device, None without scaling or before the first update."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LossScaling(NoLossScaling):
    """Dynamic loss scaling by `torch.amp.GradScaler`.

    Args:
        device_type: "cpu" or "cuda".
        init_scale: First scale; 2^16 is torch's default.
    """

    active = True

    def __init__(self, device_type: str, init_scale: float = 2.0**16) -> None:
        self._device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type, init_scale=init_scale)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def update(self, loss: torch.Tensor) -> None:
        """Adapt the scale. A non-finite loss is a fault of the forward, which no scale cures: the scale stays.

        On CUDA reading the loss would wait for the device, so there the scale falls in that case as well.
        """
        if self.scaler._scale is None:
            return  # no loss has been scaled yet: the first one was not finite
        if not loss.is_cuda and not torch.isfinite(loss):
            self.scaler.update(self.scaler.get_scale())
        else:
            self.scaler.update()

    def current(self) -> float:
        return float(self.scaler.get_scale())

    def set(self, scale: float) -> None:
        """Start from another scale. One of 1 and less was chosen against overflow: it falls, and does not grow back."""
        interval = _NEVER if scale <= 1.0 else 2000
        self.scaler = torch.amp.GradScaler(self._device_type, init_scale=scale, growth_interval=interval)

    def tensor(self) -> torch.Tensor | None:
        scale: torch.Tensor | None = self.scaler._scale
        return scale

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)
